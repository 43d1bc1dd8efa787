"""Quantisation in plain jnp: the meaning of the operations."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.qtensor import round_to_nearest
from pallas_kernels.value_formats import FP8_MAX


def quantize_activations(x, quant, max_over_shards):
    inputs, x = x.shape[-1], x.astype(jnp.float32)
    size = quant.group or inputs
    groups = -(-inputs // size)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * size - inputs)]) if groups * size != inputs else x
    padded = padded.reshape(*x.shape[:-1], groups, size)
    largest = jnp.max(jnp.abs(padded), -1, keepdims=True)
    if quant.group is None and max_over_shards is not None:
        largest = max_over_shards(largest)
    top = FP8_MAX if quant.format == "fp8" else 127
    scales = largest * np.float32(1 / top)  # written as the product that XLA makes of a division by a constant
    # a group of zeros has scale 0 and levels 0; the clip only matters for groups of denormal numbers, whose scale is coarse
    levels = padded / jnp.where(scales == 0, 1, scales)
    if quant.format == "fp8":
        levels = jnp.clip(levels, -top, top).astype(jnp.float8_e4m3fn)  # what lies beyond would become NaN
    else:
        levels = jnp.clip(jnp.rint(levels), -top, top).astype(jnp.int8)
    return levels.reshape(*x.shape[:-1], groups * size)[..., :inputs], scales[..., 0]


def quantize_weights(w, *, format, group, symmetric, scale_dtype):
    return round_to_nearest(jnp.asarray(w), format=format, group=group, symmetric=symmetric, scale_dtype=scale_dtype)


def dequantize_activations(levels, scales, quant):
    inputs = levels.shape[-1]
    spread = jnp.repeat(scales, quant.group or inputs, axis=-1)[..., :inputs]
    return levels.astype(jnp.float32) * spread
