"""Quantisation of activations, done anew for each token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ShapeError
from pallas_kernels.qtensor import ActivationQuant
from pallas_kernels.quantize import reference
from pallas_kernels.registry import choose, register

register("quantize_activations", "reference", reference.quantize_activations)


def quantize_activations(
    x,
    quant: ActivationQuant,
    max_over_shards: Callable[[jax.Array], jax.Array] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Dynamic symmetric INT8 or FP8 levels of the inputs of a matmul.

        scale = max|x_group| / top        level = round(x / scale), halves to even        x ~ level * scale

    top is 127 for int8, 448 for fp8 (e4m3, whose levels are rounded to its grid).

    x: float [..., I]. quant: inputs that share a scale, or one scale a token; the last group is shorter where the group does
    not divide I. max_over_shards: takes the largest |x| of this shard's inputs, float32 [..., 1, 1], to that of all shards
    (a pmax); only called for one scale a token, since groups lie within a shard.
    Returns levels int8 or float8_e4m3fn [..., I] and scales float32 [..., groups], or [..., 1]. A group of zeros has scale 0.
    Raises ShapeError.
    Source: dynamic quantisation as in ZeroQuant, Yao et al. 2022, arXiv:2206.01861.
    """
    if x.ndim < 1 or x.shape[-1] < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(f"quantize_activations: x must be a float array [..., I] with I >= 1, got {x.dtype}{list(x.shape)}")
    run = choose("quantize_activations", implementation, shape=x.shape, dtype=x.dtype, group=quant.group, format=quant.format)
    return run.function(x, quant, max_over_shards)


def dequantize_activations(levels, scales, quant: ActivationQuant) -> jax.Array:
    """Inverse of `quantize_activations` up to rounding: levels [..., I] and float32 [..., groups] -> float32 [..., I]."""
    return reference.dequantize_activations(levels, scales, quant)
