"""Triangle attention for NVIDIA GPUs through Pallas and Triton: a block of scores at a time, forward and backward.

    p = exp(s - lse)        ds = p (do v^T - delta)        delta = sum(do o)
    dq = ds k        dk = ds^T q        dv = p^T do        dbias = sum_i ds

Backward each of the three launches owns what it writes: rows of queries, rows of keys, and blocks of the bias over all i.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.kernel_math import LOG2_E, exp2, masked_slice, power_of_two
from pallas_kernels.launch import gpu_refusal, kernel_precision, launch
from pallas_kernels.tuning import tile_for

WIDEST = 128  # head_dim
SMALLEST = 16  # sides of a tensor core's tile
NOTHING = -1e30  # finite, so that a row that keeps nothing gives no NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """queries, keys: of a block of scores, powers of two of at least 16. warps: of 32 threads. stages: of loads that are under way forward;
    backward there is one, since more of them spill."""

    queries: int
    keys: int
    warps: int
    stages: int


def heuristic(*, residues: int, size: int, dtype) -> Tile:
    """Exact products take registers."""
    side = 16 if dtype == jnp.float32 else 64 if size <= 64 else 32
    side = min(side, max(SMALLEST, power_of_two(residues)))
    return Tile(queries=side, keys=side, warps=4, stages=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    rows: int  # I
    residues: int  # J
    heads: int
    size: int
    width: int  # of a head, a power of two
    scale: float
    tile: Tile


def supports_triangle_attention(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    size = facts["shape"][-1]
    return True if size <= WIDEST else f"heads of {size} do not fit the registers of a block, at most {WIDEST} do"


def triangle_attention(q, k, v, bias, mask, *, scale):
    return _triangle(scale, q, k, v, bias, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _triangle(scale, q, k, v, bias, mask):
    return _forward(scale, q, k, v, bias, mask)[0]


def _forward(scale, q, k, v, bias, mask):
    given, shape = _operands(scale, q, k, v, bias, mask)
    B, I, J, N, H = q.shape
    out = {"out": jax.ShapeDtypeStruct((B * I, J, N, H), q.dtype), "lse": jax.ShapeDtypeStruct((B * I, J, N), jnp.float32)}
    grid = (B * I, -(-J // shape.tile.queries), N)
    found = _launch(_forward_kernel, given, out, shape, name="triangle_attention", grid=grid)
    return found["out"].reshape(q.shape), (q, k, v, bias, mask, found["out"], found["lse"])


def _backward(scale, saved, gradient):
    q, k, v, bias, mask, out, lse = saved
    given, shape = _operands(scale, q, k, v, bias, mask)
    B, I, J, N, _ = q.shape
    gradient = gradient.reshape(out.shape)
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), -1)
    given |= {"gradient": gradient, "lse": lse, "delta": delta}
    like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    queries, keys = -(-J // shape.tile.queries), -(-J // shape.tile.keys)
    shape = dataclasses.replace(shape, tile=dataclasses.replace(shape.tile, stages=1))
    run = functools.partial(_launch, given=given, shape=shape)
    found = run(_dq_kernel, out={"dq": like(out)}, name="triangle_dq", grid=(B * I, queries, N))
    found |= run(_dkv_kernel, out={"dk": like(out), "dv": like(out)}, name="triangle_dkv", grid=(B * I, keys, N))
    found |= run(_dbias_kernel, out={"dbias": like(bias)}, name="triangle_dbias", grid=(B * N, queries, keys))
    return *(found[name].reshape(q.shape) for name in ("dq", "dk", "dv")), found["dbias"], None


_triangle.defvjp(_forward, _backward)


def _operands(scale, q, k, v, bias, mask):
    """What the kernels take, with rows of all sequences joined, and what they are compiled for."""
    B, I, J, N, H = q.shape
    key = {"residues": J, "head_dim": H, "dtype": str(q.dtype)}
    tile = tile_for("triangle_attention", heuristic(residues=J, size=H, dtype=q.dtype), **key)
    width = max(SMALLEST, power_of_two(H))
    shape = _Shape(rows=I, residues=J, heads=N, size=H, width=width, scale=scale, tile=tile)
    given = {name: a.reshape(B * I, J, N, H) for name, a in (("q", q), ("k", k), ("v", v))} | {"bias": bias}
    return given | ({} if mask is None else {"mask": mask.reshape(B * I, J)}), shape


def _launch(kernel, given, out, shape, *, name, grid):
    found = launch(
        functools.partial(kernel, names=(*given, *out), shape=shape),
        *given.values(),
        name=name,
        out=tuple(out.values()),
        grid=grid,
        warps=shape.tile.warps,
        stages=shape.tile.stages,
    )
    return dict(zip(out, found, strict=True))


def _dot(a, b, contracted):
    """Products of two blocks over these axes, in b's dtype and accumulated in float32."""
    return lax.dot_general(
        a.astype(b.dtype),
        b,
        (((contracted[0],), (contracted[1],)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=kernel_precision(b.dtype),
    )


def _block(ref, shape: _Shape, row, start, count, head):
    """Elements [count, width] of one head."""
    mask = (start + jnp.arange(count) < shape.residues)[:, None] & (jnp.arange(shape.width) < shape.size)[None]
    return triton.load(ref.at[row, pl.ds(start, count), head, masked_slice(0, shape.width)], mask=mask, other=0.0)


def _store(ref, value, shape: _Shape, row, start, head):
    count = value.shape[0]
    mask = (start + jnp.arange(count) < shape.residues)[:, None] & (jnp.arange(shape.width) < shape.size)[None]
    triton.store(ref.at[row, pl.ds(start, count), head, masked_slice(0, shape.width)], value.astype(ref.dtype), mask=mask)


def _numbers(ref, shape: _Shape, row, start, count, head):
    return triton.load(ref.at[row, pl.ds(start, count), head], mask=start + jnp.arange(count) < shape.residues, other=0.0)


def _scores(ref, shape: _Shape, q, k, row, query, key, head):
    """Scores times log2(e) of a block that begins there, and which of them count."""
    tile = shape.tile
    asked, kept = query + jnp.arange(tile.queries) < shape.residues, key + jnp.arange(tile.keys) < shape.residues
    inside = asked[:, None] & kept[None]
    place = (row // shape.rows, head, pl.ds(query, tile.queries), pl.ds(key, tile.keys))
    bias = triton.load(ref["bias"].at[place], mask=inside, other=0.0).astype(jnp.float32)
    if "mask" in ref:
        seen = triton.load(ref["mask"].at[row, pl.ds(key, tile.keys)], mask=kept, other=False)
        inside &= seen[None]
    return (_dot(q, k, (1, 1)) * shape.scale + bias) * LOG2_E, inside


def _changes(ref, shape: _Shape, q, k, v, gradient, row, query, key, head):
    """Of a block that begins there the weights of the softmax, and what its scores are to be changed by."""
    count = shape.tile.queries
    scores, inside = _scores(ref, shape, q, k, row, query, key, head)
    lse, delta = (_numbers(ref[name], shape, row, query, count, head) for name in ("lse", "delta"))
    weights = jnp.where(inside, exp2(scores - lse[:, None]), 0.0)
    return weights, weights * (_dot(gradient, v, (1, 1)) - delta[:, None])


def _forward_kernel(*refs, names, shape):
    ref, tile = dict(zip(names, refs, strict=True)), shape.tile
    row, head, query = pl.program_id(0), pl.program_id(2), pl.program_id(1) * tile.queries
    q = _block(ref["q"], shape, row, query, tile.queries, head)

    def step(i, carry):
        sums, largest, total = carry
        key = i * tile.keys
        k, v = (_block(ref[name], shape, row, key, tile.keys, head) for name in ("k", "v"))
        scores, inside = _scores(ref, shape, q, k, row, query, key, head)
        scores = jnp.where(inside, scores, NOTHING)
        new = jnp.maximum(largest, jnp.max(scores, 1))
        weights = jnp.where(inside, exp2(scores - new[:, None]), 0.0)
        shrink = exp2(largest - new)
        return sums * shrink[:, None] + _dot(weights, v, (1, 0)), new, total * shrink + jnp.sum(weights, 1)

    count = tile.queries
    start = jnp.zeros((count, shape.width), jnp.float32), jnp.full(count, NOTHING, jnp.float32), jnp.zeros(count, jnp.float32)
    sums, largest, total = lax.fori_loop(0, -(-shape.residues // tile.keys), step, start)
    whole = jnp.where(total == 0, 1.0, total)
    _store(ref["out"], sums / whole[:, None], shape, row, query, head)
    place = ref["lse"].at[row, pl.ds(query, count), head]
    triton.store(place, largest + jnp.log2(whole), mask=query + jnp.arange(count) < shape.residues)


def _dq_kernel(*refs, names, shape):
    ref, tile = dict(zip(names, refs, strict=True)), shape.tile
    row, head, query = pl.program_id(0), pl.program_id(2), pl.program_id(1) * tile.queries
    q, gradient = (_block(ref[name], shape, row, query, tile.queries, head) for name in ("q", "gradient"))

    def step(i, total):
        k, v = (_block(ref[name], shape, row, i * tile.keys, tile.keys, head) for name in ("k", "v"))
        _, change = _changes(ref, shape, q, k, v, gradient, row, query, i * tile.keys, head)
        return total + _dot(change, k, (1, 0))

    zeros = jnp.zeros((tile.queries, shape.width), jnp.float32)
    total = lax.fori_loop(0, -(-shape.residues // tile.keys), step, zeros)
    _store(ref["dq"], total * shape.scale, shape, row, query, head)


def _dkv_kernel(*refs, names, shape):
    ref, tile = dict(zip(names, refs, strict=True)), shape.tile
    row, head, key = pl.program_id(0), pl.program_id(2), pl.program_id(1) * tile.keys
    k, v = (_block(ref[name], shape, row, key, tile.keys, head) for name in ("k", "v"))

    def step(i, carry):
        dk, dv = carry
        query = i * tile.queries
        q, gradient = (_block(ref[name], shape, row, query, tile.queries, head) for name in ("q", "gradient"))
        weights, change = _changes(ref, shape, q, k, v, gradient, row, query, key, head)
        return dk + _dot(change, q, (0, 0)), dv + _dot(weights, gradient, (0, 0))

    zeros = jnp.zeros((tile.keys, shape.width), jnp.float32)
    dk, dv = lax.fori_loop(0, -(-shape.residues // tile.queries), step, (zeros, zeros))
    _store(ref["dk"], dk * shape.scale, shape, row, key, head)
    _store(ref["dv"], dv, shape, row, key, head)


def _dbias_kernel(*refs, names, shape):
    ref, tile = dict(zip(names, refs, strict=True)), shape.tile
    batch, head = pl.program_id(0) // shape.heads, pl.program_id(0) % shape.heads
    query, key = pl.program_id(1) * tile.queries, pl.program_id(2) * tile.keys

    def step(i, total):
        row = batch * shape.rows + i
        q, gradient = (_block(ref[name], shape, row, query, tile.queries, head) for name in ("q", "gradient"))
        k, v = (_block(ref[name], shape, row, key, tile.keys, head) for name in ("k", "v"))
        return total + _changes(ref, shape, q, k, v, gradient, row, query, key, head)[1]

    total = lax.fori_loop(0, shape.rows, step, jnp.zeros((tile.queries, tile.keys), jnp.float32))
    inside = (query + jnp.arange(tile.queries) < shape.residues)[:, None] & (key + jnp.arange(tile.keys) < shape.residues)[None]
    place = ref["dbias"].at[batch, head, pl.ds(query, tile.queries), pl.ds(key, tile.keys)]
    triton.store(place, total.astype(ref["dbias"].dtype), mask=inside)
