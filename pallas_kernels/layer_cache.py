"""The key/value cache of one layer, as the kernels see it.

Shapes: R rows (sequences that can be held), S cached tokens, K kv heads, H head_dim: [R, K, S, H], so that the tokens of one head
lie together. Kernels take row ids and positions, never a slice: a slice would be a copy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ShapeError

INT8 = jnp.dtype(jnp.int8)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v", "k_scale", "v_scale"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Keys and values [R, K, S, H] of one layer; with an int8 cache one float32 scale per head and token, [R, K, S].

    Unused positions must be finite: they are masked, not skipped.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @classmethod
    def zeros(cls, *, rows: int, kv_heads: int, tokens: int, head_dim: int, dtype) -> "LayerCache":
        """An empty cache; dtype float32, bfloat16, float16 or int8."""
        shape = (rows, kv_heads, tokens, head_dim)
        scale = jnp.zeros(shape[:-1], jnp.float32) if jnp.dtype(dtype) == INT8 else None
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), k_scale=scale, v_scale=scale)

    @property
    def rows(self) -> int:
        return self.k.shape[0]

    @property
    def tokens(self) -> int:
        return self.k.shape[2]

    def encode(self, k, v) -> "LayerCache":
        """New keys and values [..., H] in this cache's dtype, with their scales."""
        if self.k_scale is None:
            return LayerCache(k=k.astype(self.k.dtype), v=v.astype(self.v.dtype))
        (k, k_scale), (v, v_scale) = _to_int8(k), _to_int8(v)
        return LayerCache(k=k, v=v, k_scale=k_scale, v_scale=v_scale)

    def take(self, rows) -> "LayerCache":
        """The given rows, int32 [B]; None is all of them in order, which copies nothing."""
        return self if rows is None else jax.tree.map(lambda a: a[rows], self)


def _to_int8(x):
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), -1) / 127
    q = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None])
    return q.astype(jnp.int8), scale


def cache_dtype(name: str):
    """The dtype of a cache by name. Raises ShapeError for another one."""
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "int8": jnp.int8}
    if name not in known:
        raise ShapeError(f"kv cache dtype {name!r} is not one of {sorted(known)}")
    return known[name]
