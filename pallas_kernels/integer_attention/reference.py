"""The meaning of `integer_attention` in plain jnp."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.layer_cache import LayerCache, scaled_levels

MASKED = -1e30  # finite, so that a row that sees nothing gives no NaN


def integer_attention(q, cache, *, rows, positions, scale, soft_cap, window):
    B, T, N, H = q.shape
    own = cache.take(rows)
    K, S = own.k.shape[1:3]
    if own.k_scale is None:
        own = LayerCache.zeros(rows=0, kv_heads=0, tokens=0, head_dim=0, dtype=jnp.int8).encode(own.k, own.v)
    # [B, K, G*T, H]: the query heads of a group share one read of its keys
    grouped = jnp.swapaxes(q.reshape(B, T, K, N // K, H), 1, 2).swapaxes(2, 3).reshape(B, K, -1, H)
    asked, steps = scaled_levels(grouped, 127, jnp.int8)
    scores = _dot("bkqh,bksh->bkqs", asked, own.k).astype(jnp.float32)
    scores = scores * (steps * scale)[..., None] * own.k_scale[:, :, None]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    keys = lax.broadcasted_iota(jnp.int32, (1, 1, S), 2)
    seen = keys <= positions[:, :, None]  # [B, T, S]
    if window is not None:
        seen &= keys > positions[:, :, None] - window
    seen = jnp.broadcast_to(seen[:, None, None], (B, K, N // K, T, S)).reshape(scores.shape)
    scores = jnp.where(seen, scores, MASKED)
    weights = jnp.where(seen, jnp.exp(scores - jnp.max(scores, -1, keepdims=True)), 0)
    total = jnp.sum(weights, -1, keepdims=True)
    weights = weights * own.v_scale[:, :, None]
    largest = jnp.max(weights, -1, keepdims=True)
    # 0..255 as int8 of 128 less, made up for by the sum of all values; what overflows on the way comes back
    levels = (jnp.round(weights * (255 / jnp.where(largest == 0, 1, largest))) - 128).astype(jnp.int8)
    whole = jnp.sum(own.v.astype(jnp.int32), 2, keepdims=True) * 128
    out = (_dot("bkqs,bksh->bkqh", levels, own.v) + whole).astype(jnp.float32)
    out = out * (largest * np.float32(1 / 255) / jnp.where(total == 0, 1, total))
    return jnp.swapaxes(out.reshape(B, K, N // K, T, H), 2, 3).swapaxes(1, 2).reshape(B, T, N, H)


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.int32)
