"""Bias and activation between two matmuls, gated or not."""

import jax.numpy as jnp

from pallas_kernels.activation import reference
from pallas_kernels.activation.output import ActivationOutput
from pallas_kernels.dropout import Dropout, check_dropout
from pallas_kernels.errors import ShapeError
from pallas_kernels.qtensor import ActivationQuant
from pallas_kernels.registry import choose, register, register_file

register("activation", "reference", reference.activation)
register_file("activation", "pallas", "pallas_kernels.activation.pallas")

KINDS = tuple(reference.ACTIVATIONS)


def activation(
    x,
    *,
    kind: str,
    bias=None,
    gated: bool = False,
    dropout: Dropout | None = None,
    quant: ActivationQuant | None = None,
    out_dtype=None,
    implementation: str | None = None,
) -> ActivationOutput:
    """What stands between the matmuls of an MLP, in one pass over memory.

        y = act(x + bias)   or, gated,   y = act(x_gate + b_gate) * (x_up + b_up)       levels, scales = quantize_activations(dropout(y))

    x: float [..., F], or [..., 2F] gated, the gate first. kind: one of `KINDS`; "gelu" is exact, "gelu_tanh" its usual approximation.
    bias: float [F] or [2F], or None. dropout: of y [..., F], see `Dropout`. quant: makes y INT8 or FP8 levels with scales per token or
    per group of F. out_dtype: of y where it is not quantised, x's by default; float32 inside. Differentiable. Raises ShapeError.
    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415; gates: Shazeer 2020, arXiv:2002.05202.
    """
    if kind not in KINDS:
        raise ShapeError(f"activation: kind {kind!r} is not one of {KINDS}")
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[-1] % (2 if gated else 1) or not x.shape[-1]:
        raise ShapeError(f"activation: x must be a float array [..., {'2F' if gated else 'F'}], got {x.dtype}{list(x.shape)}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ShapeError(
            f"activation: bias must be [{x.shape[-1]}], as the last axis of x {list(x.shape)}, got {list(bias.shape)}"
        )
    check_dropout("activation", dropout, x.shape)
    run = choose("activation", implementation, shape=x.shape, gated=gated, quant=quant)
    dtype = jnp.dtype(out_dtype or x.dtype)
    return run.function(x, bias, kind=kind, gated=gated, dropout=dropout, quant=quant, out_dtype=dtype)
