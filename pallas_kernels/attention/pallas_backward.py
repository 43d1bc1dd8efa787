"""The gradient of `attention.pallas`: the scores are made again block by block, and no array is larger than the operands.

    p = exp(s - lse)        dv = p^T do        ds = p (do v^T - delta)        dq = ds k        dk = ds^T q        delta = sum(do o)

One launch has a block of queries a program and gives dq, another a block of keys and gives dk and dv, so that nothing is added across
programs. Source: Dao 2023, arXiv:2307.08691.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.attention.pallas_kernel import (
    Shape,
    biased,
    capped,
    dot,
    heads_at,
    heads_of,
    numbers_of,
    queries_of,
    seen,
    span,
)
from pallas_kernels.attention.reference import distance_bias
from pallas_kernels.attention.terms import last_keys
from pallas_kernels.kernel_math import LOG2_E, exp2, masked_slice, power_of_two
from pallas_kernels.launch import launch
from pallas_kernels.tuning import tile_for

FAR = 1 << 30  # beyond every position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """queries, keys: of a block or a step, powers of two of at least 16. warps: of 32 threads. stages: of loads that are under way."""

    queries: int
    keys: int
    warps: int
    stages: int


def heuristic(*, size: int, dtype, group: int, relative: bool) -> Tile:
    """Two blocks of sums stay in registers: small steps for wide heads, for exact products, and where each score looks up its bias; heads
    of 128 that have their own keys spill on an H100 by 64 queries, and groups that are no power of two on an A100."""
    width = power_of_two(size)
    if dtype == jnp.float32:
        return Tile(queries=16, keys=16, warps=8 if width > 128 else 4, stages=1)
    if width > 128:
        return Tile(queries=16, keys=32, warps=8, stages=1)
    crowded = (group == 1 and width > 64) or group & (group - 1)
    return Tile(queries=32 if relative or crowded else 64, keys=32 if relative else 64, warps=8, stages=1)


def gradients(q, k, v, gradient, *, operands, out, lse, scale, soft_cap, terms) -> dict[str, jax.Array]:
    """What q, k, v and the terms are to be changed by.

    q, gradient, out: [B, T, N, H]. k, v: [B, K, S, H]. lse: base-2 logarithms of the sums of the softmax, float32 [B, T, N]. operands:
    positions, window and terms by their names. Returns float32 arrays "q", "k", "v" and those of the terms' floats.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    sizes = {"queries": T * (N // K), "tokens": S, "head_dim": H, "dtype": str(k.dtype)}
    tile = tile_for(
        "attention_backward", heuristic(size=H, dtype=k.dtype, group=N // K, relative=terms.relative is not None), **sizes
    )
    shape = Shape(
        queries=T,
        group=N // K,
        size=H,
        tokens=S,
        page=S,
        scale=scale,
        soft_cap=soft_cap,
        causal=terms.causal,
        reach=terms.reach,
        width=max(16, power_of_two(H)),
        blocks=-(-T * (N // K) // tile.queries),
        few=False,
        tile=tile,
    )
    delta = jnp.sum(gradient * out, -1)
    given = {"q": q, "k": k, "v": v, "gradient": gradient, "lse": lse, "delta": delta} | operands
    given.pop("sinks", None)  # they are in lse
    run = functools.partial(_launch, shape=shape)
    found = run(_dq_kernel, given, {"dq": q.shape}, name="attention_dq", grid=(shape.blocks, K, B))
    spans = _query_blocks(operands["positions"], operands.get("window"), shape)
    given["spans"] = spans
    found |= run(_dkv_kernel, given, {"dk": k.shape, "dv": v.shape}, name="attention_dkv", grid=(spans.shape[-1], K, B))
    done = {"q": found["dq"], "k": found["dk"], "v": found["dv"]}
    if terms.sinks is not None:
        share = jnp.exp2(terms.sinks.astype(jnp.float32) * LOG2_E - lse)
        done["sinks"] = -jnp.sum(share * delta, (0, 1))
    if terms.slopes is not None or terms.relative is not None:
        done |= _of_distances(q, k, v, gradient, lse, delta, operands, scale, soft_cap, terms)
    return done


def _launch(kernel, given, out, *, shape, name, grid):
    found = launch(
        functools.partial(kernel, names=(*given, *out), shape=shape),
        *given.values(),
        name=name,
        out=tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in out.values()),
        grid=grid,
        warps=shape.tile.warps,
        stages=shape.tile.stages,
    )
    return dict(zip(out, found, strict=True))


def _query_blocks(positions, window, shape: Shape) -> jax.Array:
    """Per block of keys the first block of queries that may see one of them and the one after the last, int32 [B, 2, blocks]; exact where
    positions ascend, and never too few."""
    tile, B = shape.tile, positions.shape[0]
    blocks = -(-shape.tokens // tile.keys)
    start = jnp.arange(blocks, dtype=jnp.int32) * tile.keys
    whole = jnp.broadcast_to(jnp.array([[0], [shape.blocks]], jnp.int32), (B, 2, blocks))
    if not shape.causal and window is None:
        return whole
    rows = jnp.repeat(positions, shape.group, axis=1)
    pad = [(0, 0), (0, shape.blocks * tile.queries - rows.shape[1])]
    parts = lambda fill: jnp.pad(rows, pad, constant_values=fill).reshape(B, shape.blocks, tile.queries)
    # the highest position up to a block and the lowest from a block on both ascend: what is below a bound is counted
    highest = lax.cummax(jnp.max(parts(-1), -1), axis=1)
    lowest = lax.cummin(jnp.min(parts(FAR), -1), axis=1, reverse=True)
    count = lambda ends, bound: jnp.sum(ends[:, None] < bound[None, :, None], -1, dtype=jnp.int32)
    width = None if window is None else jnp.minimum(window[0], FAR // 2)
    first = count(highest, start if shape.causal else start - width + 1)
    last = whole[:, 1] if width is None else count(lowest, start + tile.keys - 1 + width)
    return jnp.stack([first, last], 1)


def _dq_kernel(*refs, names, shape):
    ref = dict(zip(names, refs, strict=True))
    tile = shape.tile
    part, head, b = (pl.program_id(axis) for axis in range(3))
    queries = queries_of(ref, shape, b, head, (shape.blocks - 1 - part) * tile.queries, tile.queries)
    q = heads_of(ref, "q", queries, shape, b) * shape.scale
    gradient = heads_of(ref, "gradient", queries, shape, b)
    lse, delta = numbers_of(ref, "lse", queries, b), numbers_of(ref, "delta", queries, b)
    begin, end = span(ref, shape, queries, tile.keys)
    column = lambda a: a[:, None]

    def step(i, total):
        keys = begin + i * tile.keys + jnp.arange(tile.keys)
        k, v = (_keys(ref[name], shape, b, head, begin + i * tile.keys, keys < end) for name in ("k", "v"))
        scores, bend = capped(dot(q, k, across=True), shape)
        scores = biased(scores, ref, shape, queries, keys[None], column)
        kept = seen(ref, shape, queries, keys[None], column)
        weights = jnp.where(kept, exp2(scores * LOG2_E - lse[:, None]), 0.0)
        change = weights * (dot(gradient, v, across=True) - delta[:, None])
        return total + dot(change if bend is None else change * bend, k, across=False)

    steps = (jnp.maximum(end - begin, 0) + tile.keys - 1) // tile.keys
    total = lax.fori_loop(0, steps, step, jnp.zeros((tile.queries, shape.width), jnp.float32))
    where, inside = heads_at(queries, shape, b)
    triton.store(ref["dq"].at[where], total * shape.scale, mask=inside)


def _dkv_kernel(*refs, names, shape):
    ref = dict(zip(names, refs, strict=True))
    tile = shape.tile
    part, head, b = (pl.program_id(axis) for axis in range(3))
    start = part * tile.keys
    keys = start + jnp.arange(tile.keys)
    k, v = (_keys(ref[name], shape, b, head, start, keys < shape.tokens) for name in ("k", "v"))
    row = lambda a: a[None]

    def step(i, carry):
        dk, dv = carry
        queries = queries_of(ref, shape, b, head, i * tile.queries, tile.queries)
        q = (heads_of(ref, "q", queries, shape, b) * shape.scale).astype(k.dtype)
        gradient = heads_of(ref, "gradient", queries, shape, b).astype(k.dtype)
        lse, delta = numbers_of(ref, "lse", queries, b), numbers_of(ref, "delta", queries, b)
        scores, bend = capped(dot(k, q, across=True), shape)  # [keys, queries]
        scores = biased(scores, ref, shape, queries, keys[:, None], row)
        kept = seen(ref, shape, queries, keys[:, None], row)
        weights = jnp.where(kept, exp2(scores * LOG2_E - lse[None]), 0.0)
        change = weights * (dot(v, gradient, across=True) - delta[None])
        change = change if bend is None else change * bend
        return dk + dot(change, q, across=False), dv + dot(weights, gradient, across=False)

    zeros = jnp.zeros((tile.keys, shape.width), jnp.float32)
    dk, dv = lax.fori_loop(ref["spans"][b, 0, part], ref["spans"][b, 1, part], step, (zeros, zeros))
    inside = (keys < shape.tokens)[:, None] & (jnp.arange(shape.width) < shape.size)[None]
    for name, value in (("dk", dk), ("dv", dv)):
        triton.store(ref[name].at[b, head, pl.ds(start, tile.keys), masked_slice(0, shape.width)], value, mask=inside)


def _keys(ref, shape: Shape, b, head, start, inside):
    mask = inside[:, None] & (jnp.arange(shape.width) < shape.size)[None]
    place = (b, head, pl.ds(start, shape.tile.keys), masked_slice(0, shape.width))
    return triton.load(ref.at[place], mask=mask, other=0)


def _of_distances(q, k, v, gradient, lse, delta, operands, scale, soft_cap, terms) -> dict[str, jax.Array]:
    """Gradients of slopes and relative biases, by XLA and a few query tokens at a time: what adds to one number lies along a diagonal."""
    B, T, N, _ = q.shape
    K, S = k.shape[1:3]
    size = min(T, 16)
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    k, v, keys = k.astype(jnp.float32), v.astype(jnp.float32), jnp.arange(S, dtype=jnp.int32)
    window = operands.get("window")

    def blocks(a, fill=0):
        a = jnp.pad(a, [(0, 0), (0, -T % size)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)
        return jnp.moveaxis(a.reshape(B, -1, size, *a.shape[2:]), 1, 0)

    last = last_keys(terms, operands["positions"], S)

    def step(totals, block):
        q, gradient, lse, delta, at, last = block
        heads = lambda a: a.reshape(B, size, K, N // K, -1)
        scores = exact("btkgh,bksh->bkgts", heads(q) * scale, k).reshape(B, N, size, S)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if (bias := distance_bias(terms, at, keys)) is not None:
            scores = scores + bias
        kept, distance = keys <= last[..., None], keys - at[..., None]
        if window is not None:
            kept &= (-distance if terms.causal else jnp.abs(distance)) < window[0]
        by_head = lambda a: jnp.moveaxis(a, 2, 1)[..., None]
        weights = jnp.where(kept[:, None], jnp.exp2(scores * LOG2_E - by_head(lse)), 0.0)
        change = exact("btkgh,bksh->bkgts", heads(gradient), v).reshape(B, N, size, S)
        change = weights * (change - by_head(delta))
        totals = dict(totals)
        if "slopes" in totals:
            totals["slopes"] -= jnp.sum(change * jnp.abs(distance)[:, None], (0, 2, 3))
        if "relative" in totals:
            place = jnp.clip(distance, -terms.reach, terms.reach) + terms.reach
            totals["relative"] = totals["relative"].at[:, place].add(jnp.moveaxis(change, 1, 0))
        return totals, None

    start = {n: jnp.zeros(getattr(terms, n).shape, jnp.float32) for n in ("slopes", "relative") if n in terms.given}
    operand = (blocks(q), blocks(gradient), blocks(lse), blocks(delta), blocks(operands["positions"]), blocks(last, -1))
    return lax.scan(step, start, operand)[0]
