"""Caches in fp8 and int4: what is read back, however it was written; groups of int4 keys, and the newest ones as they are."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.attention import attention
from pallas_kernels.errors import ShapeError
from pallas_kernels.layer_cache import GROUP, LayerCache, cache_dtype, token_bytes
from pallas_kernels.rope_cache import rope_cache

B, K, H, S = 3, 2, 8, 100  # 100 tokens are four groups of 32
LENGTHS = np.array([1, 40, 64], np.int32)


@pytest.fixture
def rows(rng):
    """Keys and values [B, T, K, H]; one channel of the keys is large in all tokens."""
    k, v = rng.normal(size=(2, B, 70, K, H)).astype(np.float32)
    k[..., 3] += 20
    return k, v


def empty(dtype="int4", rows=B) -> LayerCache:
    return LayerCache.zeros(rows=rows, kv_heads=K, tokens=S, head_dim=H, dtype=cache_dtype(dtype))


@jax.jit
def _write(cache, k, v, first, rows, write):
    positions = first[:, None] + jnp.arange(k.shape[1])
    return rope_cache(jnp.zeros(k.shape), k, v, None, None, cache, rows=rows, positions=positions, write=write)[1]


def write(cache, k, v, first, *, rows=None, write=None):
    return _write(cache, k, v, np.asarray(first, np.int32), rows, write)


def filled(cache, k, v, lengths, first=0):
    """The cache with each row's tokens first .. lengths - 1, one at a time; a row that has no more writes its last one again."""
    for t in range(first, max(lengths)):
        at = np.minimum(t, np.asarray(lengths) - 1)
        cache = write(cache, k[np.arange(B), at][:, None], v[np.arange(B), at][:, None], at)
    return cache


def rounded(x, axis):
    """16 levels between the smallest and the largest of an axis, with bfloat16 scales; float32, since bfloat16 numbers often tie."""
    narrow = lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32)
    low = narrow(x.min(axis, keepdims=True))
    step = narrow((x.max(axis, keepdims=True) - low) * np.float32(1 / 15))
    return np.clip(np.rint((x - low) / np.where(step == 0, 1, step)), 0, 15) * step + low


def expected(k, v, length):
    """Keys and values [length, K, H] of one row as an int4 cache holds them."""
    k, v = k[:length].astype(ml_dtypes.bfloat16).astype(np.float32), v[:length]
    whole = (length - 1) // GROUP * GROUP
    groups = [rounded(k[at : at + GROUP], 0) for at in range(0, whole, GROUP)]
    return np.concatenate([*groups, k[whole:]]), rounded(v, -1)


def check(cache, k, v, lengths):
    """A number in the middle between two levels, of which there are few, may come out as either."""
    read = cache.floats(jnp.asarray(lengths) - 1)
    for b, length in enumerate(lengths):
        for found, truth in zip((read.k, read.v), expected(k[b], v[b], length), strict=True):
            error = np.abs(np.swapaxes(found[b, :, :length], 0, 1) - truth)
            wrong = error > 1e-5 * (1 + np.abs(truth))
            assert wrong.sum() <= 1 + 0.005 * wrong.size and error.max() < 1


def test_int4_one_token_at_a_time(rows):
    check(filled(empty(), *rows, LENGTHS), *rows, LENGTHS)


def test_int4_whole_rows_are_what_single_tokens_give(rows):
    """What lies past a row's length has no part in its scales; what comes after goes on where the row ends."""
    k, v = (np.swapaxes(a, 1, 2).copy() for a in rows)
    for b, length in enumerate(LENGTHS):
        k[b, :, length:] = v[b, :, length:] = 1e4
    read = empty().encode_rows(jnp.asarray(k), jnp.asarray(v), jnp.asarray(LENGTHS))
    check(read, *rows, LENGTHS)
    whole = jax.tree.map(lambda a, b: a.at[:, :, : b.shape[2]].set(b[:, :, : a.shape[2]]), empty(), read)
    longer = LENGTHS + 3
    for t in range(3):
        at = LENGTHS + t
        whole = write(whole, rows[0][np.arange(B), at][:, None], rows[1][np.arange(B), at][:, None], at)
    check(whole, *rows, longer)


@pytest.mark.parametrize(
    "chunks", [(1, 31, 38), *(pytest.param(c, marks=pytest.mark.slow) for c in [(5, 5, 5, 50), (70,), (33, 1, 1, 1, 34)])]
)
def test_int4_chunks_are_what_single_tokens_give(rows, chunks):
    cache, at = empty(), 0
    for n in chunks:
        cache = write(cache, rows[0][:, at : at + n], rows[1][:, at : at + n], [at] * B)
        at += n
        check(cache, *rows, [at] * B)


def test_int4_rows_and_dropped_tokens(rows):
    """Rows by id; tokens that are dropped, at the end of a row, leave it as it was."""
    k, v = rows
    cache = filled(empty(), k, v, [20, 20, 20])
    ids, first = jnp.array([2, 0]), [20, 20]
    keep = np.arange(30) < np.array([[25], [0]])
    new = write(cache, k[[2, 0], 20:50], v[[2, 0], 20:50], first, rows=ids, write=jnp.asarray(keep))
    check(new, k, v, [20, 20, 45])
    untouched = [jax.tree.map(lambda a: np.asarray(a[:2]), c) for c in (cache, new)]
    jax.tree.map(np.testing.assert_array_equal, *untouched)
    one = write(cache, k[[2, 0], 20:21], v[[2, 0], 20:21], first, rows=ids)
    check(one, k, v, [21, 20, 21])
    past = write(cache, k[:2, :5], v[:2, :5], [126, 20], rows=jnp.array([0, 1]), write=jnp.ones((2, 5), bool))
    assert np.isfinite(np.asarray(past.floats(jnp.full(3, 99)).k)).all()
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(lambda a: np.asarray(a[2:]), c) for c in (cache, past)))


def test_a_slot_is_used_again(rows):
    """A new sequence begins where an old, longer one was: nothing of that shows."""
    k, v = rows
    old = filled(empty(), k[:, ::-1] * 50, v[:, ::-1] * 50, [70] * B)
    check(filled(old, k, v, LENGTHS), k, v, LENGTHS)


@pytest.mark.parametrize("window", [None, 7, 40])
def test_int4_attention(rows, rng, window):
    """As attention over the numbers that the cache stands for, grouped heads and windows too."""
    k, v = rows
    q = jnp.asarray(rng.normal(size=(B, 1, 2 * K, H)), jnp.float32)
    cache = filled(empty(), k, v, LENGTHS)
    run = lambda cache: attention(
        q, cache, rows=None, positions=LENGTHS[:, None] - 1, scale=0.3, window=None if window is None else jnp.int32(window)
    )
    found = np.asarray(run(cache))
    check(cache, k, v, LENGTHS)
    np.testing.assert_allclose(found, run(cache.floats(jnp.asarray(LENGTHS) - 1)), atol=2e-5)
    ids = jnp.array([1, 0])
    part = attention(q[ids], cache, rows=ids, positions=LENGTHS[[1, 0], None] - 1, scale=0.3)
    np.testing.assert_allclose(part, attention(q, cache, rows=None, positions=LENGTHS[:, None] - 1, scale=0.3)[ids], atol=1e-6)


def test_fp8(rows):
    k, v = rows
    cache = filled(empty("fp8"), k, v, LENGTHS)
    for b, length in enumerate(LENGTHS):
        for levels, scale, whole in ((cache.k, cache.k_scale, k), (cache.v, cache.v_scale, v)):
            numbers = np.asarray(levels[b, :, :length], np.float32) * np.asarray(scale[b, :, :length])[..., None]
            truth = np.swapaxes(whole[b, :length], 0, 1)
            assert np.abs(numbers - truth).max() <= np.abs(truth).max() / 28 and np.isfinite(numbers).all()
            np.testing.assert_allclose(numbers, truth, rtol=1 / 15, atol=np.abs(truth).max() / 2**9)
    assert cache.k.dtype == jnp.float8_e4m3fn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "fp8", "int4"])
def test_bytes(dtype):
    """As the arrays have, but for the newest keys of int4."""
    cache = LayerCache.zeros(rows=1, kv_heads=1, tokens=64, head_dim=64, dtype=cache_dtype(dtype))
    size = sum(a.nbytes for a in jax.tree.leaves(cache)) - (0 if cache.recent is None else cache.recent.nbytes)
    assert size == 64 * token_bytes(dtype, 64) and cache.format == dtype and cache.head_dim == 64
    assert token_bytes("int4", 64) == 76 < token_bytes("fp8", 64) == 136


def test_refusals(rng):
    with pytest.raises(ShapeError, match="'int3' is not one of"):
        cache_dtype("int3")
    with pytest.raises(ShapeError, match="head_dim is 7; choose int8 or fp8"):
        LayerCache.zeros(rows=1, kv_heads=1, tokens=8, head_dim=7, dtype=jnp.int4)
    with pytest.raises(ShapeError, match="int4 cache has no block tables"):
        tables = jnp.zeros((B, 1), jnp.int32)
        attention(jnp.zeros((B, 1, K, H)), empty(), rows=tables, positions=jnp.zeros((B, 1), jnp.int32), scale=1.0)
