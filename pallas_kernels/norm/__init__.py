"""Normalisation over the last axis."""

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ShapeError
from pallas_kernels.norm import reference
from pallas_kernels.registry import choose, register

register("rms_norm", "reference", reference.rms_norm)
register("layer_norm", "reference", reference.layer_norm)


def rms_norm(
    x, scale, *, eps: float, unit_offset: bool = False, out_dtype=None, implementation: str | None = None
) -> jax.Array:
    """Root-mean-square normalisation.

        y = x / sqrt(mean(x^2) + eps) * scale           or * (1 + scale) with unit_offset

    x: float [..., D]. scale: float [D]. eps: inside the root. out_dtype: of the result [..., D], x's by default; float32
    inside. Raises ShapeError. Source: Zhang and Sennrich 2019, arXiv:1910.07467; the offset is Gemma's.
    """
    _check("rms_norm", x, scale=scale)
    run = choose("rms_norm", implementation, shape=x.shape, dtype=x.dtype)
    return run.function(x, scale, eps=eps, unit_offset=unit_offset, out_dtype=jnp.dtype(out_dtype or x.dtype))


def layer_norm(x, scale, bias, *, eps: float, out_dtype=None, implementation: str | None = None) -> jax.Array:
    """Layer normalisation.

        y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias           var without Bessel's correction

    x: float [..., D]. scale, bias: float [D], or None for ones and zeros. eps: inside the root. out_dtype: of the result
    [..., D], x's by default; float32 inside. Raises ShapeError. Source: Ba et al. 2016, arXiv:1607.06450.
    """
    _check("layer_norm", x, scale=scale, bias=bias)
    run = choose("layer_norm", implementation, shape=x.shape, dtype=x.dtype)
    return run.function(x, scale, bias, eps=eps, out_dtype=jnp.dtype(out_dtype or x.dtype))


def _check(op: str, x, **vectors) -> None:
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(f"{op}: x must be a float array [..., D], got {x.dtype}{list(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ShapeError(
                f"{op}: {name} must be [{x.shape[-1]}], as the last axis of x {list(x.shape)}, got {list(vector.shape)}"
            )
