"""Attention over a cache of latent vectors, which are keys and values of all heads at once."""

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ShapeError
from pallas_kernels.latent_attention import reference
from pallas_kernels.registry import choose, register, register_file

register("latent_attention", "reference", reference.latent_attention)
register_file("latent_attention", "pallas", "pallas_kernels.latent_attention.pallas")


def latent_attention(
    q, cache, *, values: int, positions, scale: float, rows=None, scales=None, implementation: str | None = None
) -> jax.Array:
    """Causal attention in the latent space of multi-head latent attention, for decoding.

        s_j = scale q . c_j           o = sum_j softmax(s)_j c_j[:C]           query at position p sees the tokens j <= p of its row

    q: float [B, T, N, C + P], queries times the keys' up-projection, then their rotated part. cache: [R, S, C + P], of each token its
    latent vector, then its rotated key, float32, bfloat16, float16, int8 or float8_e4m3fn. values: C, the elements that are values too.
    positions: int32 [B, T]. scale: of the scores. rows: int32 [B], None where the rows are the batch, or block tables int32 [B, n]: token
    j of a sequence is token j mod S of row rows[b, j div S]. scales: float32 [R, S], of the tokens of an 8-bit cache, or None.
    Returns float32 [B, T, N, C], to be multiplied by the values' up-projection; 0 for a query that sees nothing. Raises ShapeError.
    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """
    if q.ndim != 4 or cache.ndim != 3 or q.shape[3] != cache.shape[2] or not 0 < values <= q.shape[3]:
        raise ShapeError(
            f"latent_attention: q [B, T, N, C + P] {list(q.shape)}, cache [R, S, C + P] {list(cache.shape)} and C = {values} do not fit"
        )
    if positions.shape != q.shape[:2]:
        raise ShapeError(f"latent_attention: positions must be {list(q.shape[:2])}, got {list(positions.shape)}")
    if (cache.shape[0] if rows is None else rows.shape[0]) != q.shape[0] or (rows is not None and rows.ndim not in (1, 2)):
        given = f"{cache.shape[0]} rows of a cache" if rows is None else f"rows {list(rows.shape)}"
        raise ShapeError(f"latent_attention: {given} do not fit a batch of {q.shape[0]}; give rows [B], or tables [B, n]")
    if (cache.dtype.itemsize == 1) != (scales is not None) or (scales is not None and scales.shape != cache.shape[:2]):
        wanted = f"scales {list(cache.shape[:2])}" if cache.dtype.itemsize == 1 else "no scales"
        raise ShapeError(
            f"latent_attention: a cache of {cache.dtype} has {wanted}, got {None if scales is None else scales.shape}"
        )
    run = choose(
        "latent_attention",
        implementation,
        shape=q.shape,
        values=values,
        tokens=cache.shape[1],
        cache_dtype=str(cache.dtype),
        paged=rows is not None and rows.ndim == 2,
    )
    return run.function(q, cache, values=values, positions=positions.astype(jnp.int32), scale=scale, rows=rows, scales=scales)
