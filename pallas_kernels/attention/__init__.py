"""Attention over a cache of keys and values: many query tokens (prefill, training) or few (decode)."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference
from pallas_kernels.attention.terms import PLAIN, AttentionTerms, check_terms
from pallas_kernels.cpu import operations as native
from pallas_kernels.errors import ShapeError
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.registry import choose, register, register_file

register("attention", "reference", reference.attention)
register("attention", "native", native.attention, supports=native.supports_attention, priority=native.PRIORITY)
register_file("attention", "pallas", "pallas_kernels.attention.pallas")
# behind the others until it was measured beside them; by name it runs on Hopper
register_file("attention", "mosaic", "pallas_kernels.attention.mosaic", priority=-5)
register_file("attention", "cudnn", "pallas_kernels.attention.cudnn", priority=-10)  # behind the reference: where it is named


def attention(
    q,
    cache: LayerCache,
    *,
    rows,
    positions,
    scale: float,
    soft_cap: float | None = None,
    window: jax.Array | None = None,
    terms: AttentionTerms = PLAIN,
    out_dtype=jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Grouped attention with float32 softmax.

        s = scale * q k^T,   with a soft cap c:  s = c tanh(s / c),   then what `terms` add
        o = softmax(s + mask) v                       query at position p sees the keys j of its row with max(0, p - window + 1) <= j <= p

    q: float [B, T, N, H], grouped by kv head (N = G K, heads kG..kG+G-1 share kv head k). cache: [R, K, S, H] arrays. rows: int32 [B],
    None where the rows are the batch, or block tables int32 [B, P]: key j of a sequence is token j mod S of row rows[b, j div S], and all
    of a table can be read. positions: int32 [B, T], or None for 0 .. T-1. scale: of the scores. soft_cap: positive, or None. window: int32
    scalar of at least 1, or None to see all keys up to p; an array, so that layers that differ in it share a program. terms: see
    `AttentionTerms`; without its causality a query sees all keys of its sequence, within a window those with |p - j| < window.
    Returns out_dtype [B, T, N, H], rounded once at the end; a query that sees no key gets 0. Differentiable. Raises ShapeError.
    Source: Vaswani et al. 2017, arXiv:1706.03762; groups, Ainslie et al. 2023, arXiv:2305.13245; windows, Beltagy et al. 2020,
    arXiv:2004.05150; soft caps, Gemma 2, arXiv:2408.00118; block tables, Kwon et al. 2023, arXiv:2309.06180.
    """
    kv_heads = cache.k.shape[1]
    if q.ndim != 4 or q.shape[2] % kv_heads or q.shape[3] != cache.head_dim:
        raise ShapeError(
            f"attention: q {list(q.shape)} does not fit keys {list(cache.k.shape)}: N must be a multiple of K, H the same"
        )
    if positions is not None and positions.shape != q.shape[:2]:
        raise ShapeError(f"attention: positions must be {list(q.shape[:2])}, got {list(positions.shape)}")
    if window is not None and window.shape != ():
        raise ShapeError(f"attention: window must be a scalar, got {list(window.shape)}")
    batch = cache.rows if rows is None else rows.shape[0]
    if batch != q.shape[0] or (rows is not None and rows.ndim not in (1, 2)):
        given = f"{cache.rows} rows of a cache" if rows is None else f"rows {list(rows.shape)}"
        raise ShapeError(f"attention: {given} do not fit a batch of {q.shape[0]}; give rows [B], or tables [B, P]")
    if rows is not None and rows.ndim == 2 and cache.format == "int4":
        raise ShapeError("attention: an int4 cache has no block tables, because its newest keys belong to a row; give rows [B]")
    check_terms(terms, q.shape[0], q.shape[2])
    run = choose(
        "attention",
        implementation,
        shape=q.shape,
        kv_heads=kv_heads,
        tokens=cache.tokens,
        cache_dtype=str(cache.k.dtype),
        cache_format=cache.format,
        soft_cap=soft_cap,
        windowed=window is not None,
        paged=rows is not None and rows.ndim == 2,
        gathered=rows is not None,
        numbered=positions is None,
        causal=terms.causal,
        terms=terms.given,
    )
    return run.function(
        q,
        cache,
        rows=rows,
        positions=positions,
        scale=scale,
        soft_cap=soft_cap,
        window=window,
        terms=terms,
        out_dtype=jnp.dtype(out_dtype),
    )
