"""Softmax over the last axis."""

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ShapeError
from pallas_kernels.registry import choose, register, register_file
from pallas_kernels.softmax import reference

register("softmax", "reference", reference.softmax)
register_file("softmax", "pallas", "pallas_kernels.softmax.pallas")


def softmax(x, mask=None, *, scale: float = 1.0, out_dtype=None, implementation: str | None = None) -> jax.Array:
    """Scaled and masked softmax.

        y_i = exp(scale x_i - m) / sum_j exp(scale x_j - m)         m = max_j scale x_j, j over what the mask keeps; 0 elsewhere

    x: float [..., D]. mask: bool [..., D], True where an element is kept, or None; a row that keeps nothing is 0, not NaN. scale:
    positive. out_dtype: of the result [..., D], x's by default; float32 inside. Differentiable in x. Raises ShapeError. Source: the
    online form for long rows, Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    if x.ndim < 1 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(f"softmax: x must be a float array [..., D] that is not empty, got {x.dtype}{list(x.shape)}")
    if mask is not None and (mask.shape != x.shape or mask.dtype != jnp.bool_):
        raise ShapeError(f"softmax: mask must be bool{list(x.shape)} as x, got {mask.dtype}{list(mask.shape)}")
    if not scale > 0:
        raise ShapeError(f"softmax: scale is {scale}; it must be positive")
    run = choose("softmax", implementation, shape=x.shape, dtype=x.dtype)
    return run.function(x, mask, scale=scale, out_dtype=jnp.dtype(out_dtype or x.dtype))
