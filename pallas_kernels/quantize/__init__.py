"""Quantisation of activations, done anew for each token, and of weights, done once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.errors import QuantizationError, ShapeError
from pallas_kernels.qtensor import ActivationQuant, QTensor, check_format, default_scale_dtype, divisors
from pallas_kernels.quantize import reference
from pallas_kernels.registry import choose, register, register_file

register("quantize_activations", "reference", reference.quantize_activations)
register("quantize_weights", "reference", reference.quantize_weights)
for _op in ("quantize_activations", "quantize_weights"):
    register_file(_op, "pallas", "pallas_kernels.quantize.pallas")


def quantize_activations(
    x,
    quant: ActivationQuant,
    max_over_shards: Callable[[jax.Array], jax.Array] | None = None,
    *,
    static=None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Symmetric INT8 or FP8 levels of the inputs of a matmul.

        scale = max|x_group| / top        level = round(x / scale), halves to even        x ~ level * scale

    top is 127 for int8, 448 for fp8 (e4m3, whose levels are rounded to its grid). Where quant is static the scale is given, and what lies
    beyond top * scale is cut off.

    x: float [..., I]. quant: inputs that share a scale, or one scale a token; the last group is shorter where the group does
    not divide I. max_over_shards: takes the largest |x| of this shard's inputs, float32 [..., 1, 1], to that of all shards
    (a pmax); only called for one scale a token, since groups lie within a shard. static: float32 [1, 1], or [rows, 1] of an
    x of two axes, the scales of a static quant.
    Returns levels int8 or float8_e4m3fn [..., I] and scales float32 [..., groups], or [..., 1]. A group of zeros has scale 0.
    Raises ShapeError.
    Source: dynamic quantisation as in ZeroQuant, Yao et al. 2022, arXiv:2206.01861.
    """
    if quant.static != (static is not None):
        raise ShapeError("quantize_activations: the scale `static` comes with a static quant, and with no other")
    if x.ndim < 1 or x.shape[-1] < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(f"quantize_activations: x must be a float array [..., I] with I >= 1, got {x.dtype}{list(x.shape)}")
    if static is not None:
        return reference.with_scale(x, quant, static)
    run = choose(
        "quantize_activations",
        implementation,
        shape=x.shape,
        dtype=x.dtype,
        group=quant.group,
        format=quant.format,
        over_shards=max_over_shards is not None,
    )
    return run.function(x, quant, max_over_shards)


def dequantize_activations(levels, scales, quant: ActivationQuant) -> jax.Array:
    """Inverse of `quantize_activations` up to rounding: levels [..., I] and float32 [..., groups] -> float32 [..., I]."""
    return reference.dequantize_activations(levels, scales, quant)


def quantize_weights(
    w,
    *,
    format: str,
    group: int | None = None,
    symmetric: bool = True,
    scale_dtype=None,
    implementation: str | None = None,
) -> QTensor:
    """`qtensor.round_to_nearest` on the device, in one read of the weight: channels or groups, nibbles packed.

    w: finite float array [..., O, I]. Other arguments: see `round_to_nearest`. Raises QuantizationError, ShapeError.
    """
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ShapeError(f"quantize_weights: w must be a float array [..., O, I], got {w.dtype}{list(w.shape)}")
    check_format(format, group, symmetric)
    if group is not None and w.shape[-1] % group:
        raise QuantizationError(f"group {group} does not divide {w.shape[-1]} inputs; choose one of {divisors(w.shape[-1])}")
    scale_dtype = jnp.dtype(scale_dtype or default_scale_dtype(format))
    run = choose("quantize_weights", implementation, shape=w.shape, format=format, group=group)
    return run.function(w, format=format, group=group, symmetric=symmetric, scale_dtype=scale_dtype)
