"""Norms against a float64 oracle, on fresh inputs."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from pallas_kernels.errors import ShapeError
from pallas_kernels.norm import layer_norm, rms_norm
from pallas_kernels.norm.specs import SPECS


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm(rng, name, unit_offset):
    spec = SPECS[name]
    x = (rng.standard_normal((3, 2, spec.width)) * 10).astype(np.float32)
    scale = rng.standard_normal(spec.width).astype(np.float32)
    x64, s64 = x.astype(np.float64), scale.astype(np.float64)
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + spec.eps) * (s64 + unit_offset)
    got = rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=spec.eps, unit_offset=unit_offset)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm(rng, name, affine):
    spec = SPECS[name]
    x = (rng.standard_normal((3, spec.width)) + 1).astype(np.float32)
    scale, bias = (rng.standard_normal(spec.width).astype(np.float32) for _ in range(2))
    x64 = x.astype(np.float64)
    want = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + spec.eps)
    want = want * scale.astype(np.float64) + bias.astype(np.float64) if affine else want
    got = layer_norm(jnp.asarray(x), *(map(jnp.asarray, (scale, bias)) if affine else (None, None)), eps=spec.eps)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_layer_norm_of_a_large_mean_does_not_cancel(rng):
    x = (rng.standard_normal((1, 512)) + 4096).astype(np.float32)
    x64 = x.astype(np.float64)
    want = (x64 - x64.mean()) / np.sqrt(x64.var() + 1e-5)
    # the mean of 4096 is exact to 2^-12, a part in 4000 of the deviation
    np.testing.assert_allclose(layer_norm(jnp.asarray(x), None, None, eps=1e-5), want, atol=2e-3)


def test_eps_counts(rng):
    x = jnp.full((1, 8), 1e-3, jnp.float32)
    loose, tight = (rms_norm(x, jnp.ones(8), eps=eps) for eps in (1e-5, 1e-6))
    np.testing.assert_allclose(loose, 1e-3 / np.sqrt(1e-6 + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(tight, 1e-3 / np.sqrt(2e-6), rtol=1e-5)


def test_dtypes(rng):
    x, scale = jnp.asarray(rng.standard_normal((2, 64)), jnp.bfloat16), jnp.asarray(rng.standard_normal(64), jnp.bfloat16)
    full = rms_norm(x.astype(jnp.float32), scale.astype(jnp.float32), eps=1e-5)
    assert rms_norm(x, scale, eps=1e-5).dtype == jnp.bfloat16
    # float32 inside: exactly the float32 norm of the bfloat16 values
    np.testing.assert_array_equal(rms_norm(x, scale, eps=1e-5, out_dtype=jnp.float32), full)
    assert layer_norm(x, scale, None, eps=1e-5, out_dtype=jnp.float32).dtype == jnp.float32


def test_gradient(rng):
    x, scale = jnp.asarray(rng.standard_normal((2, 5)), jnp.float32), jnp.asarray(rng.standard_normal(5), jnp.float32)
    jax.test_util.check_grads(lambda x, s: rms_norm(x, s, eps=1e-5), (x, scale), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)
    jax.test_util.check_grads(
        lambda x, s: layer_norm(x, s, s, eps=1e-5), (x, scale), order=1, modes=["rev"], atol=2e-2, rtol=2e-2
    )


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"scale must be \[8\].*got \[4\]"):
        rms_norm(jnp.ones((2, 8)), jnp.ones(4), eps=1e-5)
    with pytest.raises(ShapeError, match=r"bias must be \[8\]"):
        layer_norm(jnp.ones((2, 8)), jnp.ones(8), jnp.ones(9), eps=1e-5)
    with pytest.raises(ShapeError, match="int32"):
        rms_norm(jnp.ones((2, 8), jnp.int32), jnp.ones(8), eps=1e-5)
