"""Latent attention for NVIDIA GPUs through Pallas and Triton, for decoding.

A step of the cache is read once for all heads of a block, and serves as keys and as values. The tokens that a sequence sees are split over
blocks, and a second launch weighs their partial sums. These are what the processors' accumulators hold: `queries` rows of a latent vector
for each block that runs. They are written as bfloat16 where the cache has no more bits, and read again at once, from the L2.

How many bytes they are depends on the processors and not on the cache: 4.2 MB on an H100 for DeepSeek-V3, 45 % of the cache of one
sequence of 8192 tokens, 2.8 % of sixteen's, and less than 5 % of one's from 74,000 tokens on. To be 5 % of the first they would have to
come from 28 blocks of 16 heads, the fewest that tensor cores multiply, and 104 of 132 processors would do nothing. Blocks of 16 heads
make them half, and ask the L2 for the cache 8 times instead of 4: 76 MB in place of 38. Clusters, whose blocks could add up theirs in each
other's shared memory, are not in Triton through Pallas, whose parameters are warps and stages.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import gpus
from pallas_kernels.attention.pallas_kernel import (
    NOTHING,
    SMALLEST,
    Shape,
    cache_refusal,
    dot_cached,
    heads_at,
    heads_of,
    queries_of,
    reduce,
    seen,
    span,
    zero_of,
)
from pallas_kernels.kernel_math import LOG2_E, exp2, masked_slice, power_of_two
from pallas_kernels.latent_attention import reference
from pallas_kernels.launch import gpu_refusal, launch
from pallas_kernels.target import current_target
from pallas_kernels.tuning import tile_for

WIDEST = 512  # of the latent vector: its sums stay in registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """queries: tokens times heads of a block. keys: of a step. splits: of the tokens of a sequence. warps: of 32 threads. stages: of loads
    that are under way. All but warps and stages are powers of two, of at least 16 for queries and keys."""

    queries: int
    keys: int
    splits: int
    warps: int
    stages: int


def heuristic(*, sequences: int, queries: int, tokens: int, latent: int, dtype, processors: int) -> Tile:
    """As many splits as give each processor a block, of at least two steps each; exact products in small blocks, and 8 bits in small
    steps: 32 tokens of them spill."""
    exact = dtype == jnp.float32
    rows = SMALLEST if exact else min(32, max(SMALLEST, power_of_two(queries)))
    keys = SMALLEST if exact or dtype.itemsize == 1 else 32
    wanted = power_of_two(processors // (sequences * -(-queries // rows)) // 2 + 1)
    splits = max(1, min(wanted, power_of_two(tokens) // (2 * keys)))
    return Tile(queries=rows, keys=keys, splits=splits, warps=8 if latent > 256 else 4, stages=2)


def sums_dtype(cache_dtype) -> jnp.dtype:
    """Of partial sums: bfloat16 has the range of float32, and 8 bits as the cache's own, which none but the last sum is rounded to."""
    rounded = cache_dtype == jnp.bfloat16 or jnp.dtype(cache_dtype).itemsize == 1
    return jnp.dtype(jnp.bfloat16 if rounded else jnp.float32)


def supports_latent_attention(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there is nothing to attend"
    if facts["values"] > WIDEST:
        return f"sums of {facts['values']} elements do not fit the registers of a block, at most {WIDEST} do"
    return cache_refusal(target, facts) or True


def latent_attention(q, cache, *, values, positions, scale, rows, scales):
    return _latent(values, scale, q, cache, positions, rows, scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _latent(values, scale, q, cache, positions, rows, scales):
    B, T, N, H = q.shape
    S, paged = cache.shape[1], rows is not None and rows.ndim == 2
    tokens = S * rows.shape[1] if paged else S
    key = {"sequences": B, "queries": T * N, "tokens": tokens, "latent": values}
    processors = gpus.describe(current_target().device_kind).processors
    default = heuristic(**key, dtype=cache.dtype, processors=processors)
    tile = tile_for("latent_attention", default, **key, dtype=str(cache.dtype))
    if paged:
        tile = dataclasses.replace(tile, keys=min(tile.keys, S))
    shape = Shape(
        queries=T,
        group=N,
        size=values,
        tokens=tokens,
        page=S,
        scale=scale,
        soft_cap=None,
        causal=True,
        reach=0,
        width=max(SMALLEST, power_of_two(values)),
        blocks=-(-T * N // tile.queries),
        few=True,
        tile=tile,
    )
    given = {"q": q, "positions": positions, "cache": cache}
    given |= {} if rows is None else {"tables" if paged else "rows": rows.astype(jnp.int32)}
    given |= {} if scales is None else {"scales": scales}
    part = (B, 1, tile.splits, T * N)
    out = {name: jax.ShapeDtypeStruct(part, jnp.float32) for name in ("largest", "total")}
    out["sums"] = jax.ShapeDtypeStruct((*part, values), sums_dtype(cache.dtype))
    found = launch(
        functools.partial(_kernel, names=(*given, *out), shape=shape, rotated=H - values),
        *given.values(),
        name="latent_attention",
        out=tuple(out.values()),
        grid=(shape.blocks, tile.splits, B),
        warps=tile.warps,
        stages=tile.stages,
    )
    return launch(
        functools.partial(reduce, names=(*out, "out"), shape=shape),
        *found,
        name="latent_reduce",
        out=jax.ShapeDtypeStruct((B, T, N, values), jnp.float32),
        grid=(B, 1, T * N),
        warps=max(1, tile.splits * shape.width // 1024),
    )


def _forward(values, scale, *arrays):
    return _latent(values, scale, *arrays), arrays


def _backward(values, scale, arrays, gradient):
    def run(q, cache, positions, rows, scales):
        return reference.latent_attention(q, cache, values=values, positions=positions, scale=scale, rows=rows, scales=scales)

    return jax.vjp(run, *arrays)[1](gradient)


_latent.defvjp(_forward, _backward)


def _kernel(*refs, names, shape, rotated):
    ref, tile = dict(zip(names, refs, strict=True)), shape.tile
    block, split, b = (pl.program_id(axis) for axis in range(3))
    row = b if "rows" not in ref else ref["rows"][b]
    queries = queries_of(ref, shape, b, 0, block * tile.queries, tile.queries)
    turned = dataclasses.replace(shape, size=rotated, width=max(SMALLEST, power_of_two(rotated)))
    scale = shape.scale * LOG2_E  # scores are logarithms to base 2 as they come out of the product
    q = heads_of(ref, "q", queries, shape, b) * scale
    q_turned = heads_of(ref, "q", queries, turned, b, first=shape.size) * scale if rotated else None

    begin, end = span(ref, shape, queries, tile.keys)
    steps = (jnp.maximum(end - begin, 0) + tile.keys - 1) // tile.keys
    each = (steps + tile.splits - 1) // tile.splits
    begin += split * each * tile.keys
    count = jnp.minimum(each, jnp.maximum(steps - split * each, 0))
    times = functools.partial(dot_cached, twice=ref["cache"].dtype.itemsize == 1)

    def step(i, carry):
        sums, largest, total = carry
        start = begin + i * tile.keys
        keys = start + jnp.arange(tile.keys)
        at, inside = row, start
        if "tables" in ref:  # a step lies within one page
            at, inside = ref["tables"][b, start // shape.page], start % shape.page

        def load(part, first):
            column, block = jnp.arange(part.width), (tile.keys, part.width)
            token = jnp.broadcast_to((inside + jnp.arange(tile.keys))[:, None], block)
            place = (jnp.broadcast_to(at, block), token, jnp.broadcast_to((first + column)[None], block))
            mask = (keys < end)[:, None] & (column < part.size)[None]
            return triton.load(ref["cache"].at[place], mask=mask, other=zero_of(ref["cache"].dtype))

        latent = load(shape, 0)
        scores = times(q, latent, across=True)
        if rotated:
            scores += times(q_turned, load(turned, shape.size), across=True)
        if "scales" in ref:
            scales = triton.load(ref["scales"].at[at, pl.ds(inside, tile.keys)], mask=keys < end, other=0.0)[None]
            scores = scores * scales
        kept = seen(ref, shape, queries, keys[None], lambda a: a[:, None])
        scores = jnp.where(kept, scores, NOTHING)
        new = jnp.maximum(largest, jnp.max(scores, 1))
        weights = jnp.where(kept, exp2(scores - new[:, None]), 0.0)
        shrink = exp2(largest - new)
        total = total * shrink + jnp.sum(weights, 1)
        if "scales" in ref:
            weights = weights * scales
        return sums * shrink[:, None] + times(weights, latent, across=False), new, total

    rows = tile.queries
    state = jnp.zeros((rows, shape.width), jnp.float32), jnp.full(rows, NOTHING, jnp.float32), jnp.zeros(rows, jnp.float32)
    sums, largest, total = lax.fori_loop(0, count, step, state)
    _, inside = heads_at(queries, shape, b)
    place = (b, jnp.int32(0), split, pl.ds(block * rows, rows))
    triton.store(ref["sums"].at[*place, masked_slice(0, shape.width)], sums.astype(ref["sums"].dtype), mask=inside)
    triton.store(ref["largest"].at[place], largest, mask=queries.asked)
    triton.store(ref["total"].at[place], total, mask=queries.asked)
