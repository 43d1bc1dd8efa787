"""Causal attention over a cache of keys and values: many query tokens (prefill) or few (decode)."""

import jax

from pallas_kernels.attention import reference
from pallas_kernels.errors import ShapeError
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.registry import choose, register

register("attention", "reference", reference.attention)


def attention(q, cache: LayerCache, *, rows, positions, scale: float, implementation: str | None = None) -> jax.Array:
    """Grouped causal attention with float32 softmax.

        o = softmax(scale * q k^T + mask) v           query at position p sees the keys 0..p of its row

    q: float [B, T, N, H], grouped by kv head (N = G K, heads kG..kG+G-1 share kv head k). cache: [R, K, S, H] arrays. rows: int32 [B]
    or None where the rows are the batch. positions: int32 [B, T]. scale: of the scores. Returns float32 [B, T, N, H].
    Raises ShapeError. Source: Vaswani et al. 2017, arXiv:1706.03762; groups, Ainslie et al. 2023, arXiv:2305.13245.
    """
    kv_heads = cache.k.shape[1]
    if q.ndim != 4 or q.shape[2] % kv_heads or q.shape[3] != cache.k.shape[3]:
        raise ShapeError(
            f"attention: q {list(q.shape)} does not fit keys {list(cache.k.shape)}: N must be a multiple of K, H the same"
        )
    if positions.shape != q.shape[:2]:
        raise ShapeError(f"attention: positions must be {list(q.shape[:2])}, got {list(positions.shape)}")
    run = choose("attention", implementation, shape=q.shape, tokens=cache.tokens, cache_dtype=str(cache.k.dtype))
    return run.function(q, cache, rows=rows, positions=positions, scale=scale)
