"""The write of new tokens into an int4 cache: their values, and the groups of 32 tokens that their keys lie in, made anew."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from pallas_kernels.layer_cache import GROUP, LayerCache

BY_GROUP = ("k_scale", "k_low")  # along the third axis; others are by token


def append(cache: LayerCache, k, v, *, rows, positions, write) -> LayerCache:
    """k, v: float [B, T, K, H] -> the cache with them; see `rope_cache` for what else it takes."""
    assert cache.recent is not None
    B, T = positions.shape
    if write is not None:
        write = write & (positions < cache.tokens)
    first = positions[:, 0]
    group = first // GROUP
    one = write is None and T == 1
    if one:  # before it is read, so that it is changed where it lies
        key = jnp.swapaxes(k, 1, 2).astype(cache.recent.dtype)
        cache = dataclasses.replace(cache, recent=put_rows(cache.recent, key, rows, first % GROUP))
    new = cache.appended(k, v, rows=rows, positions=positions, write=write)
    if one:
        starts = {name: group for name in BY_GROUP} | {"k": group * GROUP}
        put = lambda name, whole, part: whole if name == "recent" else put_rows(whole, part, rows, starts.get(name, first))
    else:
        rows = jnp.arange(B) if rows is None else rows
        end = first + (T if write is None else jnp.sum(write, 1))
        past = lambda at, size: jnp.where((at * size < end[:, None]) & (end > first)[:, None], at, cache.tokens)  # dropped
        run = lambda start, part: start[:, None] + jnp.arange(part.shape[2])

        def put(name, whole, part):
            if name == "recent":
                return whole.at[rows].set(part)
            size = GROUP if name in BY_GROUP else 1
            start = group if name in BY_GROUP else group * GROUP if name == "k" else first
            return whole.at[rows[:, None], :, past(run(start, part), size)].set(jnp.swapaxes(part, 1, 2), mode="drop")

    names = [field.name for field in dataclasses.fields(cache)]
    return LayerCache(**{name: put(name, getattr(cache, name), getattr(new, name)) for name in names})


def put_rows(whole, part, rows, starts):
    """part [B, K, n, ...] at tokens from starts [B] on of rows [B] (None: 0 .. B-1) of [R, K, S, ...]; slices, which take a third of a
    scatter's time on XLA:CPU."""
    for b in range(part.shape[0]):
        at = (b if rows is None else rows[b], 0, starts[b], *[0] * (whole.ndim - 3))
        whole = lax.dynamic_update_slice(whole, part[b : b + 1], at)
    return whole
