"""The meaning of `attention` in plain jnp."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.precision import dot_precision

MASKED = -1e30  # finite, so that a row that sees nothing gives no NaN


def attention(q, cache, *, rows, positions, scale, soft_cap, window):
    B, T, N, H = q.shape
    K, S = cache.k.shape[1:3]
    own = cache.take(rows)
    # [B, K, G*T, H]: the query heads of a group share one read of its keys
    grouped = jnp.swapaxes(q.reshape(B, T, K, N // K, H), 1, 2).swapaxes(2, 3).reshape(B, K, -1, H)
    scores = _dot("bkqh,bksh->bkqs", grouped * scale, own.k)
    if own.k_scale is not None:
        scores = scores * own.k_scale[:, :, None]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    keys = lax.broadcasted_iota(jnp.int32, (1, 1, S), 2)
    seen = keys <= positions[:, :, None]  # [B, T, S]
    if window is not None:
        seen &= keys > positions[:, :, None] - window
    scores = jnp.where(seen[:, None, None], scores.reshape(B, K, N // K, T, S), MASKED)
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True)).reshape(B, K, -1, S)
    total = jnp.sum(weights, -1, keepdims=True)
    if own.v_scale is not None:
        weights = weights * own.v_scale[:, :, None]
    out = _dot("bkqs,bksh->bkqh", weights, own.v) / total  # H divisions a head and not S
    return jnp.swapaxes(out.reshape(B, K, N // K, T, H), 2, 3).swapaxes(1, 2).reshape(B, T, N, H)


def _dot(equation, a, b):
    """float32 x the cache's dtype with float32 accumulation; a half-precision cache is multiplied as it is stored."""
    if b.dtype == jnp.float32 or b.dtype == jnp.int8:
        return jnp.einsum(equation, a, b.astype(jnp.float32), precision=dot_precision(a.dtype, a.shape[-2]))
    precision = dot_precision(b.dtype, a.shape[-2])
    return jnp.einsum(equation, a.astype(b.dtype), b, precision=precision, preferred_element_type=jnp.float32)
