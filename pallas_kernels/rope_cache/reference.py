"""The meaning of `rope` and `rope_cache` in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax


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
    new = cache.encode(k, v)
    if write is None and q.shape[1] == 1:
        # one token a row: slice updates take a third of a scatter's time on XLA:CPU. Without the barrier XLA writes one copy of the
        # cache for the attention and one for the result
        return q, lax.optimization_barrier(jax.tree.map(lambda c, n: _put_rows(c, n, rows, positions[:, 0]), cache, new))
    rows = jnp.arange(q.shape[0]) if rows is None else rows
    where = positions if write is None else jnp.where(write, positions, cache.tokens)  # past the end: dropped

    def put(c, n):
        return c.at[rows[:, None], :, where].set(n, mode="drop")

    return q, jax.tree.map(put, cache, new)


def _put_rows(cache, new, rows, positions):
    new = jnp.swapaxes(new, 1, 2)  # [B, 1, K, ...] -> [B, K, 1, ...]
    for b in range(new.shape[0]):
        start = (b if rows is None else rows[b], 0, positions[b], *[0] * (cache.ndim - 3))
        cache = lax.dynamic_update_slice(cache, new[b : b + 1], start)
    return cache
