"""Normalisation over the last axis."""

import jax
import jax.numpy as jnp

from pallas_kernels.dropout import Dropout, check_dropout
from pallas_kernels.errors import ShapeError
from pallas_kernels.norm import reference
from pallas_kernels.norm.output import NormOutput
from pallas_kernels.qtensor import ActivationQuant
from pallas_kernels.registry import choose, register, register_file

register("rms_norm", "reference", reference.rms_norm)
register("layer_norm", "reference", reference.layer_norm)
register("fused_norm", "reference", reference.fused_norm)
for _op in ("rms_norm", "layer_norm", "fused_norm"):
    register_file(_op, "pallas", "pallas_kernels.norm.pallas")
    register_file(_op, "jax_triton", "pallas_kernels.norm.jax_triton", priority=20, needs="jax_triton")

KINDS = ("rms", "rms_offset", "layer")
ACTIVATIONS = tuple(reference.ACTIVATIONS)


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


def fused_norm(
    x,
    scale,
    bias=None,
    *,
    kind: str,
    eps: float,
    residual=None,
    activation: str | None = None,
    dropout: Dropout | None = None,
    quant: ActivationQuant | None = None,
    out_dtype=None,
    implementation: str | None = None,
) -> NormOutput:
    """A norm with what stands before and after it, in one pass over memory.

        t = x + residual          y = dropout(activation(norm(t)))          levels, scales = quantize_activations(y)

    x: float [..., D]. scale, bias, kind, eps: see `norm`; a layer norm takes None for either. residual: float [..., D] or None.
    activation: one of `ACTIVATIONS`, or None. dropout: see `Dropout`; the gradient makes the same choices again. quant: makes y INT8 or
    FP8 levels with scales per token or per group of D; the sum before it is not rounded. out_dtype: of y where it is not quantised, x's
    by default. float32 inside; t is returned in the wider of the two dtypes. Differentiable. Raises ShapeError.
    Source: see `rms_norm`, `layer_norm`, `Dropout` and `quantize_activations`.
    """
    if kind not in KINDS:
        raise ShapeError(f"fused_norm: kind {kind!r} is not one of {KINDS}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ShapeError(f"fused_norm: activation {activation!r} is not one of {ACTIVATIONS}")
    if kind != "layer" and (scale is None or bias is not None):
        raise ShapeError(f"fused_norm: kind {kind!r} has a scale and no bias")
    _check("fused_norm", x, scale=scale, bias=bias)
    if residual is not None and residual.shape != x.shape:
        raise ShapeError(f"fused_norm: residual must be {list(x.shape)} as x, got {list(residual.shape)}")
    check_dropout("fused_norm", dropout, x.shape)
    run = choose("fused_norm", implementation, shape=x.shape, dtype=x.dtype, quant=quant, dropout=dropout is not None)
    return run.function(
        x,
        scale,
        bias,
        kind=kind,
        eps=eps,
        residual=residual,
        activation=activation,
        dropout=dropout,
        quant=quant,
        out_dtype=jnp.dtype(out_dtype or x.dtype),
    )


def _check(op: str, x, **vectors) -> None:
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(f"{op}: x must be a float array [..., D], got {x.dtype}{list(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ShapeError(
                f"{op}: {name} must be [{x.shape[-1]}], as the last axis of x {list(x.shape)}, got {list(vector.shape)}"
            )
