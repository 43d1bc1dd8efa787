"""activation and the quantisation of activations: the reference against float64, the GPU kernels against the reference and compiled."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import close, compiled, kernels

from pallas_kernels.activation import KINDS, activation
from pallas_kernels.activation.specs import SPECS
from pallas_kernels.errors import BackendError, ShapeError
from pallas_kernels.qtensor import ActivationQuant
from pallas_kernels.quantize import quantize_activations
from pallas_kernels.quantize.specs import SPECS as QUANTIZED
from pallas_kernels.registry import choose
from pallas_kernels.target import Target

GROUPS, TOKEN, FP8 = ActivationQuant(), ActivationQuant(group=None), ActivationQuant(group=32, format="fp8")


def truth(x, bias, kind, gated):
    z = np.asarray(x, np.float64) + (0 if bias is None else np.asarray(bias, np.float64))
    half = z.shape[-1] // 2
    gate = z[..., :half] if gated else z
    if kind == "relu":
        y = np.maximum(gate, 0)
    elif kind == "silu":
        y = gate / (1 + np.exp(-gate))
    elif kind == "gelu_tanh":
        y = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    else:
        y = 0.5 * gate * (1 + np.vectorize(math.erf)(gate / np.sqrt(2)))
    return y * z[..., half:] if gated else y


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
@pytest.mark.parametrize(("kind", "gated", "biased"), [(k, i % 2 == 0, i > 1) for i, k in enumerate(KINDS)])
def test_activation(rng, kind, gated, biased, implementation):
    width = SPECS["odd.42"].width * (2 if gated else 1)
    x = jnp.asarray(rng.standard_normal((2, 3, width)) * 3, jnp.float32)
    bias = jnp.asarray(rng.standard_normal(width), jnp.float32) if biased else None
    with kernels():
        found = activation(x, kind=kind, gated=gated, bias=bias, implementation=implementation)
    assert found.scales is None
    close(found.y, truth(x, bias, kind, gated), 1e-6)


@pytest.mark.parametrize(("quant", "width"), [(GROUPS, 100), (TOKEN, 42), (FP8, 64)])
def test_levels_of_activations(rng, quant, width):
    x = jnp.asarray(rng.standard_normal((5, 2 * width)), jnp.bfloat16)
    run = lambda implementation: activation(x, kind="silu", gated=True, quant=quant, implementation=implementation)
    with kernels():
        found = run("pallas")
    wanted = run("reference")
    close(found.scales, wanted.scales, 1e-6)
    # the arithmetic of exp differs in the last bits: a value half way between two levels may go the other way
    levels = [np.asarray(a.y, np.float64) for a in (found, wanted)]
    assert np.mean(levels[0] != levels[1]) < 0.05
    assert np.abs(levels[0] - levels[1]).max() <= (1 if quant.format == "int8" else 32)


def test_gradient_of_the_kernel(rng):
    x = jnp.asarray(rng.standard_normal((3, 84)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(84), jnp.float32)
    loss = lambda implementation: (
        lambda x, b: jnp.sum(activation(x, kind="gelu_tanh", gated=True, bias=b, implementation=implementation).y ** 2)
    )
    with kernels():
        found = jax.grad(loss("pallas"), (0, 1))(x, bias)
    close(found, jax.grad(loss("reference"), (0, 1))(x, bias), 1e-5)


@pytest.mark.parametrize("name", [name for name in QUANTIZED if QUANTIZED[name].inputs < 4096])
def test_the_quantising_kernel(rng, name):
    spec = QUANTIZED[name]
    quant = ActivationQuant(group=spec.group)
    x = rng.standard_normal((3, spec.inputs)).astype(np.float32)
    x[1, : spec.group or spec.inputs] = 0
    with kernels():
        found = quantize_activations(jnp.asarray(x), quant, implementation="pallas")
    wanted = jax.jit(lambda x: quantize_activations(x, quant, implementation="reference"))(x)
    np.testing.assert_allclose(found[1], wanted[1], rtol=2e-7)
    assert found[0].dtype == jnp.int8 and np.abs(np.asarray(found[0], int) - np.asarray(wanted[0], int)).max() <= 1
    assert np.mean(np.asarray(found[0]) != np.asarray(wanted[0])) < 0.01
    assert (np.asarray(found[0])[1, : spec.group or spec.inputs] == 0).all()


def test_wrong_arguments_are_refused():
    x = jnp.ones((2, 6))
    for arguments, reason in (
        ({"kind": "swish"}, "swish"),
        ({"kind": "silu", "bias": jnp.ones(5)}, r"\[6\]"),
    ):
        with pytest.raises(ShapeError, match=reason):
            activation(x, **arguments)
    with pytest.raises(ShapeError, match="2F"):
        activation(jnp.ones((2, 5)), kind="silu", gated=True)
    gpu = Target(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")
    for quant, reason in ((ActivationQuant(group=40), "not per 40"), (FP8, "cannot convert")):
        with pytest.raises(BackendError, match=reason):
            choose("activation", "pallas", gpu, shape=(2, 80), gated=True, quant=quant)
    facts = {"shape": (2, 64), "dtype": "float32", "format": "int8", "over_shards": True}
    assert choose("quantize_activations", target=gpu, **facts, group=64).name == "pallas"
    with pytest.raises(BackendError, match="collective"):
        choose("quantize_activations", "pallas", gpu, **facts, group=None)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "quant", "gpu"),
    [("llama_3_1_8b", None, "a100"), ("gemma_2_9b", GROUPS, "h100"), ("bert_base", TOKEN, "b200")],
)
def test_compiles_for_gpus(name, quant, gpu):
    spec = SPECS[name]
    x = jax.ShapeDtypeStruct((7, spec.width * (2 if spec.gated else 1)), jnp.float32)
    run = lambda x: activation(x, kind=spec.kind, gated=spec.gated, quant=quant)
    compiled(gpu, run, x, launches=("activation",))


@pytest.mark.aot
@pytest.mark.parametrize(("name", "gpu"), [("llama_3_1_8b.mlp", "h100"), ("smollm2_135m.token", "a100")])
def test_quantising_compiles_for_gpus(name, gpu):
    spec = QUANTIZED[name]
    run = lambda x: quantize_activations(x, ActivationQuant(group=spec.group))
    found = compiled(gpu, run, jax.ShapeDtypeStruct((4, spec.inputs), jnp.bfloat16), launches=("quantize_activations",))
    assert found.kernels[0].widest_load >= 4
