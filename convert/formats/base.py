"""What the packed formats of Hugging Face folders share: a matrix made of several raw tensors, their names, their settings."""

import abc
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from convert.errors import MissingTensorError, UnsupportedFormatError
from convert.readers.base import CHUNK_BYTES, LazyTensor, PackedFormat, Shard, cover_columns
from pallas_kernels.qtensor import QTensor, pack_int4, take
from sharding.partition import Units

GROUPS = (128, 64, 32, 16, 8, 4, 2)  # sizes of groups that a scale is repeated for, where a format has fewer scales


class Settings:
    """A quantization_config of which every entry must be understood.

    where: names it in messages. Entries that say nothing (None) are passed over.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def one_of(self, key: str, choices: Collection[Any], default: Any = None) -> Any:
        """The value of a key. Raises UnsupportedFormatError where it is not among `choices`."""
        value = self.get(key, default)
        if value not in choices:
            raise self.error(f"{key} is {value!r}, supported: {', '.join(map(repr, choices))}")
        return value

    def only(self, known: Collection[str], neutral: Mapping[str, Any]) -> None:
        """Raise UnsupportedFormatError for keys that are neither `known` nor have their `neutral` value, all at once."""
        odd = {k: v for k, v in self.config.items() if k not in known and v is not None and neutral.get(k, ...) != v}
        if odd:
            raise self.error("it has " + ", ".join(f"{k}={v!r}" for k, v in sorted(odd.items())) + ", which is not understood")

    def error(self, problem: str) -> UnsupportedFormatError:
        return UnsupportedFormatError(f"{self.where}: {problem}; use a checkpoint without it, or the unquantised model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """The raw tensors of one module, by the ends of their names. module: the name before, without the dot."""

    module: str
    tensors: Mapping[str, LazyTensor]

    @property
    def name(self) -> str:
        """Canonical name of its matrix."""
        return f"{self.module}.weight"

    def __getitem__(self, end: str) -> LazyTensor:
        if end not in self.tensors:
            raise MissingTensorError([f"{self.module}.{end} is absent, {self.module}.{next(iter(self.tensors))} is there"])
        return self.tensors[end]

    def __contains__(self, end: str) -> bool:
        return end in self.tensors

    def expect(self, end: str, shape: tuple[int, ...]) -> LazyTensor:
        """A tensor of this shape. Raises UnsupportedFormatError for another."""
        tensor = self[end]
        if tensor.shape != shape:
            raise UnsupportedFormatError(
                f"{tensor.name} has shape {tensor.shape}; {shape} fits the other tensors of its module"
            )
        return tensor


def bundles(
    tensors: Mapping[str, LazyTensor], marker: str, ends: Collection[str]
) -> tuple[list[Bundle], dict[str, LazyTensor]]:
    """Modules that have a tensor `marker`, with all of their tensors that end on one of `ends`; and the tensors that are left."""
    modules = [name.removesuffix(f".{marker}") for name in tensors if name.endswith(f".{marker}")]
    found = [
        Bundle(module=module, tensors={end: tensors[f"{module}.{end}"] for end in ends if f"{module}.{end}" in tensors})
        for module in modules
    ]
    used = {f"{bundle.module}.{end}" for bundle in found for end in bundle.tensors}
    return found, {name: tensor for name, tensor in tensors.items() if name not in used}


def repeated_group(size: int, inputs: int) -> int:
    """The largest group, of at most 128, that no border of `size` inputs and no end of a row cuts; its scale is repeated.

    A scale of a whole row or of many inputs is kept in such groups, so that a shard of the inputs has scales of its own.
    """
    return next((g for g in GROUPS if size % g == 0 and inputs % g == 0), 0)


class PackedMatrix(LazyTensor):
    """One matrix [O, I] out of raw tensors; a shard of it is cut on the packed form, out of the fewest whole blocks.

    rows, columns: outputs and inputs that are read together. along: the axis whose blocks lie one after another in the file.
    Values are read in pieces of about CHUNK_BYTES; scales, which are small, at once.
    """

    dtype = np.dtype(np.float32)
    rows, columns, along = 1, 1, 0
    packed: PackedFormat

    @abc.abstractmethod
    def values(self, rows: Units, columns: Units) -> np.ndarray:
        """The stored values of a QTensor of these outputs and inputs: whole blocks, no padding."""

    @abc.abstractmethod
    def scales(self, rows: Units, columns: Units) -> dict[str, np.ndarray]:
        """Its other parts."""

    def read(self, units: Shard = None) -> QTensor:
        rows, columns = self.shard(units)
        outputs, inputs = self.shape
        group = math.lcm(self.columns, self.packed.group or 1)
        by_row = cover_columns(rows, self.rows, outputs) if rows else None
        by_column = cover_columns(columns, group, inputs) if columns else None
        read = (by_row.read if by_row else Units(outputs, (0,)), by_column.read if by_column else Units(inputs, (0,)))
        shape, dtype = self.packed.parts((read[0].length, read[1].length))["values"]
        values: np.ndarray = np.empty(shape, dtype)
        per_byte = 2 if self.packed.kind.nibbles else 1
        for start, piece in _pieces(read[self.along], (self.rows, group)[self.along], read[1 - self.along].length):
            if self.along == 0:
                values[start : start + piece.length] = self.values(piece, read[1])
            else:
                values[:, start // per_byte : (start + piece.length) // per_byte] = self.values(read[0], piece)
        q = self.packed.tensor(values=values, **self.scales(*read))
        if by_row and not _is_all(by_row.indices, read[0], by_row.unit):
            q = take(q, axis=-2, unit=by_row.unit, indices=by_row.indices)
        return by_column.cut(q) if by_column and not _is_all(by_column.indices, read[1], by_column.unit) else q


def _is_all(indices: tuple[int, ...], read: Units, unit: int) -> bool:
    return read.size == unit and indices == tuple(range(len(read.indices)))


def _pieces(units: Units, block: int, other: int) -> Iterator[tuple[int, Units]]:
    """Units in pieces of whole blocks and about CHUNK_BYTES values: (start in the result, what to read)."""
    elements = units.elements[::block] // block
    step = max(1, CHUNK_BYTES // (block * max(1, other)))
    for at in range(0, len(elements), step):
        yield at * block, Units(block, tuple(elements[at : at + step].tolist()))


def in_units(units: Units, per: int) -> Units:
    """The same elements where `per` of them are one element of the file."""
    return Units(units.size // per, units.indices)


def nibbles_in_order(packed: np.ndarray, group: int | None, high_first: bool = False) -> np.ndarray:
    """Bytes [..., I/2] whose two nibbles are neighbours, the low one first by default, in the order of `pack_int4`."""
    low, high = packed & 15, packed >> 4
    pair = (high, low) if high_first else (low, high)
    return pack_int4(np.stack(pair, -1).reshape(*packed.shape[:-1], -1), group)


def starts(columns: Units, group: int) -> np.ndarray:
    """The first input of each group of these inputs."""
    return columns.elements[::group]
