"""Attention over a cache for NVIDIA GPUs through Pallas and Triton. The scores never leave the registers.

All query heads of a group share one read of their keys and values: the rows of a block are query tokens times heads of a group.
Few queries (decoding) are bound by the read of the cache: the keys that a sequence sees are split over blocks, so that one sequence fills
the GPU too, and a second launch weighs their partial sums. Many (prefill) are bound by the products: each block has its own rows, and
keys that all of them see are not masked. Source: Dao 2023, arXiv:2307.08691; Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.attention import reference
from pallas_kernels.errors import BackendError
from pallas_kernels.kernel_math import LOG2_E, power_of_two
from pallas_kernels.launch import gpu_refusal, kernel_precision, launch
from pallas_kernels.tuning import tile_for

FEW = 64  # queries of a kv head, tokens times heads of a group, up to which keys are split and not queries
WIDEST = 256  # head_dim
SMALLEST = 16  # sides of a tensor core's tile
NOTHING = -1e30  # finite, so that a block that sees nothing gives no NaN
BLOCKS = 264  # two for each processor of an H100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """queries: rows of a block, at least 16. keys: of a step. splits: of the keys of a sequence, 1 for more queries than a block has.
    warps: of 32 threads. stages: of loads that are under way. All but warps and stages are powers of two."""

    queries: int
    keys: int
    splits: int
    warps: int
    stages: int


def heuristic(*, sequences: int, queries: int, kv_heads: int, tokens: int, size: int, dtype) -> Tile:
    """Few queries: as many splits as fill the GPU, of at least two steps each. Exact products take registers: float32 in small steps."""
    width, exact = power_of_two(size), dtype == jnp.float32
    if queries > FEW:
        # 128 rows of narrower heads spill on a B200, wider ones and int8 everywhere
        rows = 32 if exact else 64 if width != 128 or dtype == jnp.int8 else 128
        return Tile(queries=rows, keys=16 if exact else 32 if width > 128 else 64, splits=1, warps=4 if exact else 8, stages=2)
    keys = min(64, max(SMALLEST, 2048 // width)) if exact else min(128, max(SMALLEST, 8192 // width))
    wanted = power_of_two(BLOCKS // (sequences * kv_heads) // 2 + 1)
    return Tile(
        queries=max(SMALLEST, power_of_two(queries)),
        keys=keys,
        splits=max(1, min(wanted, power_of_two(tokens) // (2 * keys))),
        warps=4 if queries <= SMALLEST and width <= 128 else 8,
        stages=3,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    queries: int  # tokens of a sequence
    group: int
    size: int
    tokens: int  # of the cache
    scale: float
    soft_cap: float | None
    width: int  # of a head, a power of two
    blocks: int  # of queries
    few: bool
    tile: Tile


def supports_attention(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there is nothing to attend"
    if facts["shape"][-1] > WIDEST:
        return f"heads of {facts['shape'][-1]} do not fit the registers of a block, at most {WIDEST} do"
    return True


def attention(q, cache, *, rows, positions, scale, soft_cap, window):
    return _attention(scale, soft_cap, q, cache, rows, positions, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale, soft_cap, q, cache, rows, positions, window):
    B, T, N, H = q.shape
    K, S = cache.k.shape[1:3]
    dtype = cache.k.dtype
    G = N // K
    default = heuristic(sequences=B, queries=T * G, kv_heads=K, tokens=S, size=H, dtype=dtype)
    key = {"sequences": B, "queries": T * G, "kv_heads": K, "tokens": S, "head_dim": H, "dtype": str(dtype)}
    tile = tile_for("attention", default, **key)
    blocks = -(-T * G // tile.queries)
    if blocks > 1 and tile.splits > 1:
        raise BackendError(f"attention: {T * G} queries in blocks of {tile.queries} leave no place for {tile.splits} splits")
    shape = _Shape(
        queries=T,
        group=G,
        size=H,
        tokens=S,
        scale=scale,
        soft_cap=soft_cap,
        width=max(SMALLEST, power_of_two(H)),
        blocks=blocks,
        few=T * G <= FEW,
        tile=tile,
    )
    given = {"q": q, "positions": positions.astype(jnp.int32)}
    given |= {} if rows is None else {"rows": rows.astype(jnp.int32)}
    given |= {} if window is None else {"window": window.astype(jnp.int32).reshape(1)}
    given |= {name: a for name in ("k", "v", "k_scale", "v_scale") if (a := getattr(cache, name)) is not None}
    whole = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    if tile.splits == 1:
        out = {"out": whole}
    else:
        part = (B, K, tile.splits, T * G)
        out = {"sums": jax.ShapeDtypeStruct((*part, H), jnp.float32)}
        out |= {name: jax.ShapeDtypeStruct(part, jnp.float32) for name in ("largest", "total")}
    found = launch(
        functools.partial(_kernel, names=(*given, *out), shape=shape),
        *given.values(),
        name="decode_attention" if shape.few else "prefill_attention",
        out=tuple(out.values()),
        grid=(blocks * tile.splits, K, B),
        warps=tile.warps,
        stages=tile.stages,
    )
    if tile.splits == 1:
        return found[0]
    return launch(
        functools.partial(_reduce, shape=shape),
        *found,
        name="decode_reduce",
        out=whole,
        grid=(B, K, T * G),
        warps=max(1, tile.splits * shape.width // 1024),
    )


def _attention_forward(scale, soft_cap, *arrays):
    return _attention(scale, soft_cap, *arrays), arrays


def _attention_backward(scale, soft_cap, arrays, gradient):
    def run(q, cache, rows, positions, window):
        return reference.attention(q, cache, rows=rows, positions=positions, scale=scale, soft_cap=soft_cap, window=window)

    return jax.vjp(run, *arrays)[1](gradient)


_attention.defvjp(_attention_forward, _attention_backward)


def _kernel(*refs, names, shape):
    ref = dict(zip(names, refs, strict=True))
    tile = shape.tile
    part, head, b = (pl.program_id(axis) for axis in range(3))
    row = b if "rows" not in ref else ref["rows"][b]
    # with one split a part is a block of queries, else a split of the keys; the blocks that see most keys start first
    split = part if tile.splits > 1 else 0
    queries = jnp.arange(tile.queries)
    if shape.blocks > 1:
        queries += (shape.blocks - 1 - part) * tile.queries
    asked = queries < shape.queries * shape.group
    token, member = queries // shape.group, queries % shape.group
    at = triton.load(ref["positions"].at[jnp.broadcast_to(b, queries.shape), token], mask=asked, other=-1)

    block = (tile.queries, shape.width)
    across = lax.broadcasted_iota(jnp.int32, block, 1)
    down = lambda a: jnp.broadcast_to(a[:, None], block)
    inside = (across < shape.size) & asked[:, None]
    where = (jnp.broadcast_to(b, block), down(token), down(head * shape.group + member), across)
    q = triton.load(ref["q"].at[where], mask=inside, other=0.0).astype(jnp.float32) * shape.scale

    # the keys that any of the queries sees, in equal parts of whole steps
    end = jnp.minimum(jnp.max(at) + 1, shape.tokens)
    begin, window = jnp.int32(0), None
    if "window" in ref:
        window = ref["window"][0]
        first = jnp.min(jnp.where(asked, at, shape.tokens))
        # first - window + 1, which may not be computed so: a window of 2^31 - 1 would leave int32 where first is -1
        begin = jnp.where(first >= window, first - window + 1, 0)
        begin = begin // tile.keys * tile.keys  # aligned loads
    steps = (jnp.maximum(end - begin, 0) + tile.keys - 1) // tile.keys
    each = (steps + tile.splits - 1) // tile.splits
    begin += split * each * tile.keys
    count = jnp.minimum(each, jnp.maximum(steps - split * each, 0))

    def load(name, start, keys):
        if ref[name].ndim == 3:
            return triton.load(ref[name].at[row, head, pl.ds(start, tile.keys)], mask=keys < end, other=0.0)
        mask = (keys < end)[:, None] & (jnp.arange(shape.width) < shape.size)[None]
        return triton.load(ref[name].at[row, head, pl.ds(start, tile.keys), pl.ds(0, shape.width)], mask=mask, other=0)

    dot = functools.partial(_dot, twice=shape.few)

    def step(i, carry, masked=True):
        sums, largest, total = carry
        start = begin + i * tile.keys
        keys = start + jnp.arange(tile.keys)
        scores = dot(q, load("k", start, keys), across=True)
        if "k_scale" in ref:
            scores = scores * load("k_scale", start, keys)[None]
        if shape.soft_cap is not None:
            scores = shape.soft_cap * jnp.tanh(scores / shape.soft_cap)
        scores = scores * LOG2_E
        if masked:
            seen = keys[None] <= at[:, None]
            if window is not None:
                seen &= at[:, None] - keys[None] < window
            scores = jnp.where(seen, scores, NOTHING)
        new = jnp.maximum(largest, jnp.max(scores, 1))
        weights = jnp.exp2(scores - new[:, None])
        if masked:
            weights = jnp.where(seen, weights, 0.0)  # where a row sees nothing yet, largest is NOTHING too
        shrink = jnp.exp2(largest - new)
        total = total * shrink + jnp.sum(weights, 1)
        if "v_scale" in ref:
            weights = weights * load("v_scale", start, keys)[None]
        return sums * shrink[:, None] + dot(weights, load("v", start, keys), across=False), new, total

    empty = jnp.zeros(block, jnp.float32), jnp.full(tile.queries, NOTHING, jnp.float32), jnp.zeros(tile.queries, jnp.float32)
    free = jnp.int32(0)
    if shape.blocks > 1 and window is None:
        # steps of keys that every query of the block sees; rows that are not asked are not stored
        free = jnp.minimum((jnp.min(jnp.where(asked, at, shape.tokens)) + 1) // tile.keys, count)
        empty = lax.fori_loop(0, free, functools.partial(step, masked=False), empty)
    sums, largest, total = lax.fori_loop(free, count, step, empty)
    if "out" in ref:
        triton.store(ref["out"].at[where], sums / jnp.where(total == 0, 1.0, total)[:, None], mask=inside)
        return
    place = (b, head, split, pl.ds(0, tile.queries))
    triton.store(ref["sums"].at[*place, pl.ds(0, shape.width)], sums, mask=inside)
    triton.store(ref["largest"].at[place], largest, mask=asked)
    triton.store(ref["total"].at[place], total, mask=asked)


def _dot(a, b, *, across, twice):
    """a float32 [M, x] times b, [n, x] where across, else [x, n], in the cache's dtype, accumulated in float32.

    int8 levels are exact in bfloat16. twice: what they multiply is given in two parts, 16 bits of it, where products cost nothing.
    """
    transposed = (((1,), (1 if across else 0,)), ((), ()))
    run = functools.partial(
        lax.dot_general,
        dimension_numbers=transposed,
        preferred_element_type=jnp.float32,
        precision=kernel_precision(b.dtype),
    )
    if b.dtype != jnp.int8:
        return run(a.astype(b.dtype), b)
    b, high = b.astype(jnp.bfloat16), a.astype(jnp.bfloat16)
    if not twice:
        return run(high, b)
    return run(high, b) + run((a - high.astype(jnp.float32)).astype(jnp.bfloat16), b)


def _reduce(sums_ref, largest_ref, total_ref, out_ref, *, shape):
    b, head, query = (pl.program_id(axis) for axis in range(3))
    splits = shape.tile.splits
    largest = largest_ref[b, head, pl.ds(0, splits), query]
    total = total_ref[b, head, pl.ds(0, splits), query]
    weights = jnp.exp2(largest - jnp.max(largest, 0))
    mask = jnp.broadcast_to((jnp.arange(shape.width) < shape.size)[None], (splits, shape.width))
    sums = triton.load(sums_ref.at[b, head, pl.ds(0, splits), query, pl.ds(0, shape.width)], mask=mask, other=0.0)
    whole = jnp.sum(weights * total, 0)
    out = jnp.sum(sums * weights[:, None], 0) / jnp.where(whole == 0, 1.0, whole)
    where = (b, query // shape.group, head * shape.group + query % shape.group, pl.ds(0, shape.width))
    triton.store(out_ref.at[where], out, mask=jnp.arange(shape.width) < shape.size)
