"""Rotary positions on queries and keys, and the write of keys and values into the cache, as one operation."""

import jax

from pallas_kernels.errors import ShapeError
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.registry import choose, register, register_file
from pallas_kernels.rope_cache import reference

register("rope", "reference", reference.rope)
register("rope_cache", "reference", reference.rope_cache)
for _op in ("rope", "rope_cache"):
    register_file(_op, "pallas", "pallas_kernels.rope_cache.pallas")


def rope(x, cos, sin, *, interleaved: bool = False, implementation: str | None = None) -> jax.Array:
    """Rotate heads.

        y[i] = x[i] cos[i] - x[i + R/2] sin[i],  y[i + R/2] = x[i + R/2] cos[i] + x[i] sin[i],   i < R/2; x[R:] unchanged

    interleaved: the pairs are x[2i], x[2i + 1] instead. x: float [B, T, N, H]. cos, sin: float32 [B, T, R/2] with R <= H (partial
    rotary). Returns float32 [B, T, N, H]. Raises ShapeError. Source: Su et al. 2021, arXiv:2104.09864, whose layout is the interleaved
    one; halves are that of GPT-NeoX and Hugging Face.
    """
    _check_angles("rope", x, cos, sin)
    return choose("rope", implementation, shape=x.shape).function(x, cos, sin, interleaved=interleaved)


def rope_cache(
    q,
    k,
    v,
    cos,
    sin,
    cache: LayerCache,
    *,
    rows,
    positions,
    write=None,
    interleaved: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, LayerCache]:
    """`rope` on q and k, then keys and values written into their rows of the cache.

    q: float [B, T, N, H]; k, v: float [B, T, K, H]. cos, sin: see `rope`, or None where nothing is rotated. cache: [R, K, S, H] arrays.
    rows: int32 [B], the cache row of each sequence, None where the rows are the batch, or block tables int32 [B, P]: the token at position
    p of a sequence is token p mod S of row rows[b, p div S], and no two sequences write to one page. positions: int32 [B, T], where each
    token goes. write: bool [B, T]; False drops the write, and so does a position past S, or past the P pages; None writes all, which lie
    within. Of an int4 cache, which has no tables, the positions of a sequence follow one another, and what is dropped comes last.
    interleaved: see `rope`. Returns the rotated q, float32 [B, T, N, H], and the cache. Raises ShapeError.
    """
    if cos is not None:
        _check_angles("rope_cache", q, cos, sin)
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or (k.shape[2], k.shape[3]) != (cache.k.shape[1], cache.head_dim):
        raise ShapeError(f"rope_cache: k {list(k.shape)} and v {list(v.shape)} do not fit a cache {list(cache.k.shape)}")
    if rows is None and cache.rows != q.shape[0]:
        raise ShapeError(f"rope_cache: without row ids the cache must have {q.shape[0]} rows, it has {cache.rows}")
    check_rows("rope_cache", rows, cache, q.shape[0])
    run = choose("rope_cache", implementation, shape=q.shape, cache_dtype=str(cache.k.dtype))
    return run.function(q, k, v, cos, sin, cache, rows=rows, positions=positions, write=write, interleaved=interleaved)


def check_rows(op: str, rows, cache: LayerCache, batch: int) -> None:
    """Raises ShapeError for row ids or block tables that do not fit a batch, and for tables of an int4 cache."""
    if rows is None:
        return
    if rows.ndim not in (1, 2) or rows.shape[0] != batch:
        raise ShapeError(f"{op}: rows {list(rows.shape)} do not fit a batch of {batch}; give rows [B], or tables [B, P]")
    if rows.ndim == 2 and cache.format == "int4":
        raise ShapeError(f"{op}: an int4 cache has no block tables, because its newest keys belong to a row; give rows [B]")


def _check_angles(op, x, cos, sin):
    if x.ndim != 4 or cos.shape != sin.shape or cos.shape[:2] != x.shape[:2] or 2 * cos.shape[2] > x.shape[3]:
        raise ShapeError(
            f"{op}: heads must be [B, T, N, H] and angles [B, T, R/2] with R <= H, got {list(x.shape)} and {list(cos.shape)}"
        )
