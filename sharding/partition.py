"""How one axis of a tensor is divided over shards: whole units, with padding and replication where a size does not divide.

An axis is cut into units (a head, a quantisation group, one row). A shard holds a list of unit indices; -1 is a unit of zeros.
Everything here is host-side numpy: it decides what is read from a file, never what is traced.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from sharding.errors import MeshError


@dataclasses.dataclass(frozen=True)
class Units:
    """The pieces of one axis that one shard holds.

    size: elements of a unit. indices: the units in the shard's order; -1 stands for a unit of zeros.
    """

    size: int
    indices: tuple[int, ...]

    @property
    def length(self) -> int:
        """Elements of the shard along this axis."""
        return self.size * len(self.indices)

    @functools.cached_property
    def elements(self) -> np.ndarray:
        """Source element of each position of the shard, int64 [length]; -1 for padding."""
        base = np.asarray(self.indices, np.int64)[:, None]
        return np.where(base < 0, -1, base * self.size + np.arange(self.size)).reshape(-1)

    def as_slice(self) -> slice | None:
        """The shard as one contiguous slice of the source, or None where it is not one."""
        if not self.indices or self.indices[0] < 0:
            return None
        first = self.indices[0]
        if self.indices != tuple(range(first, first + len(self.indices))):
            return None
        return slice(first * self.size, (first + len(self.indices)) * self.size)


def gather(array, units: Sequence[Units | None]) -> np.ndarray:
    """Copy the shard that `units` (one per axis, None = all of it) describes out of a numpy array or memory map.

    The result owns its memory; padding is zero.
    """
    index: list[slice] = []
    fancy: list[tuple[int, np.ndarray]] = []
    for axis, unit in enumerate(units):
        cut = slice(None) if unit is None else unit.as_slice()
        index.append(slice(None) if cut is None else cut)
        if unit is not None and cut is None:
            fancy.append((axis, unit.elements))
    out = array[tuple(index)]
    for axis, elements in fancy:
        out = np.take(out, np.maximum(elements, 0), axis=axis)
        if (elements < 0).any():
            out[(slice(None),) * axis + (elements < 0,)] = 0
    return np.array(out, copy=not fancy)


def split_even(size: int, shards: int, unit: int = 1) -> tuple[Units, ...]:
    """Divide an axis of `size` elements into `shards` equal contiguous shards of whole units, padding the end.

    `unit` must divide `size`: raise MeshError otherwise.
    """
    if size % unit:
        raise MeshError(f"an axis of {size} elements is not made of units of {unit}; choose a unit that divides it")
    units = size // unit
    each = math.ceil(units / shards)
    out = []
    for s in range(shards):
        if (s + 1) * each <= units:
            out.append(Units(each * unit, (s,)))  # one run, read as one slice
        else:
            out.append(Units(unit, tuple(i if i < units else -1 for i in range(s * each, (s + 1) * each))))
    return tuple(out)


def split_experts(experts: int, shards: int) -> tuple[tuple[int, ...], ...]:
    """The experts that each shard holds: neighbours, as alike in number as can be, padded with -1 to one length."""
    counts = [experts // shards + (s < experts % shards) for s in range(shards)]
    starts = [sum(counts[:s]) for s in range(shards)]
    return tuple((*range(start, start + n), *[-1] * (max(counts) - n)) for start, n in zip(starts, counts, strict=True))


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """Which query and key/value heads each shard holds. Query heads of a shard are grouped by its kv heads, in order.

    query: per shard, head indices, -1 for padding; kv: per shard, kv-head indices, -1 for padding (may repeat over shards).
    """

    query: tuple[tuple[int, ...], ...]
    kv: tuple[tuple[int, ...], ...]

    @property
    def replicas(self) -> int:
        """Neighbouring shards that hold the same kv heads, each with query heads of its own."""
        return next((shard for shard, held in enumerate(self.kv) if held != self.kv[0]), len(self.kv))

    @property
    def real(self) -> tuple[tuple[bool, ...], ...]:
        """For each shard, which of its query heads are no padding."""
        return tuple(tuple(head >= 0 for head in held) for held in self.query)

    def query_units(self, head_dim: int) -> tuple[Units, ...]:
        return tuple(Units(head_dim, q) for q in self.query)

    def kv_units(self, head_dim: int) -> tuple[Units, ...]:
        return tuple(Units(head_dim, k) for k in self.kv)


def split_heads(heads: int, kv_heads: int, shards: int) -> HeadSplit:
    """Divide N query heads in K groups over any number of shards, keeping each query head beside its kv head.

    kv heads are padded to the next count that divides, or is divided by, `shards`; where there are more shards than kv heads
    each is replicated and its query heads are split over the replicas, padded with zero heads where they do not divide.
    """
    if heads % kv_heads:
        raise MeshError(f"{heads} query heads are not a multiple of {kv_heads} kv heads")
    group = heads // kv_heads
    if kv_heads >= shards:
        padded, replicas = math.ceil(kv_heads / shards) * shards, 1
    else:
        padded = next(d for d in range(kv_heads, shards + 1) if shards % d == 0)
        replicas = shards // padded
    kv_each, group_each = max(padded // shards, 1), math.ceil(group / replicas)
    query, kv = [], []
    for shard in range(shards):
        first, part = shard // replicas * kv_each, shard % replicas
        own = [k if k < kv_heads else -1 for k in range(first, first + kv_each)]
        kv.append(tuple(own))
        members = range(part * group_each, (part + 1) * group_each)
        query.append(tuple(k * group + g if k >= 0 and g < group else -1 for k in own for g in members))
    return HeadSplit(tuple(query), tuple(kv))
