"""Routing and sorting of tokens for NVIDIA GPUs through Pallas and Triton.

A block holds the scores of some tokens in registers, and chooses their experts one after the other. Where it holds all tokens, as in
decoding, it counts and orders them too, so that one launch does it all. Many choices are counted by a launch of their own, each block
its part; a second one puts each behind those of lesser experts, and of its own in parts before.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.kernel_math import masked_slice, power_of_two
from pallas_kernels.launch import gpu_refusal, launch
from pallas_kernels.moe import reference
from pallas_kernels.moe.routing import Routing, Sorted
from pallas_kernels.tuning import tile_for

ELEMENTS = 4096  # of a block's scores
BLOCKS = 128  # that many tokens are spread over: about as many as there are processors
FEW = 4  # steps of choices that one block sorts alone
TAKEN = -(2**31)  # less than any key
LEAST_KEY = -0x7F800001  # of minus infinity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """tokens: of a block, a power of two. warps: of 32 threads."""

    tokens: int
    warps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SortTile:
    """step: choices that a block looks at together. choices: of a block, one step or several. Powers of two. warps: of 32 threads."""

    step: int
    choices: int
    warps: int


def heuristic(tokens: int, columns: int) -> Tile:
    """All tokens in one block where they fit, else about as many blocks as there are processors; 16 elements a thread."""
    most = max(1, ELEMENTS // columns)
    rows = power_of_two(tokens) if tokens <= most else min(most, power_of_two(tokens // BLOCKS))
    return Tile(tokens=rows, warps=max(1, min(8, rows * columns // 512)))


def sort_heuristic(choices: int, count: int) -> SortTile:
    """One block for few steps, else a block for each part."""
    columns = power_of_two(count)
    step = max(1, min(256, ELEMENTS // columns, power_of_two(choices)))
    steps = -(-choices // step)
    part = power_of_two(steps if steps <= FEW else -(-steps // BLOCKS))
    return SortTile(step=step, choices=step * part, warps=max(1, min(8, step * columns // 512)))


def supports_route(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there is nothing to route"
    columns = _columns(facts["shape"][1], facts["groups"])
    return True if columns <= ELEMENTS else f"scores of a token fill {columns} places, of {ELEMENTS} that a block has"


def supports_sort_tokens(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there is nothing to sort"
    count = facts["count"]
    return True if count <= ELEMENTS else f"a block counts {ELEMENTS} experts at most, not {count}"


def _columns(experts: int, groups: int) -> int:
    """Places of a token's scores: groups, and the experts of each, up to powers of two."""
    return power_of_two(groups) * power_of_two(experts // groups)


def route(logits, bias, **static) -> Routing:
    return _route(logits, bias, tuple(sorted(static.items())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _route(logits, bias, static):
    tokens, experts = logits.shape
    how = dict(static)
    used = how["experts_per_token"]
    columns = _columns(experts, how["groups"])
    tile = tile_for("route", heuristic(tokens, columns), tokens=tokens, experts=experts, used=used, groups=how["groups"])
    blocks = -(-tokens // tile.tokens)
    given = {"logits": logits} | ({} if bias is None else {"bias": bias})
    whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    out = {"experts": whole(tokens, used), "weights": jax.ShapeDtypeStruct((tokens, used), jnp.float32)}
    if blocks == 1:
        out |= {"tokens": whole(tokens * used), "places": whole(tokens, used), "sizes": whole(experts)}
    kernel = functools.partial(_choose, names=(*given, *out), rows=tile.tokens, tokens=tokens, total=experts, **how)
    made = launch(kernel, *given.values(), name="route", out=tuple(out.values()), grid=(blocks,), warps=tile.warps)
    found = dict(zip(out, made, strict=True))
    chosen = {name: found.pop(name) for name in ("experts", "weights")}
    return Routing(**chosen, rows=Sorted(**found) if found else None)


def _forward(logits, bias, static):
    return _route(logits, bias, static), (logits, bias)


def _backward(static, saved, gradient):
    weights = lambda logits, bias: reference.route(logits, bias, **dict(static)).weights
    return jax.vjp(weights, *saved)[1](gradient.weights)


_route.defvjp(_forward, _backward)


def _choose(
    *refs,
    names,
    rows,
    tokens,
    total,
    experts_per_token,
    scoring,
    normalise,
    scale,
    groups,
    kept_groups,
    group_score,
):
    ref = dict(zip(names, refs, strict=True))
    each = total // groups
    wide, width = power_of_two(groups), power_of_two(each)
    column = jnp.arange(wide * width)
    group, lane = lax.div(column, width), lax.rem(column, width)
    there = (group < groups) & (lane < each)
    expert_at = lambda column: column if each == width else lax.div(column, width) * each + lax.rem(column, width)
    expert = expert_at(column)
    row = pl.program_id(0) * rows + jnp.arange(rows)
    kept = row < tokens
    block = (rows, wide * width)
    spread = lambda a: jnp.broadcast_to(a[:, None], block)
    along = lambda a: jnp.broadcast_to(a[None], block)

    place = (spread(row), along(expert))
    x = triton.load(ref["logits"].at[place], mask=spread(kept) & along(there), other=0.0).astype(jnp.float32)
    if scoring == "softmax":
        x = jnp.where(along(there), x, -jnp.inf)
        e = jnp.exp(x - jnp.max(x, 1, keepdims=True))
        scores = e / jnp.sum(e, 1, keepdims=True)
    else:
        scores = 1 / (1 + jnp.exp(-x))
    wanted = scores
    if "bias" in ref:
        wanted = wanted + triton.load(ref["bias"].at[expert], mask=there, other=0.0).astype(jnp.float32)[None]
    key = _key(wanted)
    if groups > 1:
        parts = jnp.where(along(there), wanted, -jnp.inf).reshape(rows, wide, width)
        best = jnp.max(parts, 2)
        if group_score == "top2":
            first = jnp.argmax(parts, 2)
            others = jnp.where(jnp.arange(width)[None, None] == first[:, :, None], -jnp.inf, parts)
            best = best + jnp.max(others, 2)
        number = jnp.arange(wide)
        of_group = jnp.where((number < groups)[None], _key(best), TAKEN)
        mine, other = of_group[:, :, None], of_group[:, None, :]
        better = (other > mine) | ((other == mine) & (number[None, None, :] < number[None, :, None]))
        keep = jnp.sum(better.astype(jnp.int32), 2) < kept_groups
        key = jnp.where(keep[:, :, None], key.reshape(rows, wide, width), LEAST_KEY).reshape(block)

    left = jnp.where(along(there), key, TAKEN)
    chosen, weights = [], []
    for _ in range(experts_per_token):
        at = jnp.argmax(left, 1)  # of equal ones the first
        mine = along(column) == spread(at)
        weights.append(jnp.sum(jnp.where(mine, scores, 0.0), 1))
        left = jnp.where(mine, TAKEN, left)
        chosen.append(at)
    by = scale / functools.reduce(jnp.add, weights) if normalise else scale
    slot = lambda j: (row, jnp.full((rows,), j, jnp.int32))
    for j, (at, weight) in enumerate(zip(chosen, weights, strict=True)):
        triton.store(ref["experts"].at[slot(j)], expert_at(at), mask=kept)
        triton.store(ref["weights"].at[slot(j)], weight * by, mask=kept)
    if "places" not in ref:
        return
    took = ((left == TAKEN) & along(there) & spread(kept)).astype(jnp.int32)
    sizes = jnp.sum(took, 0)
    # columns are in the order of experts
    target = (jnp.cumsum(sizes) - sizes)[None] + jnp.cumsum(took, 0) - took
    triton.store(ref["sizes"].at[expert], sizes, mask=there)
    for j, at in enumerate(chosen):
        to = jnp.sum(jnp.where(along(column) == spread(at), target, 0), 1)
        triton.store(ref["places"].at[slot(j)], to, mask=kept)
        _scatter(ref["tokens"], to, row, kept)


def _key(x):
    """int32 in the order of floats; what is no number comes last or first, and no key is TAKEN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.maximum(jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), TAKEN + 1)


def _scatter(ref, at, values, mask):
    """ref[at] = values where the mask says so. The interpreter writes back what was at the other places, which must be none of these."""
    triton.store(ref.at[jnp.where(mask, at, ref.shape[0])], values, mask=mask)


def sort_tokens(experts, *, count) -> Sorted:
    size = experts.size
    tile = tile_for("sort_tokens", sort_heuristic(size, count), choices=size, count=count)
    parts = -(-size // tile.choices)
    run = functools.partial(launch, grid=(parts,), warps=tile.warps)
    static = {"tile": tile, "size": size, "count": count}
    given = {"experts": experts.reshape(-1).astype(jnp.int32)}
    whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    if parts > 1:
        given["counts"] = run(functools.partial(_count, **static), *given.values(), name="count", out=whole(parts, count))
    out = {"tokens": whole(size), "places": whole(size), "sizes": whole(count)}
    kernel = functools.partial(_place, names=(*given, *out), used=experts.shape[1], parts=parts, **static)
    found = dict(zip(out, run(kernel, *given.values(), name="sort", out=tuple(out.values())), strict=True))
    return Sorted(tokens=found["tokens"], places=found["places"].reshape(experts.shape), sizes=found["sizes"])


def _step(experts_ref, part, i, *, tile, size, count):
    """A step of a part: the number of each choice, and for each expert whether it is meant, int32 [step, columns]."""
    at = part * tile.choices + i * tile.step + jnp.arange(tile.step)
    expert = triton.load(experts_ref.at[at], mask=at < size, other=-1)
    return at, (expert[:, None] == jnp.arange(power_of_two(count))[None]).astype(jnp.int32)


def _counted(experts_ref, part, **static):
    """int32 [columns]: choices of each expert in a part."""
    tile = static["tile"]
    add = lambda i, total: total + jnp.sum(_step(experts_ref, part, i, **static)[1], 0)
    return lax.fori_loop(0, tile.choices // tile.step, add, jnp.zeros(power_of_two(static["count"]), jnp.int32))


def _count(experts_ref, counts_ref, **static):
    part, columns = pl.program_id(0), power_of_two(static["count"])
    inside = jnp.arange(columns) < static["count"]
    triton.store(counts_ref.at[part, masked_slice(0, columns)], _counted(experts_ref, part, **static), mask=inside)


def _place(*refs, names, used, parts, **static):
    ref = dict(zip(names, refs, strict=True))
    tile, size, count = static["tile"], static["size"], static["count"]
    part, columns = pl.program_id(0), power_of_two(count)
    column = jnp.arange(columns)
    before = jnp.zeros(columns, jnp.int32)
    if "counts" in ref:
        rows = min(tile.step, power_of_two(parts))

        def add(i, carry):
            other = i * rows + jnp.arange(rows)
            at = (jnp.broadcast_to(other[:, None], (rows, columns)), jnp.broadcast_to(column[None], (rows, columns)))
            found = triton.load(ref["counts"].at[at], mask=(other < parts)[:, None] & (column < count)[None], other=0)
            earlier = jnp.where((other < part)[:, None], found, 0)
            return carry[0] + jnp.sum(found, 0), carry[1] + jnp.sum(earlier, 0)

        sizes, before = lax.fori_loop(0, -(-parts // rows), add, (before, before))
    else:
        sizes = _counted(ref["experts"], part, **static)

    def put(i, start):
        at, mine = _step(ref["experts"], part, i, **static)
        to = jnp.sum(mine * (start[None] + jnp.cumsum(mine, 0) - 1), 1)
        triton.store(ref["places"].at[at], to, mask=at < size)
        _scatter(ref["tokens"], to, lax.div(at, used), at < size)
        return start + jnp.sum(mine, 0)

    lax.fori_loop(0, tile.choices // tile.step, put, jnp.cumsum(sizes) - sizes + before)
    triton.store(ref["sizes"].at[masked_slice(0, columns)], sizes, mask=(part == 0) & (column < count))
