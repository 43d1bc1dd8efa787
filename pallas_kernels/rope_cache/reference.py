"""The meaning of `rope` and `rope_cache` in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.rope_cache import int4


def rope(x, cos, sin, *, interleaved=False):
    half = cos.shape[-1]
    x = x.astype(jnp.float32)
    cos, sin = cos[:, :, None], sin[:, :, None]  # over the heads
    if interleaved:
        a, b = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
        pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(*x.shape[:-1], 2 * half)
        return jnp.concatenate([pairs, x[..., 2 * half :]], -1)
    a, b = x[..., :half], x[..., half : 2 * half]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)


def rope_cache(q, k, v, cos, sin, cache, *, rows, positions, write, interleaved=False):
    if cos is not None:
        heads = q.shape[2]
        rotated = rope(jnp.concatenate([q, k], 2), cos, sin, interleaved=interleaved)  # one pass over both
        q, k = rotated[:, :, :heads], rotated[:, :, heads:]
    if cache.format == "int4":
        return q, lax.optimization_barrier(int4.append(cache, k, v, rows=rows, positions=positions, write=write))
    new = cache.encode(k, v)
    if rows is not None and rows.ndim == 2:
        rows, positions = in_pages(rows, positions, cache.tokens)
    if write is None and q.shape[1] == 1:
        # one token a row. Without the barrier XLA writes one copy of the cache for the attention and one for the result
        row = rows if rows is None or rows.ndim == 1 else rows[:, 0]
        put_row = lambda c, n: int4.put_rows(c, jnp.swapaxes(n, 1, 2), row, positions[:, 0])
        return q, lax.optimization_barrier(jax.tree.map(put_row, cache, new))
    rows = jnp.arange(q.shape[0]) if rows is None else rows
    rows = rows[:, None] if rows.ndim == 1 else rows
    where = positions if write is None else jnp.where(write, positions, cache.tokens)  # past the end: dropped

    def put(c, n):
        return c.at[rows, :, where].set(n, mode="drop")

    return q, jax.tree.map(put, cache, new)


def in_pages(tables, positions, page: int):
    """Block tables [B, P] and positions [B, T] -> rows of the cache and tokens of them, [B, T] each; past the last page: past the end."""
    number = jnp.minimum(positions // page, tables.shape[1] - 1)
    return jnp.take_along_axis(tables, number, 1), jnp.where(positions < tables.shape[1] * page, positions % page, page)
