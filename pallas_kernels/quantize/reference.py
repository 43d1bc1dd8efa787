"""Quantisation in plain jnp: the meaning of the operations."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.qtensor import round_to_nearest
from pallas_kernels.value_formats import FP8_MAX

TOPS = {"int8": 127.0, "fp8": FP8_MAX}  # the largest level


def quantize_activations(x, quant, max_over_shards):
    inputs, x = x.shape[-1], x.astype(jnp.float32)
    size = quant.group or inputs
    groups = -(-inputs // size)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * size - inputs)]) if groups * size != inputs else x
    padded = padded.reshape(*x.shape[:-1], groups, size)
    largest = jnp.max(jnp.abs(padded), -1, keepdims=True)
    if quant.group is None and max_over_shards is not None:
        largest = max_over_shards(largest)
    scales = largest * np.float32(1 / TOPS[quant.format])  # written as the product that XLA makes of a division by a constant
    # a group of zeros has scale 0 and levels 0; the clip only matters for groups of denormal numbers, whose scale is coarse
    levels = _levels(padded, scales, quant)
    return levels.reshape(*x.shape[:-1], groups * size)[..., :inputs], scales[..., 0]


def _levels(x, scales, quant):
    levels, top = x / jnp.where(scales == 0, 1, scales), TOPS[quant.format]
    if quant.format == "fp8":
        return jnp.clip(levels, -top, top).astype(jnp.float8_e4m3fn)  # what lies beyond would become NaN
    return jnp.clip(jnp.rint(levels), -top, top).astype(jnp.int8)


def with_scale(x, quant, scale):
    """Levels and scales as of `quantize_activations`, with scales [rows or 1, 1] that are given."""
    scales = jnp.broadcast_to(scale if x.ndim > 1 else scale[0], (*x.shape[:-1], 1)).astype(jnp.float32)
    return _levels(x.astype(jnp.float32), scales, quant), scales


def quantize_weights(w, *, format, group, symmetric, scale_dtype):
    return round_to_nearest(jnp.asarray(w), format=format, group=group, symmetric=symmetric, scale_dtype=scale_dtype)


def dequantize_activations(levels, scales, quant):
    inputs = levels.shape[-1]
    spread = jnp.repeat(scales, quant.group or inputs, axis=-1)[..., :inputs]
    return levels.astype(jnp.float32) * spread
