"""The key/value cache of one layer, as the kernels see it.

Shapes: R rows (sequences that can be held), S cached tokens, K kv heads, H head_dim: [R, K, S, H], so that the tokens of one head
lie together. Kernels take row ids and positions, never a slice: a slice would be a copy.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import ShapeError
from pallas_kernels.value_formats import FP8_MAX

GROUP = 32  # tokens of int4 keys that share scales, one for each channel
TOP = 15  # the largest nibble
_DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "int8": jnp.int8,
    "fp8": jnp.float8_e4m3fn,
    "int4": jnp.int4,
}
_FORMATS = {"float8_e4m3fn": "fp8", "uint8": "int4"}  # of stored values; others are called by their dtype
_SCALED = {"int8": 127, "fp8": FP8_MAX}  # a scale per head and token, and what its largest value becomes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v", "k_scale", "v_scale", "k_low", "v_low", "recent"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Keys and values [R, K, S, H] of one layer; an int8 or fp8 cache has one float32 scale per head and token, [R, K, S].

    int4: k and v are uint8 [R, K, S, H / 2], channel j in the low nibble of byte j, channel j + H / 2 in its high one; S is a multiple
    of 32. A nibble n stands for n * scale + low. Values: bfloat16 v_scale and v_low [R, K, S], per token. Keys: bfloat16 k_scale and
    k_low [R, K, S / 32, H], per channel of 32 tokens, since few channels of keys are large in all tokens. recent: bfloat16
    [R, K, 32, H], the keys of the group in which the row's last token lies, as they are: attention reads them instead of that group's
    nibbles, and every token that is added makes the nibbles of its group anew from them, so that no rounding is rounded again.
    Source: Liu et al. 2024, KIVI, arXiv:2402.02750.

    Unused positions must be finite: they are masked, not skipped.
    """

    ARRAYS: ClassVar = (
        "k",
        "v",
        "k_scale",
        "v_scale",
        "k_low",
        "v_low",
        "recent",
    )  # those of a format come before those it lacks

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    k_low: jax.Array | None = None
    v_low: jax.Array | None = None
    recent: jax.Array | None = None

    @classmethod
    def zeros(cls, *, rows: int, kv_heads: int, tokens: int, head_dim: int, dtype) -> "LayerCache":
        """An empty cache; dtype float32, bfloat16, float16, int8, float8_e4m3fn or int4, which holds whole groups of 32 tokens.

        Raises ShapeError for int4 with an odd head_dim.
        """
        if jnp.dtype(dtype) == jnp.int4:
            if head_dim % 2:
                raise ShapeError(f"an int4 cache packs two channels to a byte, and head_dim is {head_dim}; choose int8 or fp8")
            groups = -(-tokens // GROUP)
            shape, by_token = (rows, kv_heads, groups * GROUP, head_dim // 2), (rows, kv_heads, groups * GROUP)
            low = lambda shape: jnp.zeros(shape, jnp.bfloat16)
            return cls(
                k=jnp.zeros(shape, jnp.uint8),
                v=jnp.zeros(shape, jnp.uint8),
                k_scale=low((rows, kv_heads, groups, head_dim)),
                v_scale=low(by_token),
                k_low=low((rows, kv_heads, groups, head_dim)),
                v_low=low(by_token),
                recent=low((rows, kv_heads, GROUP, head_dim)),
            )
        shape = (rows, kv_heads, tokens, head_dim)
        scaled = jnp.dtype(dtype) in (jnp.int8, jnp.float8_e4m3fn)
        scale = jnp.zeros(shape[:-1], jnp.float32) if scaled else None
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), k_scale=scale, v_scale=scale)

    @property
    def arrays(self) -> tuple[jax.Array | None, ...]:
        """In the order of ARRAYS."""
        return tuple(getattr(self, name) for name in self.ARRAYS)

    @property
    def format(self) -> str:
        """One of the names of `cache_dtype`."""
        return _FORMATS.get(str(self.k.dtype), str(self.k.dtype))

    @property
    def rows(self) -> int:
        return self.k.shape[0]

    @property
    def tokens(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3] * (2 if self.format == "int4" else 1)

    def encode(self, k, v) -> "LayerCache":
        """New keys and values [..., H] in this cache's dtype, with their scales. Not for int4, whose keys depend on their neighbours."""
        top = _SCALED.get(self.format)
        if top is None:
            return LayerCache(k=k.astype(self.k.dtype), v=v.astype(self.v.dtype))
        (k, k_scale), (v, v_scale) = (scaled_levels(a, top, self.k.dtype) for a in (k, v))
        return LayerCache(k=k, v=v, k_scale=k_scale, v_scale=v_scale)

    def encode_rows(self, k, v, lengths) -> "LayerCache":
        """Whole rows [B, K, T, H] from their first token on, of which lengths int32 [B] are real, as a cache of B rows."""
        if self.format != "int4":
            return self.encode(k, v)
        pad = [(0, 0), (0, 0), (0, -k.shape[2] % GROUP), (0, 0)]
        keys = jnp.pad(k.astype(jnp.bfloat16), pad).reshape(*k.shape[:2], -1, GROUP, k.shape[3])
        real = jnp.arange(keys.shape[2] * GROUP) < lengths[:, None]
        recent = jnp.take_along_axis(keys, jnp.maximum((lengths - 1) // GROUP, 0)[:, None, None, None, None], 2)[:, :, 0]
        packed, k_scale, k_low = _keys_to_int4(keys, real)
        values, v_scale, v_low = _values_to_int4(jnp.pad(v, pad))
        return LayerCache(k=packed, v=values, k_scale=k_scale, v_scale=v_scale, k_low=k_low, v_low=v_low, recent=recent)

    def take(self, rows) -> "LayerCache":
        """The given rows, int32 [B]; None is all of them in order, which copies nothing."""
        return self if rows is None else jax.tree.map(lambda a: a[rows], self)

    def floats(self, last) -> "LayerCache":
        """An int4 cache as float32 keys and values [R, K, S, H]; last: int32 [R], the last token of each row, in whose group keys are
        as they were."""
        assert self.k_scale is not None and self.k_low is not None and self.recent is not None
        assert self.v_scale is not None and self.v_low is not None
        R, K, S, _ = self.k.shape
        wide = lambda a: a.astype(jnp.float32)
        keys = _unpacked(self.k).reshape(R, K, S // GROUP, GROUP, -1)
        keys = keys * wide(self.k_scale)[:, :, :, None] + wide(self.k_low)[:, :, :, None]
        own = jnp.arange(S // GROUP)[None] == (last // GROUP)[:, None]
        keys = jnp.where(own[:, None, :, None, None], wide(self.recent)[:, :, None], keys)
        values = _unpacked(self.v) * wide(self.v_scale)[..., None] + wide(self.v_low)[..., None]
        return LayerCache(k=keys.reshape(R, K, S, -1), v=values)

    def appended(self, k, v, *, rows, positions, write) -> "LayerCache":
        """What adding tokens to rows int32 [B] of an int4 cache writes, None for all rows. k, v: [B, T, K, H]. positions: int32 [B, T],
        one after the other in each row. write: bool [B, T], False for the last tokens of a row only, or None.

        Returns values of the T tokens, and keys of n groups, n = 1 for one token: group `positions[:, 0] // 32` and those that follow.
        """
        assert self.recent is not None
        B, T, K, H = k.shape
        old = self.recent if rows is None else self.recent[rows]
        n = -(-(T + GROUP - 1) // GROUP)
        offset, place = positions[:, 0] % GROUP, jnp.arange(n * GROUP)
        count = jnp.full((B,), T) if write is None else jnp.sum(write, 1)
        k = jnp.swapaxes(k, 1, 2).astype(old.dtype)
        if T == 1:
            keys = jnp.where((place == offset[:, None])[:, None, :, None], k, old)
        else:
            # where a token of the groups comes from: the recent ones, then the new ones
            source = jnp.where(place < offset[:, None], place, GROUP + jnp.clip(place - offset[:, None], 0, T - 1))
            keys = jnp.take_along_axis(jnp.concatenate([old, k], 2), source[:, None, :, None], 2)
        keys = keys.reshape(B, K, n, GROUP, H)
        real = place < (offset + count)[:, None]
        packed, k_scale, k_low = _keys_to_int4(keys, real)
        values, v_scale, v_low = _values_to_int4(jnp.swapaxes(v, 1, 2))
        last = jnp.maximum(offset + count - 1, 0) // GROUP
        recent = keys[:, :, 0] if n == 1 else jnp.take_along_axis(keys, last[:, None, None, None, None], 2)[:, :, 0]
        if write is not None:
            recent = jnp.where((count > 0)[:, None, None, None], recent, old)
        return LayerCache(k=packed, v=values, k_scale=k_scale, v_scale=v_scale, k_low=k_low, v_low=v_low, recent=recent)


def scaled_levels(x, top: float, dtype) -> tuple[jax.Array, jax.Array]:
    """x [..., H] as levels of int8 or fp8, the largest of which is `top`, and their scales float32 [...]."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), -1) / top
    q = x / jnp.where(scale == 0, 1, scale)[..., None]
    q = jnp.round(q) if dtype == jnp.int8 else jnp.clip(q, -top, top)  # what lies beyond the largest fp8 would become NaN
    return q.astype(dtype), scale


def _keys_to_int4(keys, real):
    """keys [B, K, n, 32, H], of which real bool [B, n * 32] count -> uint8 [B, K, n * 32, H / 2], scales and minima [B, K, n, H]."""
    B, K, n, _, H = keys.shape
    keys, real = keys.astype(jnp.float32), real.reshape(B, 1, n, GROUP, 1)
    low = jnp.min(jnp.where(real, keys, jnp.inf), 3)
    high = jnp.max(jnp.where(real, keys, -jnp.inf), 3)
    some = jnp.any(real, 3)  # a group without tokens has no range
    low, high = jnp.where(some, low, 0), jnp.where(some, high, 0)
    levels, scale, low = _nibbles(keys, low, high, axis=3)
    levels = jnp.where(real, levels, 0)
    return _packed(levels).reshape(B, K, n * GROUP, H // 2), scale, low


def _values_to_int4(v):
    """v [..., H] -> uint8 [..., H / 2], scales and minima [...]."""
    v = v.astype(jnp.float32)
    levels, scale, low = _nibbles(v, jnp.min(v, -1), jnp.max(v, -1), axis=-1)
    return _packed(levels), scale, low


def _nibbles(x, low, high, *, axis: int):
    """Levels 0..15 of x, uint8, with bfloat16 scales and minima; rounded with these as they are stored."""
    low = low.astype(jnp.bfloat16)
    wide = low.astype(jnp.float32)
    scale = ((high - wide) * np.float32(1 / TOP)).astype(jnp.bfloat16)  # the product that XLA makes of a division
    step = jnp.where(scale == 0, 1, scale).astype(jnp.float32)
    levels = (x - jnp.expand_dims(wide, axis)) / jnp.expand_dims(step, axis)
    return jnp.clip(jnp.round(levels), 0, TOP).astype(jnp.uint8), scale, low


def _packed(levels):
    half = levels.shape[-1] // 2
    return levels[..., :half] | (levels[..., half:] << 4)


def _unpacked(packed):
    """uint8 [..., H / 2] -> levels as float32 [..., H]."""
    return jnp.concatenate([packed & 15, packed >> 4], -1).astype(jnp.float32)


def cache_dtype(name: str):
    """The dtype of a cache by name. Raises ShapeError for another one."""
    if name not in _DTYPES:
        raise ShapeError(f"kv cache dtype {name!r} is not one of {sorted(_DTYPES)}")
    return _DTYPES[name]


def token_bytes(dtype, head_dim: int) -> int:
    """Bytes that a token takes in the keys and values of one head, scales included; of int4 a 32nd of a group. dtype: a name or dtype."""
    kind = jnp.dtype(cache_dtype(dtype) if isinstance(dtype, str) else dtype)
    if kind == jnp.int4:
        return head_dim + -(-4 * head_dim // GROUP) + 4
    scales = 8 if kind in (jnp.int8, jnp.float8_e4m3fn) else 0
    return 2 * head_dim * kind.itemsize + scales
