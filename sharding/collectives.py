"""Every collective by name, each with its gradient rule, and how many a compiled program must have.

Gradients are taken inside shard_map, where the transpose of a plain psum is wrong without replication tracking. So a tensor-parallel
region is opened by `enter` and closed by `leave`: identity forward and sum backward, and the reverse
(Shoeybi et al. 2019, Megatron-LM, section 3). Where tensor shards lie on several hosts, the sum is taken in layers: `leave_hosts`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

Axes = tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def leave(x, axes: Axes):
    """Sum of the partial results of a region over `axes`; its gradient is the identity. One all-reduce."""
    return lax.psum(x, axes)


leave.defvjp(lambda x, axes: (lax.psum(x, axes), None), lambda axes, _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def enter(x, axes: Axes):
    """Identity into a region over `axes`; its gradient is the sum. No collective forward."""
    return x


enter.defvjp(lambda x, axes: (x, None), lambda axes, _, g: (lax.psum(g, axes),))


BLOCK = 256  # numbers that share a scale where sums are sent as INT8
_SCALE_BYTES = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def leave_hosts(x, hosts: str, local: str, int8: bool):
    """`leave` over the axes (hosts, local) in three steps: reduce-scatter inside a host, all-reduce across, all-gather inside.

    So each host sends each number once, and not once a ring: see `all_reduce_bytes`. int8: what crosses hosts is INT8 with a float32 scale
    per BLOCK numbers, `all_reduce_int8`; every device still gets the same result. x: floats of any shape.
    """
    n, flat = lax.axis_size(local), x.reshape(-1)
    flat = jnp.pad(flat, (0, -flat.size % n))
    part = lax.psum_scatter(flat, local, tiled=True)
    part = all_reduce_int8(part, hosts) if int8 else lax.psum(part, hosts)
    return lax.all_gather(part, local, tiled=True)[: x.size].reshape(x.shape)


leave_hosts.defvjp(
    lambda x, hosts, local, int8: (leave_hosts(x, hosts, local, int8), None), lambda hosts, local, int8, _, g: (g,)
)


def _packed(x):
    """float32 [..., BLOCK] -> INT8 [..., BLOCK + 4]: values and the bytes of their scale, sent as one. Off by half a scale at most."""
    scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    values = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return jnp.concatenate([values, lax.bitcast_convert_type(scale, jnp.int8)[..., 0, :]], -1)


def _unpacked(packed):
    scale = lax.bitcast_convert_type(packed[..., BLOCK:], jnp.float32)
    return packed[..., :BLOCK].astype(jnp.float32) * scale[..., None]


def all_reduce_int8(x, axis: str):
    """Sum of float vectors [n] over an axis, sent as INT8: an all-to-all of blocks, their sum in float32, an all-gather of its blocks.

    Each number is rounded twice: its error is at most (sum over the shards of m_i, plus m) / 254, with m_i and m the largest magnitudes of
    its block in shard i and in the sum. The result is the same on all shards.
    """
    n, size = lax.axis_size(axis), x.size
    blocks = jnp.pad(x.astype(jnp.float32), (0, -size % (n * BLOCK))).reshape(n, -1, BLOCK)
    own = jnp.sum(_unpacked(lax.all_to_all(_packed(blocks), axis, 0, 0)), 0)
    return _unpacked(lax.all_gather(_packed(own), axis, tiled=True)).reshape(-1)[:size].astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_shards(x, axes: Axes, axis: int):
    """Join the shards of `x` along `axis`; its gradient is the own slice of the gradient. One all-gather."""
    return lax.all_gather(x, axes, axis=axis, tiled=True)


def _gather_fwd(x, axes, axis):
    return gather_shards(x, axes, axis), x.shape[axis]


def _gather_bwd(axes, axis, size, g):
    return (lax.dynamic_slice_in_dim(g, lax.axis_index(axes) * size, size, axis),)


gather_shards.defvjp(_gather_fwd, _gather_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def next_stage(x, axis: str):
    """Hand `x` to the following stage, the last one's to the first; its gradient goes the other way. One permute."""
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


def _previous_stage(axis, _, g):
    n = lax.axis_size(axis)
    return (lax.ppermute(g, axis, [((i + 1) % n, i) for i in range(n)]),)


next_stage.defvjp(lambda x, axis: (next_stage(x, axis), None), _previous_stage)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """Collectives in the text of a compiled program, where a loop's body counts once and both branches of a conditional count."""

    all_reduce: int = 0
    all_gather: int = 0
    collective_permute: int = 0
    reduce_scatter: int = 0
    all_to_all: int = 0

    def by_name(self) -> dict[str, int]:
        """Counts under their HLO names, zeros left out."""
        named = {field.name.replace("_", "-"): getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: n for name, n in named.items() if n}


def expected_decode(
    *, slots: int, stages: int, tensor: int, data: int = 1, tensor_hosts: int = 1, int8: bool = False
) -> Expected:
    """What a decode program must have, and no more.

    slots: layers of the longest stage. stages, tensor, data, tensor_hosts: sizes of the mesh's axes. Per tick: two all-reduces a layer
    under tensor parallelism, each of which is a reduce-scatter, an all-reduce and an all-gather where shards lie on several hosts with
    several each (with INT8 across hosts an all-to-all and an all-gather instead of its all-reduce); where the vocabulary is split one for
    the embedding, two for the greedy token (largest logit, lowest id), two for log-probabilities if asked for, and one all-gather of the
    logits if any token is drawn; with a pipeline one all-reduce of the last stage's output and one permute; under a data axis one of a
    scalar, whether any shard goes on.
    """
    shards = tensor * tensor_hosts
    split_vocab, pipeline = stages * shards > 1, stages > 1
    sums, layered = 2 * slots * (shards > 1), tensor > 1 and tensor_hosts > 1
    across = sums if not (layered and int8) else 0
    return Expected(
        all_reduce=5 * split_vocab + across + pipeline + (data > 1),
        all_gather=int(split_vocab) + (sums * (2 if int8 else 1) if layered else 0),
        collective_permute=int(pipeline),
        reduce_scatter=sums if layered else 0,
        all_to_all=sums if layered and int8 else 0,
    )


def expected(config: Any, mesh: Mesh, *, int8: bool = False) -> Expected:
    """`expected_decode` of a model with so many `config.layers`, on a mesh of sharding.mesh.make_mesh."""
    sizes = {name: mesh.shape[name] for name in ("tensor", "data", "tensor_hosts")}
    return expected_decode(slots=-(-config.layers // mesh.shape["stage"]), stages=mesh.shape["stage"], int8=int8, **sizes)


# --- what each sends


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """Bytes. inside: that each device sends to others of its host. across: that each host's devices together send to other hosts."""

    inside: float
    across: float


def all_reduce_bytes(nbytes: float, *, hosts: int, local: int) -> Sent:
    """`leave` of nbytes a device over hosts x local devices: a ring in their order, 2 (n - 1) / n of the bytes over each of its n links, of
    which one leads out of every host."""
    n = hosts * local
    each = 2 * (n - 1) / n * nbytes
    return Sent(inside=each if local > 1 else 0.0, across=each if hosts > 1 else 0.0)


def leave_hosts_bytes(nbytes: float, *, hosts: int, local: int, item: int, int8: bool = False) -> Sent:
    """`leave_hosts` of nbytes a device, `item` bytes a number: inside a host (local - 1) / local of the bytes twice, across hosts
    2 (hosts - 1) / hosts of them once, which INT8 makes 1 + 4 / BLOCK bytes a number."""
    numbers = math.ceil(nbytes / item)
    crossing = numbers * (1 + _SCALE_BYTES / BLOCK) if int8 else nbytes
    return Sent(inside=2 * (local - 1) / local * nbytes, across=2 * (hosts - 1) / hosts * crossing)


def all_gather_bytes(nbytes: float, *, shards: int) -> float:
    """That a device sends in `gather_shards` of shards that are nbytes together, over a ring."""
    return (shards - 1) / shards * nbytes


def permute_bytes(nbytes: float) -> float:
    """That a device sends in `next_stage`."""
    return nbytes
