"""Normalisation over the last axis."""

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ShapeError
from pallas_kernels.norm import reference
from pallas_kernels.registry import choose, register

register("rms_norm", "reference", reference.rms_norm)
register("layer_norm", "reference", reference.layer_norm)

KINDS = ("rms", "rms_offset", "layer")


def norm(x, scale, bias=None, *, kind: str, eps: float, implementation: str | None = None) -> jax.Array:
    """The norm that a model names: "rms" is `rms_norm`, "rms_offset" the same with its unit offset, "layer" is `layer_norm`.

    x: float [..., D]. scale: float [D]. bias: float [D] or None, of a layer norm only. Returns x's shape and dtype.
    Raises ShapeError for another kind, and for a bias that the kind has no place for.
    """
    if kind not in KINDS:
        raise ShapeError(f"norm: kind {kind!r} is not one of {KINDS}")
    if kind == "layer":
        return layer_norm(x, scale, bias, eps=eps, implementation=implementation)
    if bias is not None:
        raise ShapeError(f"norm: kind {kind!r} has no bias, one of {list(bias.shape)} was given")
    return rms_norm(x, scale, eps=eps, unit_offset=kind == "rms_offset", implementation=implementation)


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
