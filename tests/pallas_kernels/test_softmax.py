"""Softmax, reference and GPU kernel: against float64, masked rows, rows longer than a block, its gradient, and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import GPU_NAMES, close, compiled, kernels

from pallas_kernels.errors import ShapeError
from pallas_kernels.softmax import softmax
from pallas_kernels.softmax.specs import SPECS
from pallas_kernels.tuning import tiles

S = jax.ShapeDtypeStruct
IMPLEMENTATIONS = ("reference", "pallas")


def truth(x, mask, scale):
    z = np.where(mask, x.astype(np.float64) * scale, -np.inf)
    with np.errstate(invalid="ignore"):
        e = np.where(mask, np.exp(z - z.max(-1, keepdims=True)), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "masked", "step"), [((3, 2, 42), True, 64), ((2, 1), False, 1), ((3, 100), True, 32), ((1, 70), False, 16)]
)
def test_against_float64(rng, implementation, shape, masked, step):
    x = (rng.normal(size=shape) * 5).astype(np.float32)
    mask = rng.random(shape) > 0.4 if masked else np.ones(shape, bool)
    if masked:
        mask[0] = False  # a row that keeps nothing
        x = np.where(mask, x, np.nan).astype(np.float32)  # what is not kept is not looked at
    given = jnp.asarray(np.nan_to_num(x) if implementation == "reference" else x)
    with kernels(), tiles({"softmax": {"width": step, "rows": 2}}):
        found = softmax(given, jnp.asarray(mask) if masked else None, scale=0.7, implementation=implementation)
    close(found, truth(np.nan_to_num(x), mask, 0.7), 1e-6)


def test_gradient_and_dtype(rng):
    x = jnp.asarray(rng.normal(size=(3, 9)), jnp.float32)
    mask = jnp.asarray(rng.random((3, 9)) > 0.3)
    loss = lambda name, x: (softmax(x, mask, scale=0.7, implementation=name) ** 3).sum()
    with kernels():
        found = jax.grad(functools.partial(loss, "pallas"))(x)
        assert softmax(x.astype(jnp.bfloat16), implementation="pallas").dtype == jnp.bfloat16
    close(found, jax.grad(functools.partial(loss, "reference"))(x), 1e-5)


def test_refusals():
    with pytest.raises(ShapeError, match="not empty"):
        softmax(jnp.ones((2, 0)))
    with pytest.raises(ShapeError, match=r"mask must be bool\[2, 3\]"):
        softmax(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ShapeError, match="scale is -1"):
        softmax(jnp.ones(3), scale=-1)


@pytest.mark.aot
@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize("name", [pytest.param("scores_8k", marks=pytest.mark.slow), "llama_3_1_8b.vocab"])
def test_compiles(gpu, name):
    x = S((4, SPECS[name].width), jnp.float32)
    found = compiled(gpu, softmax, x, launches=("softmax",), registers=128)
    assert found.kernels[0].widest_load == 16
