"""Softmax in plain jnp, float32 inside: the meaning of the operation."""

import jax.numpy as jnp

LEAST = -3e38  # finite, so that a row that keeps nothing gives no NaN


def softmax(x, mask, *, scale, out_dtype):
    x = x.astype(jnp.float32) * scale
    if mask is not None:
        x = jnp.where(mask, x, LEAST)
    weights = jnp.exp(x - jnp.max(x, -1, keepdims=True))
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    total = jnp.sum(weights, -1, keepdims=True)
    return (weights / jnp.where(total == 0, 1.0, total)).astype(out_dtype)
