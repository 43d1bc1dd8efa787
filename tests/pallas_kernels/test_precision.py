"""How float32 products are made: as float32, unless jax's setting says otherwise; and never for other dtypes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from pallas_kernels.attention import attention
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.qtensor import ActivationQuant, round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul

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


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_high_on_a_gpu_is_three_products(setting: str | None, rows: int) -> None:
    """Where jax's own HIGH is one; a single row stays in float32."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    run = jax.shard_map(
        lambda x: quant_matmul(x, weights("float32")), mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()
    )
    with jax.default_matmul_precision(setting):
        text = str(jax.make_jaxpr(run)(jnp.ones((rows, 64))))
    wanted = SETTINGS[setting] if setting != "high" else "TF32_TF32_F32_X3" if rows > 1 else "HIGHEST"
    found = set(re.findall(r"precision=\(?(?:Precision\.)?(\w+)", text))
    assert found == {wanted}
