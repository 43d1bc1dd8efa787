"""The meaning of `triangle_attention` in plain jnp; it holds all scores."""

import jax.numpy as jnp

from pallas_kernels.precision import dot_precision
from pallas_kernels.softmax.reference import softmax


def triangle_attention(q, k, v, bias, mask, *, scale):
    precision = dot_precision(q.dtype, q.shape[2])
    scores = jnp.einsum("bijnh,bilnh->binjl", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * scale + bias[:, None].astype(jnp.float32)
    kept = None if mask is None else jnp.broadcast_to(mask[:, :, None, None], scores.shape)
    weights = softmax(scores, kept, scale=1.0, out_dtype=jnp.float32)
    out = jnp.einsum("binjl,bilnh->bijnh", weights.astype(q.dtype), v, precision=precision, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
