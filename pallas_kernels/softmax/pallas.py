"""Softmax for NVIDIA GPUs through Pallas and Triton: a row that fits a block is read once, a longer one twice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.kernel_math import LOG2_E, exp2, masked_slice, power_of_two
from pallas_kernels.launch import gpu_refusal, launch
from pallas_kernels.softmax.reference import LEAST
from pallas_kernels.tuning import tile_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """rows: of a block. width: of a step along a row, a power of two. warps: of 32 threads."""

    rows: int
    width: int
    warps: int


def heuristic(width: int) -> Tile:
    """Sixteen elements a thread."""
    block = min(8192, power_of_two(width))
    return Tile(rows=max(1, 1024 // block), width=block, warps=max(4, block // 512))


def supports_softmax(target, facts) -> bool | str:
    return gpu_refusal(target) or True


def softmax(x, mask, *, scale, out_dtype):
    return _softmax(scale, jnp.dtype(out_dtype), x, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax(scale, out_dtype, x, mask):
    width = x.shape[-1]
    rows = x.size // width
    tile = tile_for("softmax", heuristic(width), width=width, dtype=str(x.dtype))
    given = {"x": x.reshape(rows, width)} | ({} if mask is None else {"mask": mask.reshape(rows, width)})
    kernel = functools.partial(_kernel, names=(*given, "out"), tile=tile, rows=rows, width=width, scale=scale * LOG2_E)
    out = jax.ShapeDtypeStruct((rows, width), out_dtype)
    y = launch(kernel, *given.values(), name="softmax", out=out, grid=(-(-rows // tile.rows),), warps=tile.warps)
    return y.reshape(x.shape)


def _kernel(*refs, names, tile, rows, width, scale):
    ref = dict(zip(names, refs, strict=True))
    block = (tile.rows, tile.width)
    first = pl.program_id(0) * tile.rows
    kept_rows = first + lax.broadcasted_iota(jnp.int32, block, 0) < rows
    columns = lax.broadcasted_iota(jnp.int32, block, 1)

    def load(step):
        """A step of the rows: where it lies, what of it is in the array, what is kept, and the values."""
        place = (pl.ds(first, tile.rows), masked_slice(step * tile.width, tile.width))
        inside = kept_rows & (step * tile.width + columns < width)
        kept = inside
        if "mask" in ref:
            kept = kept & triton.load(ref["mask"].at[place], mask=inside, other=False)
        x = triton.load(ref["x"].at[place], mask=kept, other=0.0).astype(jnp.float32)
        return place, inside, kept, jnp.where(kept, x * scale, LEAST)

    def weights(x, kept, largest):
        return jnp.where(kept, exp2(x - largest), 0.0)

    def store(place, inside, y, total):
        y = y / jnp.where(total == 0, 1.0, total)
        triton.store(ref["out"].at[place], y.astype(ref["out"].dtype), mask=inside)

    steps = -(-width // tile.width)
    if steps == 1:
        place, inside, kept, x = load(0)
        y = weights(x, kept, jnp.max(x, 1, keepdims=True))
        store(place, inside, y, jnp.sum(y, 1, keepdims=True))
        return

    def summed(step, carry):
        largest, total = carry
        _, _, kept, x = load(step)
        new = jnp.maximum(largest, jnp.max(x, 1, keepdims=True))
        return new, total * exp2(largest - new) + jnp.sum(weights(x, kept, new), 1, keepdims=True)

    start = jnp.full((tile.rows, 1), LEAST, jnp.float32), jnp.zeros((tile.rows, 1), jnp.float32)
    largest, total = lax.fori_loop(0, steps, summed, start)

    def written(step, carry):
        place, inside, kept, x = load(step)
        store(place, inside, weights(x, kept, largest), total)
        return carry

    lax.fori_loop(0, steps, written, 0)


def _forward(scale, out_dtype, x, mask):
    y = _softmax(scale, out_dtype, x, mask)
    return y, (y, x, mask)


def _backward(scale, out_dtype, saved, gradient):
    y, x, mask = saved
    y, gradient = y.astype(jnp.float32), gradient.astype(jnp.float32)
    inner = jnp.sum(y * gradient, -1, keepdims=True)
    return (scale * y * (gradient - inner)).astype(x.dtype), None if mask is None else jax.numpy.zeros(
        mask.shape, jax.dtypes.float0
    )


_softmax.defvjp(_forward, _backward)
