"""`attention_block` on NVIDIA GPUs: norm with q/k/v; head norms, rotation and cache write; attention; output with the residual.

Nothing stands between them: q, k and v stay one array.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attention
from pallas_kernels.launch import gpu_refusal
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.norm import norm
from pallas_kernels.quant_matmul.fused import Norm, fused_matmul
from pallas_kernels.quant_matmul.terms import inputs_dtype
from pallas_kernels.rope_cache import reference as rope_reference
from pallas_kernels.rope_cache.pallas import WIDEST, HeadNorm, cache_refusal, rope_cache_joined


def supports_attention_block(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there are no tokens"
    if facts["spec"].integer:
        return "it multiplies floats; integer attention runs through XLA"
    if facts["cache"] is not None and (reason := cache_refusal(target, str(facts["cache"].k.dtype))):
        return reason
    size = facts["spec"].head_dim
    return True if size <= WIDEST else f"heads of {size} do not fit the registers of a block, at most {WIDEST} do"


def attention_block(x, weights, cache, *, spec, angles, positions, rows, write, residual, lead, window, terms, max_over_shards):
    B, T, _ = x.shape
    with jax.named_scope("qkv"):
        first = Norm(kind=spec.norm, eps=spec.eps, scale=weights.norm, bias=weights.norm_bias)
        heads = fused_matmul(x, weights.qkv, biases=weights.qkv_bias, norm=None if spec.normed else first)
        heads = heads.reshape(B, T, -1, spec.head_dim)
    with jax.named_scope("rope_cache"):
        norms = None if weights.q_norm is None else (weights.q_norm, weights.k_norm)
        if cache is None:
            positions = rows = write = None  # tokens are numbered as in the fresh cache
        q, cache = _turn_and_write(spec, heads, norms, angles, cache, rows, positions, write)
    with jax.named_scope("attention"):
        scores = {"scale": spec.scale, "soft_cap": spec.soft_cap, "window": window, "terms": terms}
        o = attention(q, cache, rows=rows, positions=positions, out_dtype=inputs_dtype(weights.out, B * T), **scores)
    with jax.named_scope("out"):
        shards = {"lead": lead, "max_over_shards": max_over_shards}
        biases = () if weights.out_bias is None else (weights.out_bias,)
        y = fused_matmul(o.reshape(B, T, -1), (weights.out,), biases=biases, residual=residual, **shards)
    return y, cache


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turn_and_write(spec, heads, norms, angles, cache, rows, positions, write):
    """heads float32 [B, T, (G + 2) K, H] -> q float32 [B, T, G K, H], and the cache; without one, a fresh one of T tokens."""
    B, T, joined, H = heads.shape
    kv_heads = joined // (spec.group + 2)
    if cache is None:
        cache = jax.eval_shape(lambda: LayerCache.zeros(rows=B, kv_heads=kv_heads, tokens=T, head_dim=H, dtype=spec.fresh))
    cos, sin = angles or (None, None)
    head_norm = norms and HeadNorm(kind=spec.norm, eps=spec.eps, q=norms[0], k=norms[1])
    return rope_cache_joined(
        heads, cos, sin, cache, kv_heads=kv_heads, norm=head_norm, rows=rows, positions=positions, write=write
    )


def _forward(spec, *arrays):
    return _turn_and_write(spec, *arrays), arrays


def _backward(spec, arrays, gradient):
    return jax.vjp(functools.partial(_composed, spec), *arrays)[1](gradient)


def _composed(spec, heads, norms, angles, cache, rows, positions, write):
    """`_turn_and_write` from the small operations, for its gradient."""
    kv_heads = heads.shape[2] // (spec.group + 2)
    q, k, v = jnp.split(heads, [spec.group * kv_heads, (spec.group + 1) * kv_heads], axis=2)
    if norms is not None:
        q, k = (norm(a, scale, kind=spec.norm, eps=spec.eps) for a, scale in zip((q, k), norms, strict=True))
    cos, sin = angles or (None, None)
    if cache is None:
        if angles is not None:
            q, k = rope_reference.rope(q, cos, sin), rope_reference.rope(k, cos, sin)
        return q, LayerCache(**{n: jnp.swapaxes(a, 1, 2).astype(spec.fresh) for n, a in (("k", k), ("v", v))})
    return rope_reference.rope_cache(q, k, v, cos, sin, cache, rows=rows, positions=positions, write=write)


_turn_and_write.defvjp(_forward, _backward)
