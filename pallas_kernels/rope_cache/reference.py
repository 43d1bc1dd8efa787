"""The meaning of `rope` and `rope_cache` in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax


def rope(x, cos, sin):
    half = cos.shape[-1]
    x = x.astype(jnp.float32)
    cos, sin = cos[:, :, None], sin[:, :, None]  # over the heads
    a, b = x[..., :half], x[..., half : 2 * half]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)


def rope_cache(q, k, v, cos, sin, cache, *, rows, positions, write):
    heads = q.shape[2]
    rotated = rope(jnp.concatenate([q, k], 2), cos, sin)  # one pass over both
    q, k = rotated[:, :, :heads], rotated[:, :, heads:]
    new = cache.encode(k, v)
    if q.shape[:2] == (1, 1):
        # one token: a slice update is a third of a scatter's time on XLA:CPU. It clamps, so a dropped write puts back what was there.
        row = jnp.int32(0) if rows is None else rows[0]
        position, keep = positions[0, 0], write[0, 0] & (positions[0, 0] < cache.tokens)
        return q, jax.tree.map(lambda c, n: _put_one(c, n, row, position, keep), cache, new)
    rows = jnp.arange(q.shape[0]) if rows is None else rows
    where = jnp.where(write, positions, cache.tokens)  # past the end: dropped

    def put(c, n):
        return c.at[rows[:, None], :, where].set(n, mode="drop")

    return q, jax.tree.map(put, cache, new)


def _put_one(cache, new, row, position, keep):
    new = jnp.swapaxes(new, 1, 2)  # [1, 1, K, ...] -> [1, K, 1, ...]
    start = (row, 0, position, *[0] * (cache.ndim - 3))
    return lax.dynamic_update_slice(cache, jnp.where(keep, new, lax.dynamic_slice(cache, start, new.shape)), start)
