"""Causal attention over a cache of keys and values: many query tokens (prefill) or few (decode)."""

import jax

from pallas_kernels.attention import reference
from pallas_kernels.errors import ShapeError
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.registry import choose, register, register_file

register("attention", "reference", reference.attention)
register_file("attention", "pallas", "pallas_kernels.attention.pallas")


def attention(
    q,
    cache: LayerCache,
    *,
    rows,
    positions,
    scale: float,
    soft_cap: float | None = None,
    window: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Grouped causal attention with float32 softmax.

        s = scale * q k^T,   with a soft cap c:  s = c tanh(s / c)
        o = softmax(s + mask) v                       query at position p sees the keys j of its row with max(0, p - window + 1) <= j <= p

    q: float [B, T, N, H], grouped by kv head (N = G K, heads kG..kG+G-1 share kv head k). cache: [R, K, S, H] arrays. rows: int32 [B]
    or None where the rows are the batch. positions: int32 [B, T]. scale: of the scores. soft_cap: positive, or None. window: int32
    scalar of at least 1, or None to see all keys up to p; an array, so that layers that differ in it share a program.
    Returns float32 [B, T, N, H]. Raises ShapeError. Source: Vaswani et al. 2017, arXiv:1706.03762; groups, Ainslie et al. 2023,
    arXiv:2305.13245; windows, Beltagy et al. 2020, arXiv:2004.05150; soft caps, Gemma 2, arXiv:2408.00118.
    """
    kv_heads = cache.k.shape[1]
    if q.ndim != 4 or q.shape[2] % kv_heads or q.shape[3] != cache.k.shape[3]:
        raise ShapeError(
            f"attention: q {list(q.shape)} does not fit keys {list(cache.k.shape)}: N must be a multiple of K, H the same"
        )
    if positions.shape != q.shape[:2]:
        raise ShapeError(f"attention: positions must be {list(q.shape[:2])}, got {list(positions.shape)}")
    if window is not None and window.shape != ():
        raise ShapeError(f"attention: window must be a scalar, got {list(window.shape)}")
    run = choose(
        "attention",
        implementation,
        shape=q.shape,
        kv_heads=kv_heads,
        tokens=cache.tokens,
        cache_dtype=str(cache.k.dtype),
        soft_cap=soft_cap,
        windowed=window is not None,
    )
    return run.function(q, cache, rows=rows, positions=positions, scale=scale, soft_cap=soft_cap, window=window)
