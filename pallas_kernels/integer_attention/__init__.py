"""Causal attention whose products are of integers: queries, keys, weights and values in 8 bits, with dynamic ranges."""

import jax

from pallas_kernels.errors import ShapeError
from pallas_kernels.integer_attention import reference
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.registry import choose, register

register("integer_attention", "reference", reference.integer_attention)

CACHES = ("float32", "bfloat16", "float16", "int8")
MOST_TOKENS = 2**31 // (255 * 127)  # of which the largest sum of products fits int32


def integer_attention(
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
    """`attention` with products of integers, accumulated in int32, and float32 softmax.

        s = scale * a b_j (q' k'_j),                   q ~ a q', k_j ~ b_j k'_j:  levels -127..127, a scale per head and token
        w_j = exp(s_j - max s) c_j,                    v_j ~ c_j v'_j
        o = m (w' v') / sum exp(s - max s),            w ~ m w':  levels 0..255, a scale per head and query

    What it takes and returns: see `attention`. cache: keys and values of float32, bfloat16 or float16 are rounded here; an int8 cache is
    read as it is. Levels have no gradient, so that none reaches q or the cache but through scales. Raises ShapeError for other caches and
    for more tokens than int32 sums hold (66,311).
    Source: dynamic ranges as in ZeroQuant, Yao et al. 2022, arXiv:2206.01861; SageAttention, Zhang et al. 2024, arXiv:2410.02367, whose
    queries and keys are INT8 too.
    """
    kv_heads = cache.k.shape[1]
    if cache.format not in CACHES:
        raise ShapeError(f"integer_attention takes caches of {', '.join(CACHES)}, not {cache.format}")
    if q.ndim != 4 or q.shape[2] % kv_heads or q.shape[3] != cache.head_dim or positions.shape != q.shape[:2]:
        raise ShapeError(
            f"integer_attention: q {list(q.shape)} and positions {list(positions.shape)} do not fit keys {list(cache.k.shape)}"
        )
    if cache.tokens > MOST_TOKENS:
        raise ShapeError(f"integer_attention: sums over {cache.tokens} tokens may leave int32; {MOST_TOKENS} always fit")
    run = choose("integer_attention", implementation, shape=q.shape, tokens=cache.tokens, cache_dtype=cache.format)
    return run.function(q, cache, rows=rows, positions=positions, scale=scale, soft_cap=soft_cap, window=window)
