"""The meaning of `attention` in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.terms import last_keys, positions_of
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.precision import dot_precision

MASKED = -1e30  # finite, so that a row that sees nothing gives no NaN


def attention(q, cache, *, rows, positions, scale, soft_cap, window, terms, out_dtype):
    B, T, N, H = q.shape
    own, at = gathered(cache, rows), positions_of(positions, q)
    if own.format == "int4":
        own = own.floats(jnp.max(at, 1))
    K, S = own.k.shape[1:3]
    # [B, K, G*T, H]: the query heads of a group share one read of its keys
    grouped = jnp.swapaxes(q.reshape(B, T, K, N // K, H), 1, 2).swapaxes(2, 3).reshape(B, K, N // K * T, H)
    scores = _dot("bkqh,bksh->bkqs", grouped * scale, own.k)
    if own.k_scale is not None:
        scores = scores * own.k_scale[:, :, None]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = scores.reshape(B, K, N // K, T, S)
    if (bias := distance_bias(terms, at, jnp.arange(S, dtype=jnp.int32))) is not None:
        scores = scores + bias.reshape(scores.shape)
    keys = lax.broadcasted_iota(jnp.int32, (1, 1, S), 2)
    seen = keys <= last_keys(terms, at, S)[:, :, None]  # [B, T, S]
    if window is not None:
        seen &= keys > at[:, :, None] - window
        if not terms.causal:
            seen &= keys - window < at[:, :, None]
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    largest = jnp.max(scores, -1, keepdims=True)
    if terms.sinks is not None:
        sinks = terms.sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        largest = jnp.maximum(largest, sinks)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, -1, keepdims=True)
    if terms.sinks is not None:
        total = total + jnp.exp(sinks - largest)
    weights, total = (a.reshape(B, K, N // K * T, a.shape[-1]) for a in (weights, total))
    if own.v_scale is not None:
        weights = weights * own.v_scale[:, :, None]
    out = _dot("bkqs,bksh->bkqh", weights, own.v) / total  # H divisions a head and not S
    out = jnp.swapaxes(out.reshape(B, K, N // K, T, H), 2, 3).swapaxes(1, 2).reshape(B, T, N, H)
    # a query that sees no key gives zeros; to mask the weights would be one more array of the size of the scores
    return jnp.where(jnp.any(seen, -1)[:, :, None, None], out, 0.0).astype(out_dtype)


def gathered(cache: LayerCache, rows) -> LayerCache:
    """The keys and values of each sequence, [B, K, S, H]: rows of the cache, or its pages in the order of a table [B, P]."""
    own = cache.take(rows)
    if rows is None or rows.ndim == 1:
        return own

    def joined(pages):
        pages = jnp.moveaxis(pages, 1, 2)
        return pages.reshape(*pages.shape[:2], -1, *pages.shape[4:])

    return jax.tree.map(joined, own)


def distance_bias(terms, at, keys) -> jax.Array | None:
    """What is added to the scores by distance, float32 [B, N, T, S], of queries at int32 [B, T] and keys int32 [S]."""
    bias, distance = None, keys - at[:, :, None]
    if terms.slopes is not None:
        bias = -terms.slopes.astype(jnp.float32)[None, :, None, None] * jnp.abs(distance)[:, None]
    if terms.relative is not None:
        place = jnp.clip(distance, -terms.reach, terms.reach) + terms.reach
        more = jnp.moveaxis(terms.relative.astype(jnp.float32)[:, place], 0, 1)
        bias = more if bias is None else bias + more
    return bias


def _dot(equation, a, b):
    """float32 x the cache's dtype with float32 accumulation; a half-precision cache is multiplied as it is stored."""
    if b.dtype.itemsize != 2:
        return jnp.einsum(equation, a, b.astype(jnp.float32), precision=dot_precision(a.dtype, a.shape[-2]))
    precision = dot_precision(b.dtype, a.shape[-2])
    return jnp.einsum(equation, a.astype(b.dtype), b, precision=precision, preferred_element_type=jnp.float32)
