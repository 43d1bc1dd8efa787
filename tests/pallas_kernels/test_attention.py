"""attention against float64: grouped heads, windows, soft caps, terms, rows and pages of a cache, int8 caches; unused keys are poisoned."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from attention_truth import SCALE, as_terms, terms_of, truth

from pallas_kernels.attention import AttentionTerms, attention
from pallas_kernels.errors import ShapeError
from pallas_kernels.layer_cache import LayerCache

B, T, N, K, S, H = 2, 5, 6, 3, 19, 8
POSITIONS = np.array([[0, 1, 2, 3, 4], [9, 10, 11, 12, 13]], np.int32)


@pytest.fixture
def arrays(rng):
    """q, and k and v that are far too large wherever no query may look."""
    q = rng.normal(size=(B, T, N, H)) * 2
    k, v = rng.normal(size=(2, B, K, S, H))
    for b in range(B):
        k[b, :, POSITIONS[b, -1] + 1 :] = v[b, :, POSITIONS[b, -1] + 1 :] = 1e4
    return q, k, v


def run(q, k, v, rows=None, **kwargs):
    cache = LayerCache(k=jnp.asarray(k, jnp.float32), v=jnp.asarray(v, jnp.float32))
    return attention(jnp.asarray(q, jnp.float32), cache, rows=rows, positions=POSITIONS, scale=SCALE, **kwargs)


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 10, 19, 2**31 - 1])
def test_windows_and_soft_caps(arrays, window, soft_cap):
    wide = None if window is None else jnp.int32(window)
    found = run(*arrays, window=wide, soft_cap=soft_cap)
    np.testing.assert_allclose(found, truth(*arrays, POSITIONS, soft_cap, window), atol=2e-6)


def test_each_of_them_shows(arrays):
    plain = truth(*arrays, POSITIONS)
    for changed in (truth(*arrays, POSITIONS, window=4), truth(*arrays, POSITIONS, soft_cap=1.5)):
        assert np.abs(changed - plain).max() > 0.1


def test_layers_with_other_windows_share_a_program(arrays):
    compiled = jax.jit(lambda window: run(*arrays, window=window))
    for window in (2, 7):
        np.testing.assert_allclose(compiled(jnp.int32(window)), truth(*arrays, POSITIONS, window=window), atol=2e-6)
    assert compiled._cache_size() == 1


def test_rows_of_a_cache(arrays):
    q, k, v = arrays
    found = run(q, k[::-1], v[::-1], rows=jnp.array([1, 0]), window=jnp.int32(4), soft_cap=2.0)
    np.testing.assert_allclose(found, truth(q, k, v, POSITIONS, 2.0, 4), atol=2e-6)


def test_an_int8_cache_is_scaled_before_the_soft_cap(arrays):
    q, k, v = arrays
    empty = LayerCache.zeros(rows=0, kv_heads=K, tokens=S, head_dim=H, dtype=jnp.int8)
    cache = empty.encode(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32))
    k, v = (
        np.asarray(a, np.float64) * np.asarray(s)[..., None] for a, s in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    )
    found = attention(
        jnp.asarray(q, jnp.float32), cache, rows=None, positions=POSITIONS, scale=SCALE, soft_cap=1.5, window=jnp.int32(4)
    )
    np.testing.assert_allclose(found, truth(q, k, v, POSITIONS, 1.5, 4), atol=2e-5)


@pytest.mark.parametrize(
    ("which", "causal", "window"),
    [
        ({"sinks": True}, True, 4),
        ({"slopes": True}, True, None),
        ({"relative": True, "sinks": True}, True, None),
        ({"lengths": True}, True, None),
        ({"lengths": True, "relative": True}, False, None),
        ({"slopes": True, "sinks": True, "lengths": True}, False, 3),
    ],
)
def test_terms(arrays, rng, which, causal, window):
    q, k, v = (np.clip(a, -5, 5) for a in arrays)
    given = terms_of(rng, B, N, S, **which)
    if "lengths" in given:
        for b, n in enumerate(given["lengths"]):
            k[b, :, n:] = v[b, :, n:] = 1e4
    wanted = truth(q, k, v, POSITIONS, window=window, causal=causal, **given)
    found = run(q, k, v, window=None if window is None else jnp.int32(window), terms=as_terms(causal, given))
    np.testing.assert_allclose(found, wanted, atol=3e-6)
    for name in given:  # each of them shows
        assert np.abs(wanted - truth(q, k, v, POSITIONS, window=window, causal=causal, **(given | {name: None}))).max() > 1e-3


def test_pages_are_read_in_the_order_of_a_table(arrays):
    q, k, v = arrays
    pages = lambda a: a[:, :, :16].reshape(B, K, 4, 4, H).swapaxes(1, 2).reshape(8, K, 4, H)  # pages of four tokens
    order = np.array([5, 2, 7, 0, 3, 6, 1, 4])
    table = np.argsort(order).reshape(B, 4)
    found = run(q, pages(k)[order], pages(v)[order], rows=jnp.asarray(table, jnp.int32), window=jnp.int32(6))
    np.testing.assert_allclose(found, truth(q, k, v, POSITIONS, window=6), atol=2e-6)


def test_positions_may_be_left_out(arrays):
    q, k, v = (jnp.asarray(np.clip(a, -2, 2), jnp.float32) for a in arrays)
    call = lambda positions: attention(q, LayerCache(k=k, v=v), rows=None, positions=positions, scale=SCALE)
    np.testing.assert_array_equal(call(None), call(jnp.broadcast_to(jnp.arange(T), (B, T))))


def test_a_row_without_keys_is_zero(arrays):
    """Padding may stand before position 0, where it sees nothing."""
    q, k, v = arrays
    cache = LayerCache(k=jnp.asarray(k, jnp.float32), v=jnp.asarray(v, jnp.float32))
    nowhere = np.full((B, T), -1, np.int32)
    found = attention(jnp.asarray(q, jnp.float32), cache, rows=None, positions=nowhere, scale=SCALE, window=jnp.int32(1))
    assert not np.asarray(found).any()


def test_gradients(arrays):
    q, k, v = (jnp.asarray(np.clip(a, -2, 2), jnp.float32) for a in arrays)
    loss = jax.jit(lambda q, k, v: (run(q, k, v, window=jnp.int32(3), soft_cap=1.5) ** 2).sum())
    jax.test_util.check_grads(loss, (q, k, v), order=1, modes=["rev"], atol=5e-2, rtol=5e-2, eps=1e-2)


def test_refusals(arrays):
    q, k, v = arrays
    with pytest.raises(ShapeError, match="N must be a multiple of K"):
        run(q[:, :, :4], k, v)
    with pytest.raises(ShapeError, match=r"window must be a scalar, got \[2\]"):
        run(q, k, v, window=jnp.array([1, 2]))
    with pytest.raises(ShapeError, match=r"rows \[3\] do not fit a batch of 2"):
        run(q, k, v, rows=jnp.arange(3))
    for name, wrong, reason in (
        ("lengths", jnp.ones(3, jnp.int32), r"lengths must be \[2\], got \[3\]"),
        ("sinks", jnp.ones(K), r"sinks must be \[6\], got \[3\]"),
        ("relative", jnp.ones((N, 4)), r"relative must be \[6, 2R \+ 1\], got \[6, 4\]"),
    ):
        with pytest.raises(ShapeError, match=reason):
            run(q, k, v, terms=AttentionTerms(**{name: wrong}))
