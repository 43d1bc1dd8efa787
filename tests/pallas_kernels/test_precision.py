"""How float32 products are made: as float32, unless jax's setting says otherwise; and never for other dtypes."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.lax import DotAlgorithmPreset as Algorithm
from jax.lax import Precision
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from jaxinfer.config import MATMUL_PRECISIONS
from pallas_kernels.attention import attention
from pallas_kernels.deviceless import compile_for, lower_for
from pallas_kernels.launch import kernel_precision, launch
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.moe import grouped_matmul
from pallas_kernels.precision import JAX_NAMES
from pallas_kernels.qtensor import ActivationQuant, round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.target import interpreting

SETTINGS = {None: "HIGHEST", "highest": "HIGHEST", "high": "HIGH", "default": "DEFAULT"}


def dots(function, *arguments) -> set[str]:
    """The precisions of all dots of a function as it is lowered."""
    lines = [line for line in jax.jit(function).lower(*arguments).as_text().splitlines() if "stablehlo.dot_general" in line]
    assert lines
    return {line.partition("precision = [")[2].partition(",")[0] for line in lines}


def weights(dtype: str):
    w = jnp.ones((6, 64), jnp.float32)
    if dtype == "int8":
        return round_to_nearest(w, format="int8", activation=ActivationQuant(group=None))
    return round_to_nearest(w, format="int4", group=32) if dtype == "int4" else w.astype(dtype)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_matmul_of_float32(setting: str | None, implementation: str) -> None:
    for w in (weights("float32"), weights("int4")):  # what is dequantised is float32 too
        with jax.default_matmul_precision(setting):
            assert dots(lambda x, w=w: quant_matmul(x, w, implementation=implementation), jnp.ones((3, 64))) == {
                SETTINGS[setting]
            }


@pytest.mark.parametrize("setting", SETTINGS)
def test_attention_over_a_float32_cache(setting: str | None) -> None:
    def run(q):
        cache = LayerCache.zeros(rows=2, kv_heads=1, tokens=8, head_dim=4, dtype=jnp.float32)
        return attention(q, cache, rows=None, positions=jnp.zeros((2, 3), jnp.int32), scale=1.0, implementation="reference")

    with jax.default_matmul_precision(setting):
        assert dots(run, jnp.ones((2, 3, 2, 4))) == {SETTINGS[setting]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_other_dtypes_are_left_alone(dtype: str) -> None:
    with jax.default_matmul_precision("highest"):
        assert dots(lambda x: quant_matmul(x, weights(dtype), implementation="xla"), jnp.ones((3, 64))) == {"DEFAULT"}


# what a GPU is told, by the name in the configuration
ON_GPUS = {"float32": "HIGHEST", "tf32_x3": "TF32_TF32_F32_X3", "tf32": "TF32_TF32_F32", "bfloat16": "BF16_BF16_F32"}
INSTRUCTIONS = {"float32": "", "tf32_x3": ".tf32.", "tf32": ".tf32.", "bfloat16": ".bf16."}  # of tensor cores


def precisions_on_a_gpu(run, *arguments) -> set[str]:
    """Of the dots of a function that is traced for an H100."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    return set(re.findall(r"precision=\(?(?:Precision\.)?(\w+)", str(jax.make_jaxpr(sharded)(*arguments))))


def test_every_name_of_the_configuration_has_one_of_jax() -> None:
    assert tuple(JAX_NAMES) == MATMUL_PRECISIONS == tuple(ON_GPUS)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ON_GPUS)
def test_names_are_algorithms_on_a_gpu(name: str, rows: int) -> None:
    """Where jax's own HIGH and DEFAULT are the same; a single row stays in float32 instead of three products."""
    with jax.default_matmul_precision(JAX_NAMES[name]):
        found = precisions_on_a_gpu(lambda x: quant_matmul(x, weights("float32")), jnp.ones((rows, 64)))
    assert found == {"HIGHEST" if name == "tf32_x3" and rows == 1 else ON_GPUS[name]}


@pytest.mark.parametrize("name", ON_GPUS)
def test_experts_are_no_less_exact_than_the_name(name: str) -> None:
    """jax leaves out of a ragged dot that there are three products."""
    run = lambda x: grouped_matmul(x, jnp.ones((2, 5, 64)), jnp.array([1, 2]), implementation="reference")
    with jax.default_matmul_precision(JAX_NAMES[name]):
        assert precisions_on_a_gpu(run, jnp.ones((3, 64))) == {"HIGHEST" if name == "tf32_x3" else ON_GPUS[name]}


@pytest.mark.parametrize(
    ("setting", "precision"),
    [
        (None, Precision.HIGHEST),
        ("highest", Precision.HIGHEST),
        ("default", Algorithm.TF32_TF32_F32),
        ("BF16_BF16_F32_X3", Algorithm.BF16_BF16_F32_X3),
        *((JAX_NAMES[name], getattr(Algorithm, found, Precision.HIGHEST)) for name, found in ON_GPUS.items()),
    ],
)
def test_kernels_take_the_same_precision(setting: str | None, precision) -> None:
    with jax.default_matmul_precision(setting):
        assert kernel_precision("float32") == precision
        assert kernel_precision("bfloat16") == Precision.DEFAULT
        with interpreting():
            assert kernel_precision("float32") == Precision.HIGHEST


def by_xla(x, w):
    return quant_matmul(x, w, implementation="xla")


def by_a_kernel(x, w):
    def kernel(x_ref, w_ref, y_ref):
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        y_ref[...] = dot(x_ref[...], w_ref[...], (((1,), (1,)), ((), ())), precision=kernel_precision(x_ref.dtype))

    return launch(kernel, x, w, name="product", out=x, grid=(1,), warps=4)


@pytest.mark.aot
@pytest.mark.parametrize("run", [by_xla, by_a_kernel])
@pytest.mark.parametrize("name", ON_GPUS)
def test_names_show_in_the_instruction_that_multiplies(name: str, run) -> None:
    square = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    with jax.default_matmul_precision(JAX_NAMES[name]):
        found = {k.tensor_cores for k in compile_for("a100", run, square, square).kernels} - {""}
    assert len(found) == (name != "float32") and all(INSTRUCTIONS[name] in instruction for instruction in found)


@pytest.mark.aot
@pytest.mark.parametrize("run", [by_xla, by_a_kernel])
def test_no_two_names_are_one_program(run) -> None:
    square = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    texts = set()
    for setting in JAX_NAMES.values():
        with jax.default_matmul_precision(setting):
            texts.add(lower_for("a100", run, square, square).as_text())
    assert len(texts) == len(JAX_NAMES)
