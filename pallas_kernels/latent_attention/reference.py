"""The meaning of `latent_attention` in plain jnp: `attention` with one kv head whose values are part of its keys."""

import jax.numpy as jnp

from pallas_kernels.attention import reference
from pallas_kernels.attention.terms import AttentionTerms
from pallas_kernels.layer_cache import LayerCache


def latent_attention(q, cache, *, values, positions, scale, rows, scales):
    if scales is None:
        keys, dequantised = cache, cache
    else:
        keys = dequantised = cache.astype(jnp.float32) * scales[..., None]
    latent = jnp.where(jnp.arange(keys.shape[-1]) < values, dequantised, 0).astype(keys.dtype)
    own = LayerCache(k=keys[:, None], v=latent[:, None])
    rest = {"soft_cap": None, "window": None, "terms": AttentionTerms(), "out_dtype": jnp.float32}
    out = reference.attention(q, own, rows=rows, positions=positions, scale=scale, **rest)
    return out[..., :values]
