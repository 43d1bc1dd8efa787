"""The GPU kernel of norms: interpreted against the reference, its gradient, and compiled for three generations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import GPU_NAMES, close, compiled, kernels

from pallas_kernels import norm as room
from pallas_kernels.errors import BackendError, ShapeError
from pallas_kernels.norm import fused_norm, layer_norm, norm, rms_norm
from pallas_kernels.norm.specs import SPECS
from pallas_kernels.qtensor import ActivationQuant
from pallas_kernels.registry import using

S = jax.ShapeDtypeStruct
QUANTS = (None, ActivationQuant(group=None), ActivationQuant(group=16), ActivationQuant(group=None, format="fp8"))
CASES = list(zip(((1, 100), (7, 64), (2, 3, 48), (5, 8)), QUANTS, strict=True))
DTYPES = (jnp.float32, jnp.bfloat16)
# every value of every option beside every value of another one would be 300 runs: each row of this list changes several at once
OPTIONS = list(
    itertools.islice(itertools.cycle(itertools.product(room.KINDS, (None, *room.ACTIVATIONS), (False, True), DTYPES)), 0, 60, 7)
)


def arrays(rng, shape, kind, dtype):
    x, residual = (jnp.asarray(rng.normal(0.5, 2, shape), dtype) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(0.5, 1, shape[-1]), jnp.float32) for _ in range(2))
    return x, residual, scale, bias if kind == "layer" else None


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", room.KINDS)
def test_plain(rng, name, kind):
    spec = SPECS[name]
    x, _, scale, bias = arrays(rng, (3, 2, spec.width), kind, jnp.float32)
    with kernels():
        found = norm(x, scale, bias, kind=kind, eps=spec.eps, implementation="pallas")
    close(found, norm(x, scale, bias, kind=kind, eps=spec.eps, implementation="reference"), 1e-6)


def test_a_layer_norm_without_scale_and_bias(rng):
    x = jnp.asarray(rng.normal(3, 1, (5, 33)), jnp.float32)
    with kernels():
        found = layer_norm(x, None, None, eps=1e-5, implementation="pallas")
    close(found, layer_norm(x, None, None, eps=1e-5, implementation="reference"), 1e-6)


@pytest.mark.parametrize(
    ("shape", "quant", "kind", "activation", "residual", "dtype"),
    [(*CASES[i % len(CASES)], *options) for i, options in enumerate(OPTIONS)],
)
def test_fused(rng, shape, quant, kind, activation, residual, dtype):
    x, given, scale, bias = arrays(rng, shape, kind, dtype)
    call = functools.partial(
        fused_norm,
        x,
        scale,
        bias,
        kind=kind,
        eps=1e-5,
        residual=given if residual else None,
        activation=activation,
        quant=quant,
    )
    with kernels():
        found = call(implementation="pallas")
    wanted = call(implementation="reference")
    if quant is None:
        assert found.y.dtype == dtype and found.scales is None
        close(found.y, wanted.y, 1e-6 if dtype == jnp.float32 else 8e-3)
    else:
        close(found.scales, wanted.scales, 1e-6)
        # a value that lies between two levels may fall to either
        steps = np.abs(found.y.astype(jnp.float32) - wanted.y.astype(jnp.float32))
        assert (
            found.y.dtype == wanted.y.dtype
            and steps.max() <= (1 if quant.format == "int8" else 32)
            and (steps > 0).mean() < 0.02
        )
    if residual:
        assert found.total.dtype == dtype
        close(found.total, wanted.total, 1e-7)
    else:
        assert found.total is None


def test_gradients_are_the_references(rng):
    x, residual, scale, bias = arrays(rng, (3, 20), "layer", jnp.float32)

    def loss(implementation, x, residual, scale, bias):
        out = fused_norm(
            x, scale, bias, kind="layer", eps=1e-5, residual=residual, activation="gelu", implementation=implementation
        )
        return (out.y**2).sum() + jnp.sin(out.total).sum()

    grad = lambda name: jax.grad(functools.partial(loss, name), argnums=(0, 1, 2, 3))(x, residual, scale, bias)
    with kernels():
        found = grad("pallas")
    close(found, grad("reference"), 1e-5)


def test_the_kernel_is_chosen_for_gpus_and_can_be_left_out(rng):
    x, _, scale, _ = arrays(rng, (2, 8), "rms", jnp.float32)
    run = lambda x: rms_norm(x, scale, eps=1e-5)
    with kernels():
        assert "pallas_call" in str(jax.make_jaxpr(run)(x))
        with using(without=["pallas"]):
            assert "pallas_call" not in str(jax.make_jaxpr(run)(x))
        with pytest.raises(BackendError, match=r"per power of two, not per 24"):
            fused_norm(x, scale, kind="rms", eps=1e-5, quant=ActivationQuant(group=24), implementation="pallas")


def test_refusals():
    x, scale = jnp.ones((2, 8)), jnp.ones(8)
    with pytest.raises(ShapeError, match="'tanh' is not one of"):
        fused_norm(x, scale, kind="rms", eps=1e-5, activation="tanh")
    with pytest.raises(ShapeError, match=r"residual must be \[2, 8\] as x, got \[1, 8\]"):
        fused_norm(x, scale, kind="rms", eps=1e-5, residual=x[:1])
    with pytest.raises(ShapeError, match="'rms' has a scale and no bias"):
        fused_norm(x, scale, scale, kind="rms", eps=1e-5)
    with pytest.raises(ShapeError, match="'batch' is not one of"):
        fused_norm(x, scale, kind="batch", eps=1e-5)


@pytest.mark.aot
@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize("name", ["llama_3_1_8b", pytest.param("odd.42", marks=pytest.mark.slow)])
def test_compiles(gpu, name):
    width = SPECS[name].width
    run = lambda x, scale: rms_norm(x, scale, eps=1e-5)
    found = compiled(gpu, run, S((1, 1, width), jnp.float32), S((width,), jnp.float32), launches=("norm",))
    assert found.kernels[0].widest_load == (16 if width % 4 == 0 else 8)


@pytest.mark.aot
@pytest.mark.parametrize(("gpu", "format"), [("a100", "int8"), ("h100", "fp8"), ("b200", "int8")])
def test_compiles_with_everything(gpu, format):
    quant = ActivationQuant(format=format)

    def run(x, scale, bias):
        return fused_norm(x, scale, bias, kind="layer", eps=1e-5, residual=x, activation="gelu", quant=quant)

    row, vector = S((7, 4096), jnp.bfloat16), S((4096,), jnp.float32)
    compiled(gpu, run, row, vector, vector, launches=("norm",), registers=128)
