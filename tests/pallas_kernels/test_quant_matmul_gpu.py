"""The GPU's matmul kernel: interpreted against the exact weights in float64, and compiled for GPUs that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import compiled, kernels
from kernel_products import FORMS, INPUTS
from kernel_products import weight as shapes_of

from pallas_kernels.errors import BackendError
from pallas_kernels.mlp_block import MLPSpec, MLPWeights, mlp_block
from pallas_kernels.qtensor import ActivationQuant, QTensor, dequantize, repack, round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul.fused import Norm, fused_matmul
from pallas_kernels.quant_matmul.specs import SPECS
from pallas_kernels.quantize import dequantize_activations, quantize_activations
from pallas_kernels.registry import choose
from pallas_kernels.target import Target
from pallas_kernels.tuning import tiles

# of |x| |w|: levels are exact but for those of NF4, and x is once or twice a bfloat16; what is rounded with the weights costs a bfloat16
EXACT, ROUNDED = 3e-6, 2e-3


def weight(rng, outputs, inputs, form, activation=None):
    w = rng.standard_normal((outputs, inputs)).astype(np.float32)
    if form in ("bfloat16", "float16"):
        return jnp.asarray(w, form)
    q = round_to_nearest(w, **FORMS[form], activation=INPUTS[activation] if activation else None)
    if form.endswith("zeros"):
        q = q.replace(zeros=rng.integers(0, 16, q.scales.shape).astype(np.uint8))
    return jax.tree.map(jnp.asarray, q)


def error(found, x, w):
    """The largest error against float64, relative to |x| |w|."""
    if isinstance(w, QTensor) and w.activation is not None:
        x = dequantize_activations(*jax.jit(quantize_activations, static_argnums=1)(x, w.activation), w.activation)
    w = np.asarray(dequantize(w) if isinstance(w, QTensor) else w, np.float64)
    x = np.asarray(x, np.float64).reshape(-1, w.shape[1])
    size = np.linalg.norm(x, axis=-1, keepdims=True) * np.linalg.norm(w, axis=-1)
    return (np.abs(np.asarray(found, np.float64).reshape(len(x), -1) - x @ w.T) / size).max()


# weight, inputs, rows, outputs and inputs of the weight, tile
SMALL = [
    ("bfloat16", None, 1, (42, 256), {}),
    ("int8", None, 1, (70, 704), {"splits": 4, "outputs": 16, "inputs": 64}),
    ("int4-32", None, 1, (40, 672), {"splits": 2, "outputs": 16, "inputs": 64}),
    ("int4-32-minimum", None, 7, (24, 96), {}),
    ("int4-64-zeros", None, 1, (1, 512), {"splits": 2, "inputs": 128}),
    ("int8", "groups", 1, (50, 448), {}),
    ("int4-128", "groups", 3, (40, 256), {}),
    ("nf4-64", None, 1, (40, 320), {}),
    ("int4-128", None, 1, (40, 1024), {}),  # in four parts
    ("int4-32-minimum", None, 1, (37, 288), {}),  # two groups a step
    ("mxfp4", None, 2, (34, 160), {"splits": 2, "outputs": 16, "inputs": 64}),
]
LARGE = [
    ("int4-64-zeros", None, 17, (34, 192), {}),
    ("int8", "groups", 40, (30, 192), {}),
    ("nf4-64", None, 19, (34, 128), {}),
]
SLOW = [
    ("int8", None, 1, (42, 1100), {}),
    ("int4-64-zeros", None, 1, (34, 1088), {}),
    ("int4-32", None, 2, (33, 352), {}),
    ("int4-64", None, 4, (33, 576), {}),
    ("fp8-128", None, 1, (40, 1152), {}),
    ("nf4-64", None, 1, (40, 1088), {}),
    ("int8", "groups", 1, (40, 1088), {}),
    ("int8", None, 20, (70, 320), {}),
    ("int8-64", None, 3, (33, 320), {}),
    ("fp8", "fp8 token", 6, (40, 96), {}),
    ("int4-128", None, 33, (66, 256), {"rows": 16, "outputs": 32, "inputs": 128}),
    ("float16", None, 5, (17, 100), {}),
    ("int4-64", None, 16, (64, 192), {}),
    ("int8-64", "groups", 2, (16, 128), {}),
    ("fp8-128", "fp8-128", 1, (16, 256), {}),
    ("fp8", None, 2, (36, 160), {}),
    ("int8", "token", 4, (16, 192), {"splits": 2}),
    ("int4-128", None, 2, (20, 640), {}),
    ("int8-64", None, 40, (33, 320), {}),
    ("int4-32", None, 130, (100, 160), {}),
    ("int4-32-minimum", None, 65, (24, 96), {}),
    ("fp8-128", None, 20, (36, 256), {}),
    ("int8", "token", 64, (16, 224), {}),
    ("fp8", "fp8 token", 33, (40, 96), {}),
    ("fp8-128", "fp8-128", 18, (16, 256), {}),
    ("mxfp4", None, 34, (40, 96), {}),
    ("mxfp4", None, 16, (17, 64), {}),
    ("nf4-64", None, 5, (24, 192), {}),
    ("fp8-128", None, 3, (40, 384), {}),
]


def slowly(cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("form", "inputs", "rows", "shape", "tile"), SMALL + LARGE + slowly(SLOW))
def test_products(rng, form, inputs, rows, shape, tile):
    w = weight(rng, *shape, form, inputs)
    x = jnp.asarray(rng.standard_normal((rows, shape[1])) * 3, jnp.float32)
    bias = jnp.asarray(rng.standard_normal(shape[0]), jnp.float32)
    if form in ("bfloat16", "float16"):
        x = x.astype(form)
    with kernels(), tiles({"quant_matmul": tile}):
        found = jax.jit(lambda x, w, b: quant_matmul(x, w, bias=b, implementation="pallas"))(x, w, bias)
    assert found.shape == (rows, shape[0]) and found.dtype == jnp.float32
    rounded = (rows > 16 and inputs is None and isinstance(w, QTensor) and w.group is not None) or form.startswith("nf4")
    assert error(found - bias, x, w) < (ROUNDED if rounded else EXACT)


def test_float32_inputs_are_rounded_where_that_is_asked_for(rng):
    w = weight(rng, 16, 256, "int8")
    x = jnp.asarray(rng.standard_normal((1, 256)), jnp.float32)
    errors = {}
    for precision in (None, "tensorfloat32", "bfloat16"):
        with kernels(), jax.default_matmul_precision(precision):
            errors[precision] = error(quant_matmul(x, w, implementation="pallas"), x, w)
    assert errors[None] == errors["tensorfloat32"] < EXACT < errors["bfloat16"] < ROUNDED


# norm, form, rows, outputs of the weights, gated, activation, residual
FUSED = [
    ("rms", "int4-64", 1, (80,), True, "silu", False),
    ("layer", "int8", 3, (30, 30), True, "gelu_tanh", True),
    ("rms", "int4-32-minimum", 17, (36,), True, "silu", True),
    (None, "int8-64", 2, (40,), False, "relu", True),
    ("rms", "bfloat16", 20, (30, 30), True, "silu", True),
]
FUSED_SLOW = [
    ("layer", "int4-64", 1, (40, 20), False, None, True),
    ("rms_offset", "bfloat16", 5, (34,), False, None, False),
    ("rms", "int8", 2, (24, 40), False, "gelu", False),
    ("layer", "fp8", 16, (48,), True, "relu", True),
]


@pytest.mark.parametrize(
    ("kind", "form", "rows", "outputs", "gated", "activation", "with_residual"), FUSED + slowly(FUSED_SLOW)
)
def test_neighbours_of_a_matmul(rng, kind, form, rows, outputs, gated, activation, with_residual):
    inputs = 320
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x = array(1, rows, inputs) * 2 + 0.5
    norm = kind and Norm(kind=kind, eps=1e-3, scale=array(inputs), bias=array(inputs) if kind == "layer" else None)
    weights = tuple(weight(rng, n, inputs, form) for n in outputs)
    biases = tuple(array(n) for n in outputs)
    residual = array(1, rows, sum(outputs) // (2 if gated else 1)) if with_residual else None

    def run(implementation):
        arguments = {"biases": biases, "norm": norm, "activation": activation, "gated": gated, "residual": residual}
        return fused_matmul(x, weights, **arguments, implementation=implementation)

    with kernels():
        found = run("xla" if form == "bfloat16" and rows > 16 else "pallas")
    wanted = np.asarray(run("reference"), np.float64)
    loose = form == "bfloat16" or rows > 16
    # the reference multiplies bfloat16 weights with float32 inputs; |x| |w|, which EXACT is a part of, is six times the largest sum here,
    # and a gate multiplies two of them
    assert np.abs(found - wanted).max() < (1e-2 if loose else 30 * EXACT) * np.abs(wanted).max()


def mlp(rng, form, gated=True):
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    width, hidden = 64, 96
    up = (weight(rng, hidden * (2 if gated else 1), width, form),)
    weights = MLPWeights(norm=array(width), up=up, up_bias=(), down=weight(rng, width, hidden, form), down_bias=array(width))
    return weights, MLPSpec(activation="silu", gated=gated, eps=1e-5), array(1, 2, width)


@pytest.mark.parametrize("form", ["int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_mlp_block_and_its_gradient(rng, form):
    weights, spec, x = mlp(rng, form)
    run = lambda x: mlp_block(x, weights, spec=spec, residual=x)
    with kernels():
        found, gradient = jax.value_and_grad(lambda x: jnp.sum(run(x) ** 2))(x)
    wanted, wanted_gradient = jax.value_and_grad(lambda x: jnp.sum(run(x) ** 2))(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-2)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=0, atol=2e-2 * np.abs(wanted_gradient).max())


def test_what_it_does_not_take_is_said(rng):
    gpu = Target(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")
    known = {"rows": 1, "outputs": 8, "inputs": 64, "group": None, "layout": "canonical", "activation": None, "zeros": None}
    refused = [
        ({"format": "uint8", "group": 64}, "not uint8"),
        ({"format": "fp8", "activation": INPUTS["fp8 token"]}, "does not multiply float8"),
        ({"format": "nf4", "group": 64, "activation": ActivationQuant()}, "not nf4"),
        ({"format": "int4", "group": 48}, "not 48"),
        ({"format": "int4", "group": 64, "layout": "gpu"}, "repack"),
        ({"format": "int8", "activation": ActivationQuant(group=40)}, "not per 40"),
        ({"format": "int4", "group": 64, "zeros": "uint8", "activation": ActivationQuant()}, "symmetric"),
        ({"format": "int8", "rows": 0}, "nothing"),
        ({"format": "int8", "outputs": 1 << 26}, "cannot index"),
    ]
    for facts, reason in refused:
        with pytest.raises(BackendError, match=reason):
            choose("quant_matmul", "pallas", gpu, **{**known, **facts})
        assert choose("quant_matmul", target=gpu, **{**known, **facts}).name == "reference"
    assert choose("quant_matmul", target=gpu, **known, format="int8").name == "pallas"
    with pytest.raises(BackendError, match="made for gpu"):
        quant_matmul(jnp.ones((1, 64)), jnp.ones((8, 64), jnp.bfloat16), implementation="pallas")
    with pytest.raises(BackendError, match="one form"), kernels():
        fused_matmul(jnp.ones((1, 64)), (weight(rng, 8, 64, "int8"), weight(rng, 8, 64, "int4-32")), implementation="pallas")
    floats = (weight(rng, 8, 64, "bfloat16"),)
    with pytest.raises(BackendError, match="17 rows of floats; this takes up to 16"), kernels():
        fused_matmul(jnp.ones((1, 17, 64)), floats, implementation="pallas")
    with pytest.raises(BackendError, match="made for gpu, not for cpu"):
        fused_matmul(jnp.ones((17, 64)), floats, implementation="xla")
    with pytest.raises(BackendError, match="16-bit floats, not int8"), kernels():
        fused_matmul(jnp.ones((17, 64)), (weight(rng, 8, 64, "int8"),), implementation="xla")
    fused = {"weights": floats, "activation": None, "gated": False, "over_shards": False}
    for rows, name in ((16, "pallas"), (17, "xla")):
        assert choose("fused_matmul", target=gpu, shape=(rows, 64), **fused).name == name
    w, x = weight(rng, 8, 64, "int4-32"), jnp.ones((1, 64))
    with kernels():
        np.testing.assert_allclose(quant_matmul(x, repack(w, "gpu")), x @ dequantize(w).T, rtol=1e-5)
    for wish, reason in (({"outputs": 48}, "power of two"), ({"outputs": 8, "splits": 1}, "at least 16")):
        with kernels(), tiles({"quant_matmul": wish}), pytest.raises(BackendError, match=reason):
            quant_matmul(x, w, implementation="pallas")


# weight of a real model, form, rows, GPU
PAIRS = [
    ("llama_3_1_8b.q", "int4-128", 1, "a100"),
    ("llama_3_1_8b.q", "int4-32-minimum", 16, "h100"),
    ("llama_3_1_8b.down", "int8", 1, "h100"),
    ("llama_3_1_8b.down", "int4-64-zeros", 3, "b200"),
    ("llama_3_1_8b.head", "bfloat16", 1, "b200"),
    ("smollm2_135m.q", "int8-64", 16, "a100"),
    ("llama_2_7b.down", "int8", 512, "b200"),
    ("llama_2_7b.gate", "int4-64", 512, "a100"),
    ("llama_3_1_8b.gate", "int4-128", 512, "h100"),
    ("llama_3_1_8b.down", "fp8-128", 1, "a100"),
    ("llama_3_1_8b.q", "nf4-64", 1, "h100"),
    ("llama_3_1_8b.q", "mxfp4", 512, "b200"),
]


@pytest.mark.aot
@pytest.mark.parametrize(("spec", "form", "rows", "gpu"), PAIRS)
def test_compiles_for_gpus(spec, form, rows, gpu):
    spec = SPECS[spec]
    w = shapes_of((spec.outputs, spec.inputs), form)
    found = compiled(gpu, quant_matmul, jax.ShapeDtypeStruct((rows, spec.inputs), jnp.float32), w, launches=("quant_matmul",))
    (kernel,) = found.kernels
    assert kernel.widest_load >= 8 and kernel.tensor_cores


@pytest.mark.aot
@pytest.mark.parametrize(
    ("gpu", "instruction"),
    [
        ("a100", "s32.s8.s8.s32"),
        pytest.param("h100", "s32.s8.s8", marks=pytest.mark.slow),
        pytest.param("b200", "kind::i8", marks=pytest.mark.slow),
    ],
)
def test_int8_meets_int8_on_tensor_cores(gpu, instruction):
    spec = SPECS["smollm2_135m.gate"]
    w, x = shapes_of((spec.outputs, spec.inputs), "int8", "token"), jax.ShapeDtypeStruct((512, spec.inputs), jnp.float32)
    found = compiled(gpu, quant_matmul, x, w, launches=("quantize_activations", "quant_matmul"))
    (product,) = (kernel for kernel in found.kernels if kernel.name == "quant_matmul")
    assert instruction in product.tensor_cores


@pytest.mark.aot
@pytest.mark.parametrize(
    ("form", "rows", "gpu"),
    [("int4-128", 1, "h100"), ("int8", 4, "a100"), pytest.param("bfloat16", 1, "b200", marks=pytest.mark.slow)],
)
def test_a_whole_mlp_block_is_two_launches(form, rows, gpu):
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    width, hidden = 4096, 14336
    up, down = shapes_of((2 * hidden, width), form), shapes_of((width, hidden), form)
    weights = MLPWeights(norm=struct(width), up=(up,), up_bias=(), down=down, down_bias=None)
    spec = MLPSpec(activation="silu", gated=True, eps=1e-5)
    run = lambda x, w: mlp_block(x, w, spec=spec, residual=x)
    compiled(gpu, run, struct(1, rows, width), weights, launches=("quant_matmul", "quant_matmul__1"))
