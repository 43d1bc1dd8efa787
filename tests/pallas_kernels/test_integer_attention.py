"""integer_attention: its levels against float64, its distance from attention, windows, soft caps, rows, caches, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention
from pallas_kernels.errors import ShapeError
from pallas_kernels.integer_attention import MOST_TOKENS, integer_attention
from pallas_kernels.layer_cache import LayerCache

B, T, N, K, S, H = 2, 5, 6, 3, 42, 8
SCALE = 0.4
POSITIONS = np.array([[0, 1, 2, 3, 4], [30, 31, 32, 33, 34]], np.int32)


def rounded(x):
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


def truth(q, k, v, soft_cap=None, window=None):
    """One query at a time, in float64, over the keys that it sees: everything that is multiplied is on its grid."""
    q, k, v, out = rounded(q), rounded(k), rounded(v), np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        p = POSITIONS[b, t]
        seen = slice(0 if window is None else max(0, p - window + 1), p + 1)
        keys, values = k[b, n // (N // K), seen], v[b, n // (N // K), seen]
        scores = SCALE * keys @ q[b, t, n]
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        steps = np.abs(values).max(-1) / 127
        scaled = weights * steps
        levels = np.rint(scaled / scaled.max() * 255) * scaled.max() / 255
        out[b, t, n] = (levels / steps) @ values / weights.sum()
    return out


@pytest.fixture
def arrays(rng):
    q = rng.normal(size=(B, T, N, H)) * 2
    k, v = rng.normal(size=(2, B, K, S, H))
    for b in range(B):
        k[b, :, POSITIONS[b, -1] + 1 :] = v[b, :, POSITIONS[b, -1] + 1 :] = 1e4  # where no query may look
    return tuple(a.astype(np.float32) for a in (q, k, v))


def run(op, q, k, v, dtype=jnp.float32, rows=None, **kwargs):
    cache = LayerCache.zeros(rows=0, kv_heads=K, tokens=S, head_dim=H, dtype=dtype).encode(jnp.asarray(k), jnp.asarray(v))
    return np.asarray(jax.jit(lambda q, c: op(q, c, rows=rows, positions=POSITIONS, scale=SCALE, **kwargs))(q, cache))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (3, None), (None, 1.5), (7, 2.0)])
def test_levels(arrays, dtype, window, soft_cap):
    wide = None if window is None else jnp.int32(window)
    found = run(integer_attention, *arrays, dtype, window=wide, soft_cap=soft_cap)
    expected = truth(*(a.astype(np.float64) for a in arrays), soft_cap, window)
    # a tie between two levels may fall to either side
    assert np.mean(np.abs(found - expected)) < 2e-5 and np.abs(found - expected).max() < 2e-2
    floats = run(attention, *arrays, window=wide, soft_cap=soft_cap)
    assert 1e-4 < np.abs(found - floats).max() < 0.1


def test_rows_of_a_cache_and_a_row_without_keys(arrays):
    q, k, v = arrays
    found = run(integer_attention, q, k[::-1], v[::-1], rows=jnp.array([1, 0]))
    np.testing.assert_array_equal(found, run(integer_attention, q, k, v))
    cache = LayerCache(k=jnp.asarray(k), v=jnp.asarray(v))
    nowhere = integer_attention(jnp.asarray(q), cache, rows=None, positions=np.full((B, T), -1), scale=SCALE)
    np.testing.assert_array_equal(nowhere, np.zeros(q.shape))


def test_sums_that_leave_int32_on_the_way(rng):
    """Equal weights of many tokens: 255 * 127 * S is near 2^31, and 128 * 127 * S is taken off and added."""
    tokens = MOST_TOKENS - 11
    v = np.full((1, 1, tokens, 2), 3.0, np.float32)
    cache = LayerCache(k=jnp.zeros(v.shape), v=jnp.asarray(v))
    found = integer_attention(jnp.ones((1, 1, 1, 2)), cache, rows=None, positions=np.array([[tokens - 1]]), scale=1.0)
    np.testing.assert_allclose(found, np.full((1, 1, 1, 2), 3.0), rtol=1e-6)


def test_refusals(arrays):
    q, k, v = arrays
    with pytest.raises(ShapeError, match="not int4"):
        empty = LayerCache.zeros(rows=B, kv_heads=K, tokens=S, head_dim=H, dtype=jnp.int4)
        integer_attention(jnp.asarray(q), empty, rows=None, positions=POSITIONS, scale=1.0)
    with pytest.raises(ShapeError, match="do not fit keys"):
        run(integer_attention, q[:, :, :4], k, v)
    with pytest.raises(ShapeError, match="may leave int32"):
        wide = LayerCache(k=jnp.zeros((1, 1, MOST_TOKENS + 1, 2), jnp.int8), v=jnp.zeros((1, 1, MOST_TOKENS + 1, 2), jnp.int8))
        integer_attention(jnp.zeros((1, 1, 1, 2)), wide, rows=None, positions=np.zeros((1, 1), np.int32), scale=1.0)
