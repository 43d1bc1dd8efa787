"""`attention_block` as the composition of the small operations: its meaning, and the path of a device without a fused kernel."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attention
from pallas_kernels.integer_attention import integer_attention
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.norm import norm
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.rope_cache import rope, rope_cache
from pallas_kernels.shares import share


def attention_block(x, weights, cache, *, spec, angles, positions, rows, write, residual, lead, window, terms, max_over_shards):
    B, T, _ = x.shape
    H, G = spec.head_dim, spec.group
    with jax.named_scope("norm"):
        n = x if spec.normed else norm(x, weights.norm, weights.norm_bias, kind=spec.norm, eps=spec.eps)
    with jax.named_scope("qkv"):
        biases = weights.qkv_bias or (None,) * len(weights.qkv)
        joined = jnp.concatenate([quant_matmul(n, w, bias=b) for w, b in zip(weights.qkv, biases, strict=True)], -1)
        K = joined.shape[-1] // ((G + 2) * H)
        heads = joined.reshape(B, T, (G + 2) * K, H)
        q, k, v = jnp.split(heads, [G * K, (G + 1) * K], axis=2)
    if weights.q_norm is not None:
        with jax.named_scope("qk_norm"):
            q, k = (norm(a, scale, kind=spec.norm, eps=spec.eps) for a, scale in ((q, weights.q_norm), (k, weights.k_norm)))
            heads = jnp.concatenate([q, k], 2)
    with jax.named_scope("rope_cache"):
        cos, sin = angles or (None, None)
        if cache is None:
            if angles is not None:
                turned = rope(heads[:, :, : (G + 1) * K], cos, sin)
                q, k = turned[:, :, : G * K], turned[:, :, G * K :]
            cache = LayerCache(k=jnp.swapaxes(k, 1, 2), v=jnp.swapaxes(v, 1, 2))
            positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))  # as the fresh cache numbers them
        else:
            q, cache = rope_cache(q, k, v, cos, sin, cache, rows=rows, positions=positions, write=write)
    with jax.named_scope("attention"):
        attend = integer_attention if spec.integer else functools.partial(attention, terms=terms)
        o = attend(q, cache, rows=rows, positions=positions, scale=spec.scale, soft_cap=spec.soft_cap, window=window)
        o = o.reshape(B, T, -1)
    with jax.named_scope("out"):
        y = quant_matmul(o, weights.out, bias=share(lead, weights.out_bias), max_over_shards=max_over_shards)
        return (y if residual is None else share(lead, residual) + y), cache
