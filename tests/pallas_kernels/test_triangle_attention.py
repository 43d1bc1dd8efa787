"""triangle_attention: against float64, its gradients, masked rows, memory, and compiled for three generations."""

import functools
import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from kernel_checks import close, kernels

from pallas_kernels.deviceless import compile_for
from pallas_kernels.errors import BackendError, ShapeError
from pallas_kernels.gpus import GPUS
from pallas_kernels.registry import using
from pallas_kernels.triangle_attention import triangle_attention
from pallas_kernels.triangle_attention.specs import SPECS
from pallas_kernels.tuning import tiles

S = jax.ShapeDtypeStruct
SCALE = 0.4


def case(rng, B, I, J, N, H, dtype=np.float32):
    """q, k, v, bias and a mask with a row that keeps nothing."""
    q, k, v = (rng.normal(size=(B, I, J, N, H)).astype(np.float32) for _ in range(3))
    mask = rng.random((B, I, J)) > 0.3
    mask[0, 0] = False
    return *(jnp.asarray(a, dtype) for a in (q, k, v, rng.normal(size=(B, N, J, J)))), jnp.asarray(mask)


def truth(q, k, v, bias, mask):
    q, k, v, bias = (np.asarray(a, np.float64) for a in (q, k, v, bias))
    scores = SCALE * np.einsum("bijnh,bilnh->binjl", q, k) + bias[:, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * (1 if mask is None else np.asarray(mask)[:, :, None, None])
    return np.einsum("binjl,bilnh->bijnh", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300), v)


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
@pytest.mark.parametrize(
    ("sizes", "dtype", "masked"),
    [
        ((2, 3, 21, 2, 20), "float32", True),
        pytest.param((1, 2, 33, 1, 16), "bfloat16", True, marks=pytest.mark.slow),
        ((1, 1, 1, 1, 1), "float32", False),
    ],
)
def test_against_float64(rng, sizes, dtype, masked, implementation):
    *arrays, mask = case(rng, *sizes, dtype)
    mask = mask if masked else None
    wanted = truth(*arrays, mask)
    if masked and implementation == "pallas":  # scores of keys that are not kept are not looked at
        arrays[1] = jnp.where(mask[..., None, None], arrays[1], jnp.nan)
    run = functools.partial(triangle_attention, scale=SCALE, implementation=implementation)
    with kernels(), tiles({"triangle_attention": {"queries": 16, "keys": 16}}):
        found = jax.jit(run)(*arrays, mask)
    assert found.dtype == dtype
    close(found, wanted, 1e-5 if dtype == "float32" else 1e-2)
    if masked:
        assert not np.asarray(found[0, 0]).any()


@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients(rng, masked):
    *arrays, mask = case(rng, 2, 3, 21, 2, 8)
    weights = jnp.asarray(rng.normal(size=arrays[0].shape), jnp.float32)

    def loss(name, *arrays):
        return (triangle_attention(*arrays, mask if masked else None, scale=SCALE, implementation=name) * weights).sum()

    grad = lambda name: jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2, 3)))(*arrays)
    with kernels(), tiles({"triangle_attention": {"queries": 16, "keys": 16}}):
        found = grad("pallas")
    close(found, grad("reference"), 1e-5)


def test_the_gradient_of_the_reference(rng):
    *arrays, mask = case(rng, 1, 2, 4, 1, 3)
    loss = jax.jit(lambda *arrays: (triangle_attention(*arrays, mask, scale=SCALE) ** 2).sum())
    jax.test_util.check_grads(loss, tuple(arrays), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_refusals(rng):
    q, k, v, bias, mask = case(rng, 1, 2, 5, 2, 4)
    call = functools.partial(triangle_attention, scale=1.0)
    for arguments, reason in (
        ((q[0], k, v, bias), r"must be a float array \[B, I, J, N, H\], got float32\[2, 5, 2, 4\]"),
        ((q, k[:, :1], v, bias), r"k must be float32\[1, 2, 5, 2, 4\] as q, got float32\[1, 1, 5, 2, 4\]"),
        ((q, k, v, bias[:, :1]), r"bias must be \[1, 2, 5, 5\], got \[1, 1, 5, 5\]"),
        ((q, k, v, bias, mask.astype(jnp.float32)), r"mask must be bool\[1, 2, 5\], got float32"),
    ):
        with pytest.raises(ShapeError, match=reason):
            call(*arguments)
    wide = jnp.ones((1, 1, 2, 1, 200))
    with kernels(), pytest.raises(BackendError, match="heads of 200 do not fit"):
        call(wide, wide, wide, jnp.ones((1, 1, 2, 2)), implementation="pallas")


def program(name, dtype):
    spec = SPECS[name]
    J = spec.residues
    row = S((1, J, J, spec.heads, spec.head_dim), dtype)
    loss = lambda q, k, v, bias, mask: triangle_attention(q, k, v, bias, mask, scale=0.2).astype(jnp.float32).sum()
    return jax.grad(loss, (0, 1, 2, 3)), row, row, row, S((1, spec.heads, J, J), jnp.float32), S((1, J, J), jnp.bool_)


@pytest.mark.aot
def test_compiles():
    found = compile_for("h100", *program("alphafold_2.256", "bfloat16"))
    own = {kernel.name: kernel for kernel in found.kernels if "triangle" in kernel.name}
    assert set(own) == {"triangle_attention", "triangle_dq", "triangle_dkv", "triangle_dbias"}
    for kernel in own.values():
        assert kernel.spilled == 0 and kernel.registers * kernel.threads <= 65536, kernel
        assert kernel.shared <= GPUS["h100"].shared and kernel.tensor_cores, kernel


@pytest.mark.aot
@pytest.mark.slow
def test_no_program_holds_all_scores():
    """Forward and backward, the largest array has J^2 N H elements; the reference's has J^3 N, which shows that it would be found."""
    J, N, H = 256, 4, 32

    def largest():
        text = compile_for("h100", *program("alphafold_2.256", "bfloat16")).text
        return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"\w+\[([\d,]+)\]", text))

    assert largest() == J * J * N * H
    with using({"triangle_attention": "reference"}):
        assert largest() >= J**3 * N
