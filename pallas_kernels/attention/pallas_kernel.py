"""The kernels of `attention.pallas`, forward, and what they share with those of its gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.kernel_math import LOG2_E, exp2, masked_slice
from pallas_kernels.launch import NARROWEST_FP8, kernel_precision
from pallas_kernels.precision import in_bfloat16

SMALLEST = 16  # sides of a tensor core's tile
NOTHING = -1e30  # finite, so that a block that sees nothing gives no NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a kernel is compiled for. queries: tokens of a sequence. tokens: that a sequence may have cached. page: tokens of a row of the
    cache. reach: R of the relative bias. width: of a head, a power of two. blocks: of queries."""

    queries: int
    group: int
    size: int
    tokens: int
    page: int
    scale: float
    soft_cap: float | None
    causal: bool
    reach: int
    width: int
    blocks: int
    few: bool
    tile: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queries:
    """Rows of a block, tokens times heads of a group: which of them there are, their tokens and heads, positions and last keys."""

    asked: jax.Array
    token: jax.Array
    head: jax.Array
    at: jax.Array
    last: jax.Array


def cache_refusal(target, facts) -> str | None:
    """Why a GPU cannot read a cache of this dtype in pages of so many tokens, or None."""
    page, dtype = facts["tokens"], facts["cache_dtype"]
    if facts["paged"] and (page < SMALLEST or page & (page - 1)):
        return f"it takes pages of 16, 32, 64 and further powers of two tokens, not of {page}"
    if "float8" in dtype and target.capability is not None and target.capability < NARROWEST_FP8:
        return f"{target.device_kind} cannot convert from {dtype}"
    return None


def queries_of(ref, shape: Shape, b, kv_head, first, count: int) -> Queries:
    """The rows first .. first + count of a kv head."""
    row = first + jnp.arange(count)
    asked = row < shape.queries * shape.group
    token, member = row // shape.group, row % shape.group
    at = jnp.where(asked, token, -1)
    if "positions" in ref:
        at = triton.load(ref["positions"].at[jnp.broadcast_to(b, row.shape), token], mask=asked, other=-1)
    end = jnp.int32(shape.tokens) if "lengths" not in ref else jnp.minimum(ref["lengths"][b], shape.tokens)
    last = jnp.minimum(at, end - 1) if shape.causal else jnp.where(asked, end - 1, -1)
    return Queries(asked=asked, token=token, head=kv_head * shape.group + member, at=at, last=last)


def heads_at(queries: Queries, shape: Shape, b, first: int = 0):
    """Where the heads of these rows lie in an array [B, T, N, H], from element `first` on, and what of a block [rows, width] is in it."""
    block = (queries.token.shape[0], shape.width)
    across = lax.broadcasted_iota(jnp.int32, block, 1)
    down = lambda a: jnp.broadcast_to(a[:, None], block)
    where = (jnp.broadcast_to(b, block), down(queries.token), down(queries.head), first + across)
    return where, (across < shape.size) & queries.asked[:, None]


def heads_of(ref, name: str, queries: Queries, shape: Shape, b, first: int = 0):
    """Their elements, float32 [rows, width]."""
    where, inside = heads_at(queries, shape, b, first)
    return triton.load(ref[name].at[where], mask=inside, other=0.0).astype(jnp.float32)


def numbers_of(ref, name: str, queries: Queries, b, other: float = 0.0):
    """One number a row, from an array [B, T, N]."""
    where = (jnp.broadcast_to(b, queries.token.shape), queries.token, queries.head)
    return triton.load(ref[name].at[where], mask=queries.asked, other=other)


def per_head(ref, name: str, queries: Queries):
    return triton.load(ref[name].at[queries.head], mask=queries.asked, other=0.0).astype(jnp.float32)


def window_of(ref):
    return None if "window" not in ref else ref["window"][0]


def capped(scores, shape: Shape):
    """Scores under the soft cap, and their derivative by what they were."""
    if shape.soft_cap is None:
        return scores, None
    bent = jnp.tanh(scores / shape.soft_cap)
    return shape.soft_cap * bent, 1 - bent * bent


def biased(scores, ref, shape: Shape, queries: Queries, keys, column):
    """Scores with what their distance adds. column: lays a vector over queries along their axis of `scores`; keys: lie along the other."""
    if "slopes" not in ref and "relative" not in ref:
        return scores
    distance = jnp.broadcast_to(keys - column(queries.at), scores.shape)
    if "slopes" in ref:
        scores = scores - column(per_head(ref, "slopes", queries)) * jnp.abs(distance).astype(jnp.float32)
    if "relative" in ref:
        place = jnp.clip(distance, -shape.reach, shape.reach) + shape.reach
        head = jnp.broadcast_to(column(queries.head), scores.shape)
        mask = jnp.broadcast_to(column(queries.asked), scores.shape)
        scores = scores + triton.load(ref["relative"].at[head, place], mask=mask, other=0.0).astype(jnp.float32)
    return scores


def seen(ref, shape: Shape, queries: Queries, keys, column):
    """Which scores count."""
    answer = keys <= column(queries.last)
    if (window := window_of(ref)) is not None:
        distance = column(queries.at) - keys
        answer &= (distance if shape.causal else jnp.abs(distance)) < window
    return answer


def span(ref, shape: Shape, queries: Queries, step: int):
    """The keys that any of the rows sees: the first, in whole steps so that loads are aligned, and the one after the last."""
    end, begin = jnp.max(queries.last) + 1, jnp.int32(0)
    if (window := window_of(ref)) is not None:
        first = jnp.min(jnp.where(queries.asked, queries.at, shape.tokens))
        # first - window + 1, which may not be computed so: a window of 2^31 - 1 would leave int32 where first is -1
        begin = jnp.where(first >= window, first - window + 1, 0)
        begin = begin // step * step
        if not shape.causal:
            end = jnp.minimum(end, jnp.max(queries.at) + jnp.minimum(window, shape.tokens))
    return begin, end


def dot(a, b, *, across: bool):
    """a [M, x] times b, [n, x] where across, else [x, n], both in b's dtype, accumulated in float32."""
    return lax.dot_general(
        a.astype(b.dtype),
        b,
        (((1,), (1 if across else 0,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=kernel_precision(b.dtype),
    )


def zero_of(dtype):
    """What stands where a load is masked; Triton casts whole numbers to no float8, and no others to int8."""
    return 0 if jnp.issubdtype(dtype, jnp.integer) else 0.0


def dot_cached(a, b, *, across: bool, twice: bool):
    """`dot` of float32 with cached elements. Those of 8 bits are exact in bfloat16; twice: what they multiply is then given in two parts,
    16 bits of it, where products cost nothing, unless float32 may become bfloat16."""
    if b.dtype.itemsize != 1:
        return dot(a, b, across=across)
    b, high = b.astype(jnp.bfloat16), a.astype(jnp.bfloat16)
    if not twice or in_bfloat16():
        return dot(high, b, across=across)
    return dot(high, b, across=across) + dot(a - high.astype(jnp.float32), b, across=across)


def forward(*refs, names, shape):
    ref = dict(zip(names, refs, strict=True))
    tile = shape.tile
    part, head, b = (pl.program_id(axis) for axis in range(3))
    row = b if "rows" not in ref else ref["rows"][b]
    # with one split a part is a block of queries, else a split of the keys; the blocks that see most keys start first
    split = part if tile.splits > 1 else 0
    first = (shape.blocks - 1 - part) * tile.queries if shape.blocks > 1 else 0
    queries = queries_of(ref, shape, b, head, first, tile.queries)
    # scores are logarithms to base 2 as they come out of the product, where nothing bends them or is added
    plain = shape.soft_cap is None and "slopes" not in ref and "relative" not in ref
    q = heads_of(ref, "q", queries, shape, b) * (shape.scale * LOG2_E if plain else shape.scale)
    column = lambda a: a[:, None]

    # in equal parts of whole steps
    begin, end = span(ref, shape, queries, tile.keys)
    steps = (jnp.maximum(end - begin, 0) + tile.keys - 1) // tile.keys
    each = (steps + tile.splits - 1) // tile.splits
    begin += split * each * tile.keys
    count = jnp.minimum(each, jnp.maximum(steps - split * each, 0))

    def load(name, start, keys):
        at, inside = row, start
        if "tables" in ref:  # a step lies within one page
            at, inside = ref["tables"][b, start // shape.page], start % shape.page
        if ref[name].ndim == 3:
            return triton.load(ref[name].at[at, head, pl.ds(inside, tile.keys)], mask=keys < end, other=0.0)
        mask = (keys < end)[:, None] & (jnp.arange(shape.width) < shape.size)[None]
        place = (at, head, pl.ds(inside, tile.keys), masked_slice(0, shape.width))
        return triton.load(ref[name].at[place], mask=mask, other=zero_of(ref[name].dtype))

    times = functools.partial(dot_cached, twice=shape.few)

    def step(i, carry, masked=True):
        sums, largest, total = carry
        start = begin + i * tile.keys
        keys = start + jnp.arange(tile.keys)
        scores = times(q, load("k", start, keys), across=True)
        if "k_scale" in ref:
            scores = scores * load("k_scale", start, keys)[None]
        scores, _ = capped(scores, shape)
        scores = biased(scores, ref, shape, queries, keys[None], column)
        scores = scores if plain else scores * LOG2_E
        if masked:
            kept = seen(ref, shape, queries, keys[None], column)
            scores = jnp.where(kept, scores, NOTHING)
        new = jnp.maximum(largest, jnp.max(scores, 1))
        weights = exp2(scores - new[:, None])
        if masked:
            weights = jnp.where(kept, weights, 0.0)  # where a row sees nothing yet, largest is NOTHING too
        shrink = exp2(largest - new)
        total = total * shrink + jnp.sum(weights, 1)
        if "v_scale" in ref:
            weights = weights * load("v_scale", start, keys)[None]
        return sums * shrink[:, None] + times(weights, load("v", start, keys), across=False), new, total

    rows = tile.queries
    state = jnp.zeros((rows, shape.width), jnp.float32), jnp.full(rows, NOTHING, jnp.float32), jnp.zeros(rows, jnp.float32)
    free = jnp.int32(0)
    if shape.blocks > 1 and "window" not in ref:
        # steps of keys that every query of the block sees; rows that are not asked are not stored
        least = jnp.maximum(jnp.min(jnp.where(queries.asked, queries.last, shape.tokens)) + 1, 0)
        free = jnp.minimum(least // tile.keys, count)
        state = lax.fori_loop(0, free, functools.partial(step, masked=False), state)
    sums, largest, total = lax.fori_loop(free, count, step, state)
    where, inside = heads_at(queries, shape, b)
    if "out" not in ref:
        place = (b, head, split, masked_slice(0, rows))
        triton.store(ref["sums"].at[*place, masked_slice(0, shape.width)], sums, mask=inside)
        triton.store(ref["largest"].at[place], largest, mask=queries.asked)
        triton.store(ref["total"].at[place], total, mask=queries.asked)
        return
    if "sinks" in ref:
        sink = per_head(ref, "sinks", queries) * LOG2_E
        new = jnp.maximum(largest, sink)
        shrink = exp2(largest - new)
        sums, largest, total = sums * shrink[:, None], new, total * shrink + exp2(sink - new)
    triton.store(
        ref["out"].at[where], (sums / jnp.where(total == 0, 1.0, total)[:, None]).astype(ref["out"].dtype), mask=inside
    )
    if "lse" in ref:
        lse = jnp.where(total == 0, -NOTHING, largest + jnp.log2(jnp.where(total == 0, 1.0, total)))
        triton.store(ref["lse"].at[jnp.broadcast_to(b, lse.shape), queries.token, queries.head], lse, mask=queries.asked)


def reduce(*refs, names, shape):
    """The partial sums of the splits, weighed."""
    ref = dict(zip(names, refs, strict=True))
    b, head, query = (pl.program_id(axis) for axis in range(3))
    splits, member = shape.tile.splits, head * shape.group + query % shape.group
    largest = ref["largest"][b, head, masked_slice(0, splits), query]
    total = ref["total"][b, head, masked_slice(0, splits), query]
    top = jnp.max(largest, 0)
    if "sinks" in ref:
        sink = ref["sinks"][member].astype(jnp.float32) * LOG2_E
        top = jnp.maximum(top, sink)
    weights = exp2(largest - top)
    mask = jnp.broadcast_to((jnp.arange(shape.width) < shape.size)[None], (splits, shape.width))
    sums = triton.load(
        ref["sums"].at[b, head, masked_slice(0, splits), query, masked_slice(0, shape.width)], mask=mask, other=0.0
    ).astype(jnp.float32)
    whole = jnp.sum(weights * total, 0)
    if "sinks" in ref:
        whole = whole + jnp.exp2(sink - top)
    out = jnp.sum(sums * weights[:, None], 0) / jnp.where(whole == 0, 1.0, whole)
    where = (b, query // shape.group, member, masked_slice(0, shape.width))
    triton.store(ref["out"].at[where], out.astype(ref["out"].dtype), mask=jnp.arange(shape.width) < shape.size)
