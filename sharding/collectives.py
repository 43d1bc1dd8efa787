"""Every collective by name, each with its gradient rule, and how many a compiled program must have.

Gradients are taken inside shard_map, where the transpose of a plain psum is wrong without replication tracking. So a tensor-parallel
region is opened by `enter` and closed by `leave`: identity forward and sum backward, and the reverse
(Shoeybi et al. 2019, Megatron-LM, section 3). Where tensor shards lie on several hosts, the sum is taken in layers: `leave_hosts`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def same_rows(x, axes: Axes, replicas: int, first: int):
    """Identity of an array whose rows from `first` on are the same on each run of `replicas` neighbours over `axes`; the gradient of those
    rows is the sum over the run, so that they stay the same. No collective forward."""
    return x


def _same_rows_bwd(axes, replicas, first, _, g):
    every = lax.all_gather(g[first:], axes)  # [shards, rows, ...]
    run = lax.dynamic_slice_in_dim(every, lax.axis_index(axes) // replicas * replicas, replicas)
    return (jnp.concatenate([g[:first], jnp.sum(run, 0)]),)


same_rows.defvjp(lambda x, axes, replicas, first: (x, None), _same_rows_bwd)


@jax.custom_vjp
def frozen_zeros(x, real):
    """Identity of an array that holds padding; the gradient is zero where `real`, bool in a shape that broadcasts to it, is not."""
    return x


frozen_zeros.defvjp(lambda x, real: (x, real), lambda real, g: (jnp.where(real, g, 0), None))


BLOCK = 256  # numbers that share a scale where sums are sent as INT8
_SCALE_BYTES = 4


def sends_directly(mesh: Mesh) -> bool:
    """Whether a reduce-scatter on a mesh is an all-to-all of parts and a sum on each shard. It sends as many bytes. On CPUs it takes a half
    to a third of the time: Gloo's reduce-scatter copies all of what it adds to fresh memory, twice."""
    return mesh.devices.flat[0].platform == "cpu"


def _reduce_scatter(x, axis: str, dimension: int, direct: bool):
    """Of the sum over an axis, each shard's part along a dimension, which the shards divide. direct: see `sends_directly`."""
    if not direct:
        return lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    shape = x.shape
    parts = x.reshape(*shape[:dimension], lax.axis_size(axis), -1, *shape[dimension + 1 :])
    return jnp.sum(lax.all_to_all(parts, axis, dimension, dimension), dimension)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def leave_hosts(x, hosts: str, local: str, int8: bool, direct: bool):
    """`leave` over the axes (hosts, local) in three steps: reduce-scatter inside a host, all-reduce across, all-gather inside.

    So each host sends each number once, and not once a ring: see `all_reduce_bytes`. int8: what crosses hosts is INT8 with a float32 scale
    per BLOCK numbers, `sum_int8`, and so is what is gathered inside; every device still gets the same result. direct: see
    `sends_directly`. x: floats of any shape.
    """
    n, flat = lax.axis_size(local), x.reshape(-1)
    flat = jnp.pad(flat, (0, -flat.size % n))
    part = _reduce_scatter(flat, local, 0, direct)
    if int8:
        addends = unpacked(lax.all_gather(sum_int8(part, hosts, local, direct), local, axis=1))  # [1 or 2, n, blocks, BLOCK]
        every = functools.reduce(jnp.add, addends).reshape(n, -1)[:, : part.size].reshape(-1).astype(x.dtype)
    else:
        every = lax.all_gather(lax.psum(part, hosts), local, tiled=True)
    return every[: x.size].reshape(x.shape)


leave_hosts.defvjp(lambda x, *static: (leave_hosts(x, *static), None), lambda hosts, local, int8, direct, _, g: (g,))


def _packed(x):
    """float32 [..., BLOCK] -> INT8 [..., BLOCK + 4]: values and the bytes of their scale, sent as one. Off by half a scale at most."""
    scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    values = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return jnp.concatenate([values, lax.bitcast_convert_type(scale, jnp.int8)[..., 0, :]], -1)


def unpacked(packed):
    """float32 [..., BLOCK] of INT8 [..., BLOCK + 4], as `sum_int8` gives them."""
    scale = lax.bitcast_convert_type(packed[..., BLOCK:], jnp.float32)
    return packed[..., :BLOCK].astype(jnp.float32) * scale[..., None]


def sum_int8(x, hosts: str, local: str, direct: bool):
    """Sum of float vectors [n] over the axis `hosts`, sent as INT8: INT8 [addends, blocks, BLOCK + 4], whose `unpacked` add up to it, with
    zeros behind.

    Two hosts send each other all that they have: two addends. More take an all-to-all of blocks, their sum in float32 and an all-gather of
    its blocks, which is one addend: fewer bytes, another rounding and another wait. With m_i and m the largest magnitudes of a block on
    host i and in the sum, a number's error is at most the sum of the m_i / 254, with more than two hosts m / 254 more. The result is the
    same on all shards. local: the axis inside a host. direct: see `sends_directly`.
    """
    n = lax.axis_size(hosts)
    shares = 1 if n == 2 else n
    packed = _packed(jnp.pad(x.astype(jnp.float32), (0, -x.size % (shares * BLOCK))).reshape(shares, -1, BLOCK))
    if n != 2:
        own = jnp.sum(unpacked(lax.all_to_all(packed, hosts, 0, 0)), 0)
        return lax.all_gather(_packed(own), hosts, tiled=True)[None]
    if not direct:
        return lax.all_gather(packed[0], hosts)
    both = jnp.concatenate([packed, _of_other_host(packed, hosts, local)])
    # in the order of the hosts: fused multiply-adds round the second addend less
    return jnp.where(lax.axis_index(hosts) == 0, both, both[::-1])


def _of_other_host(x, hosts: str, local: str):
    """Integers `x` of the device in this one's place on the other of two hosts. Two permutes.

    Every second device sends first while its neighbours receive, so that both directions of the link are busy. Gloo lets a message go when
    its receiver has said that it waits, and says so behind what it sends itself: of two that send to each other the one that is ready first
    waits for all that the other sends, and the link carries one direction at a time.
    """
    n = lax.axis_size(local)
    ways = [(d, n + d) if d % 2 == 0 else (n + d, d) for d in range(n)]
    there, back = (lax.ppermute(x, (hosts, local), some) for some in (ways, [way[::-1] for way in ways]))
    return there | back  # of which one is zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_shards(x, axes: Axes, axis: int):
    """Join the shards of `x` along `axis`; its gradient is the own slice of the gradient. One all-gather."""
    return lax.all_gather(x, axes, axis=axis, tiled=True)


def _gather_fwd(x, axes, axis):
    return gather_shards(x, axes, axis), x.shape[axis]


def _gather_bwd(axes, axis, size, g):
    return (lax.dynamic_slice_in_dim(g, lax.axis_index(axes) * size, size, axis),)


gather_shards.defvjp(_gather_fwd, _gather_bwd)


# --- tokens split over tensor shards between half layers (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2)


def _scatter(x, axes: Axes, direct: bool):
    for axis in axes:
        x = _reduce_scatter(x, axis, 1, direct)
    return x


def _gather(x, axes: Axes):
    for axis in reversed(axes):
        x = lax.all_gather(x, axis, axis=1, tiled=True)
    return x


def _own(x, axes: Axes):
    size = x.shape[1] // lax.axis_size(axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def scatter_tokens(x, axes: Axes, direct: bool):
    """`leave` of x [B, T, ...] of which each shard keeps its T / n tokens: [B, T / n, ...], the i-th those from i T / n on. Its gradient is
    `gather_tokens`. One reduce-scatter an axis, the first axis first; with the one inside a host first, hosts send their share only.
    direct: see `sends_directly`."""
    return _scatter(x, axes, direct)


scatter_tokens.defvjp(lambda x, *static: (_scatter(x, *static), None), lambda axes, direct, _, g: (_gather(g, axes),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_tokens(x, axes: Axes, direct: bool):
    """The tokens of all shards, [B, T, ...] of x [B, T / n, ...], into a region over `axes`; its gradient is `scatter_tokens`. One
    all-gather an axis, the last axis first."""
    return _gather(x, axes)


gather_tokens.defvjp(lambda x, axes, direct: (_gather(x, axes), None), lambda axes, direct, _, g: (_scatter(g, axes, direct),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def own_tokens(x, axes: Axes):
    """This shard's tokens [B, T / n, ...] of x [B, T, ...], which all shards hold whole, as they do its gradient. No collective forward."""
    return _own(x, axes)


own_tokens.defvjp(lambda x, axes: (_own(x, axes), None), lambda axes, _, g: (_gather(g, axes),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def join_tokens(x, axes: Axes):
    """`gather_tokens` for what all shards do alike, so that its gradient is the own part of the gradient. One all-gather an axis."""
    return _gather(x, axes)


join_tokens.defvjp(lambda x, axes: (_gather(x, axes), None), lambda axes, _, g: (_own(g, axes),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def next_stage(x, axis: str):
    """Hand `x` to the following stage, the last one's to the first; its gradient goes the other way. One permute."""
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


def _previous_stage(axis, _, g):
    n = lax.axis_size(axis)
    return (lax.ppermute(g, axis, [((i + 1) % n, i) for i in range(n)]),)


next_stage.defvjp(lambda x, axis: (next_stage(x, axis), None), _previous_stage)


# --- rows to the shards that hold their experts, and back


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "experts", "sent", "received", "places"),
    meta_fields=("capacity",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrived:
    """What `dispatch` brought to a shard. rows: float [n * capacity, D], those of shard i from i * capacity on. experts: int32
    [n * capacity], the expert of each among this shard's; their number where there is no row, which is zero then. sent, received: int32
    [n], rows to and from each shard. places: int32 [n], where each shard keeps its first row for this one."""

    rows: jax.Array
    experts: jax.Array
    sent: jax.Array
    received: jax.Array
    places: jax.Array
    capacity: int


def _starts(sizes):
    return jnp.cumsum(sizes) - sizes


def dispatch(x, sizes, axis: str, *, capacity: int, ragged: bool) -> Arrived:
    """Rows x [N, D], in the order of the experts of all shards, to the shards that hold these: an all-to-all of counts, and one of rows.

    sizes: int32 [n, E], rows for each of the E experts of each of the n shards, which add up to N. capacity: rows that any shard may
    send to another one, at most; none is dropped. ragged: send only the rows that there are (`lax.ragged_all_to_all`, which XLA has for
    GPUs), else blocks padded to the capacity. Gradients are those of its steps: an all-to-all of rows the other way.
    """
    n, E = sizes.shape
    sent = jnp.sum(sizes, 1)
    starts = _starts(sent)
    told = lax.all_to_all(jnp.concatenate([sizes, starts[:, None]], 1), axis, 0, 0)  # [n, E + 1], of each sender
    counts, places = told[:, :E], told[:, E]
    received = jnp.sum(counts, 1)
    if ragged:
        mine = jnp.full((n,), lax.axis_index(axis) * capacity, jnp.int32)
        out = jnp.zeros((n * capacity, x.shape[1]), x.dtype)
        rows = lax.ragged_all_to_all(x, out, starts, sent, mine, received, axis_name=axis)
    else:
        taken = starts[:, None] + jnp.arange(capacity)
        real = jnp.arange(capacity) < sent[:, None]
        blocks = jnp.where(real[..., None], x[jnp.where(real, taken, 0)], 0)
        rows = lax.all_to_all(blocks, axis, 0, 0).reshape(n * capacity, -1)
    ends = jnp.cumsum(counts, 1)  # within a sender's rows, which are in the order of experts
    experts = jnp.sum(jnp.arange(capacity)[:, None] >= ends[:, None], -1, dtype=jnp.int32)  # [n, capacity]
    return Arrived(rows=rows, experts=experts.reshape(-1), sent=sent, received=received, places=places, capacity=capacity)


def collect(y, arrived: Arrived, axis: str, *, rows: int, ragged: bool):
    """What was made of the rows that arrived, [n * capacity, D] in their order, back in the places that they had: [rows, D]."""
    n, capacity = arrived.sent.shape[0], arrived.capacity
    starts = _starts(arrived.sent)
    if ragged:
        own = jnp.arange(n, dtype=jnp.int32) * capacity
        out = jnp.zeros((rows, y.shape[1]), y.dtype)
        return lax.ragged_all_to_all(y, out, own, arrived.received, arrived.places, arrived.sent, axis_name=axis)
    blocks = lax.all_to_all(y.reshape(n, capacity, -1), axis, 0, 0).reshape(n * capacity, -1)
    shard = jnp.repeat(jnp.arange(n, dtype=jnp.int32), arrived.sent, total_repeat_length=rows)
    return blocks[shard * capacity + jnp.arange(rows, dtype=jnp.int32) - starts[shard]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Collectives in a part of the text of a compiled program; both branches of a conditional count."""

    all_reduce: int = 0
    all_gather: int = 0
    collective_permute: int = 0
    reduce_scatter: int = 0
    all_to_all: int = 0
    ragged_all_to_all: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    def by_name(self) -> dict[str, int]:
        """Counts under their HLO names, zeros left out."""
        named = {field.name.replace("_", "-"): getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: n for name, n in named.items() if n}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What a compiled program must have, and no more. loop: in the body and the condition of its loop, which a pass through it runs.
    outside: what runs once a call."""

    loop: Counts = Counts()
    outside: Counts = Counts()


def _of_layers(
    *,
    slots: int,
    tensor: int,
    tensor_hosts: int,
    int8: bool,
    expert: int,
    moe_slots: int,
    ragged: bool,
    direct: bool,
    sequence: bool = False,
) -> Counts:
    """Of the layer slots of one stage: two sums a slot where there are tensor shards, each of which is a reduce-scatter, an all-reduce and
    an all-gather where these lie on several hosts with several each; with INT8 across hosts an all-gather instead of its all-reduce, and
    with more than two hosts an all-to-all before it. sequence: a reduce-scatter and an all-gather each, two where the shards lie on
    several hosts with several each. direct: every reduce-scatter is an all-to-all, and INT8 between two hosts are two permutes. Where
    experts are split, each of the moe_slots slots of layers that have some takes three all-to-alls: of counts, of rows to the experts and
    of rows back, the latter two ragged ones where so asked."""
    sums = 2 * slots * (tensor * tensor_hosts > 1)
    layered = tensor > 1 and tensor_hosts > 1
    exchanges = moe_slots if expert > 1 else 0
    permuted = layered and int8 and direct and tensor_hosts == 2
    scattered = sums * (1 + layered if sequence else layered)
    return Counts(
        all_reduce=0 if sequence or (layered and int8) else sums,
        all_gather=scattered + (sums if layered and int8 and not permuted else 0),
        collective_permute=2 * sums if permuted else 0,
        reduce_scatter=0 if direct else scattered,
        all_to_all=(scattered if direct else 0)
        + (sums if layered and int8 and tensor_hosts > 2 else 0)
        + exchanges * (1 if ragged else 3),
        ragged_all_to_all=2 * exchanges if ragged else 0,
    )


def _of_ends(*, stages: int, shards: int) -> Counts:
    """Of the embedding and of choosing a token. Where the vocabulary is split: one all-reduce for the embedding, two for the greedy token
    (largest logit, lowest id), two for log-probabilities if asked for, and one all-gather of the logits if any token is drawn; with a
    pipeline one all-reduce of the last stage's output."""
    split = stages * shards > 1
    return Counts(all_reduce=5 * split + (stages > 1), all_gather=int(split))


def expected_decode(
    *,
    slots: int,
    stages: int,
    tensor: int,
    data: int = 1,
    tensor_hosts: int = 1,
    int8: bool = False,
    expert: int = 1,
    moe_slots: int = 0,
    ragged: bool = False,
    direct: bool = False,
) -> Expected:
    """Of a decode program that reports no alternatives of tokens: all in its loop, of which a pass is a tick.

    slots: layer slots of a stage. stages, tensor, data, tensor_hosts, expert: sizes of the mesh's axes. direct: see `sends_directly`.
    Layers and ends (see `_of_layers` and `_of_ends`); with a pipeline a permute, to the next stage; where the batch is split, over data or
    experts, an all-reduce of a scalar: whether any shard goes on.
    """
    sizes: dict[str, Any] = {"tensor": tensor, "tensor_hosts": tensor_hosts, "expert": expert, "moe_slots": moe_slots}
    layers = _of_layers(slots=slots, **sizes, int8=int8, ragged=ragged, direct=direct)
    own = Counts(collective_permute=int(stages > 1), all_reduce=int(data * expert > 1))
    return Expected(loop=layers + _of_ends(stages=stages, shards=tensor * tensor_hosts) + own)


def expected_prefill(
    *,
    slots: int,
    stages: int,
    tensor: int,
    tensor_hosts: int = 1,
    int8: bool = False,
    expert: int = 1,
    moe_slots: int = 0,
    ragged: bool = False,
    direct: bool = False,
    sequence: bool = False,
    chunked: bool = False,
) -> Expected:
    """Of a prefill program that reports nothing of the prompts: with a pipeline its layers and a permute are in a loop, of which a pass is
    a micro-batch on every stage; without one there is no loop. See `expected_decode`. sequence: tokens are split over tensor shards between
    half layers: instead of each sum a reduce-scatter and an all-gather, and an all-gather of the last layer's tokens outside the loop; two
    of each where the shards lie on several hosts with several each. chunked: prompts are read a chunk at a time, a pass
    of the loop, which is there without a pipeline too."""
    sizes: dict[str, Any] = {"tensor": tensor, "tensor_hosts": tensor_hosts, "expert": expert, "moe_slots": moe_slots}
    layers = _of_layers(slots=slots, **sizes, int8=int8, ragged=ragged, direct=direct, sequence=sequence)
    ends = _of_ends(stages=stages, shards=tensor * tensor_hosts)
    if sequence:
        ends += Counts(all_gather=(tensor > 1) + (tensor_hosts > 1))
    if stages == 1 and not chunked:
        return Expected(outside=layers + ends)
    return Expected(loop=layers + Counts(collective_permute=int(stages > 1)), outside=ends)


def expected(
    config: Any,
    mesh: Mesh,
    *,
    program: Literal["decode", "prefill"] = "decode",
    int8: bool = False,
    ragged: bool = False,
    sequence: bool = False,
    chunked: bool = False,
    kinds: Sequence[str] | None = None,
) -> Expected:
    """`expected_decode` or `expected_prefill` of a model on a mesh of sharding.mesh.make_mesh.

    config: has `layers`, and `moe`, which is None for a model without experts. sequence, chunked: of prefill, see there.
    kinds: of the layer slots, "moe" those with experts; needed for models that have them in some layers only, by default as few slots as
    can be, all alike.
    """
    if kinds is None:
        kinds = ("moe" if config.moe else "dense",) * -(-config.layers // mesh.shape["stage"])
    sizes = {name: mesh.shape[name] for name in ("tensor", "tensor_hosts", "expert")}
    more: dict[str, Any] = {"int8": int8, "ragged": ragged, "moe_slots": sum(kind == "moe" for kind in kinds)}
    more["direct"] = sends_directly(mesh)
    more |= {"slots": len(kinds), "stages": mesh.shape["stage"], **sizes}
    if program == "prefill":
        return expected_prefill(**more, sequence=sequence, chunked=chunked)
    return expected_decode(data=mesh.shape["data"], **more)


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
    2 (hosts - 1) / hosts of them once. INT8 makes them 1 + 4 / BLOCK bytes a number, across hosts and the second time inside, where two
    hosts' numbers are gathered as they came, both."""
    summed = math.ceil(nbytes / item) * (1 + _SCALE_BYTES / BLOCK) if int8 else nbytes
    gathered = 2 * summed if int8 and hosts == 2 else summed
    return Sent(inside=(local - 1) / local * (nbytes + gathered), across=2 * (hosts - 1) / hosts * summed)


def all_gather_bytes(nbytes: float, *, shards: int) -> float:
    """That a device sends in `gather_shards` of shards that are nbytes together, over a ring."""
    return (shards - 1) / shards * nbytes


def scatter_tokens_bytes(nbytes: float, *, hosts: int, local: int) -> Sent:
    """`scatter_tokens` of nbytes a device, inside a host first, over hosts x local devices; as many again in `gather_tokens` of nbytes
    together. Both together send what `leave_hosts` does, or on one host `leave`."""
    return Sent(inside=(local - 1) / local * nbytes, across=(hosts - 1) / hosts * nbytes)


def permute_bytes(nbytes: float) -> float:
    """That a device sends in `next_stage`."""
    return nbytes


def dispatch_bytes(tokens: int, *, used: int, row: float, shards: int, experts: int, ragged: bool = False) -> float:
    """That a device sends in `dispatch`, and as many again in `collect`: of `tokens` tokens of `row` bytes with `used` experts each, over
    `shards` shards of `experts` experts each. Padded, every other shard is sent the capacity tokens * min(used, experts); ragged, the
    (shards - 1) / shards of the rows that go elsewhere where the choice is even. The counts are 4 (experts + 1) bytes a shard beside that.
    """
    rows = (shards - 1) / shards * tokens * used if ragged else (shards - 1) * tokens * min(used, experts)
    return rows * row + 4 * (experts + 1) * (shards - 1)
