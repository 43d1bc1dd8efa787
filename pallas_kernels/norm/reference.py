"""Root-mean-square and layer normalisation in plain jnp, float32 inside: the meaning of the operation."""

import jax
import jax.numpy as jnp


def rms_norm(x, scale, *, eps: float, unit_offset: bool, out_dtype):
    x = x.astype(jnp.float32)
    scale = scale.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    # the offset is added in float32: 1 + scale in bfloat16 would round small scales away
    return (y * (1 + scale if unit_offset else scale)).astype(out_dtype)


def layer_norm(x, scale, bias, *, eps: float, out_dtype):
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, -1, keepdims=True)
    # the variance of the centred values: E[x^2] - E[x]^2 cancels where the mean is large
    y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype)
