"""Kernels in the Triton language, where jax-triton is installed: their numbers in its interpreter, and compiled without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from kernel_checks import GPU_NAMES

from pallas_kernels.deviceless import compile_for, kernels_of
from pallas_kernels.errors import BackendError
from pallas_kernels.jax_triton import register_triton
from pallas_kernels.norm import fused_norm, rms_norm
from pallas_kernels.norm.specs import SPECS as NORMS
from pallas_kernels.qtensor import round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul.specs import SPECS as MATMULS
from pallas_kernels.registry import choose, unregister
from pallas_kernels.target import Target

GPU = Target(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
FACTS = {
    "rows": 1,
    "outputs": 8,
    "inputs": 64,
    "group": 64,
    "format": "int4",
    "layout": "canonical",
    "activation": None,
    "zeros": None,
}


def test_it_is_an_alternative_that_is_named(monkeypatch):
    assert choose("quant_matmul", target=GPU, **FACTS).name == "pallas"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="jax_triton is not installed"):
        choose("quant_matmul", "jax_triton", GPU, **FACTS)
    norm = {"shape": (2, 64), "dtype": jnp.dtype("float32"), "quant": None, "dropout": False}
    assert choose("fused_norm", target=GPU, **norm).name == "pallas"
    with pytest.raises(BackendError, match="jax_triton is not installed"):
        choose("fused_norm", "jax_triton", GPU, **norm)


def test_what_it_does_not_take_is_said():
    pytest.importorskip("jax_triton")
    for facts, reason in (({"format": "int8"}, "not int8"), ({"rows": 9}, "not 9"), ({"group": 48}, "not 48")):
        with pytest.raises(BackendError, match=reason):
            choose("quant_matmul", "jax_triton", GPU, **{**FACTS, **facts})
    norm = {"shape": (2, 64), "dtype": jnp.dtype("float32"), "quant": None, "dropout": False}
    for facts, reason in (
        ({"dropout": True}, "neither rounds to levels nor drops"),
        ({"shape": (2, 1 << 16)}, "does not fit the registers"),
        ({"shape": (0, 64)}, "nothing to norm"),
    ):
        with pytest.raises(BackendError, match=reason):
            choose("fused_norm", "jax_triton", GPU, **(norm | facts))


def test_a_kernel_of_a_user_is_refused_where_it_cannot_run():
    implementation = register_triton("of_a_user", "triton", lambda x: x, kernels=())
    try:
        assert "made for gpu, not for cpu" in implementation.refusal(Target(platform="cpu", device_kind="cpu"), {})
        assert "has 7.0" in implementation.refusal(Target(platform="gpu", device_kind="NVIDIA Tesla V100-SXM2"), {})
        reason = implementation.refusal(GPU, {})
        if importlib.util.find_spec("jax_triton") is None:
            assert reason == "the package jax_triton is not installed"
        else:
            assert reason is None
            unknown = Target(platform="gpu", device_kind="NVIDIA of another year")
            assert implementation.refusal(unknown, {}) == "the compute capability of NVIDIA of another year is not known"
    finally:
        unregister("of_a_user", "triton")


@pytest.mark.slow
def test_numbers_in_the_interpreter(rng):
    pytest.importorskip("jax_triton")
    script = Path(__file__).parents[1] / "triton_interpreter.py"
    path = os.pathsep.join([str(script.parents[1]), *sys.path])
    command = [sys.executable, str(script), str(rng.integers(1 << 31))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def resources(tmp_path, monkeypatch):
    """A function that compiles another one for a GPU and says what ptxas says of its only kernel; XLA holds the code and does not look."""
    pytest.importorskip("jax_triton")
    monkeypatch.setattr("jax_triton.triton_lib._JAX_TRITON_DUMP_DIR", str(tmp_path))

    def run(gpu, function, *args):
        found = compile_for(gpu, function, *args)
        assert re.findall(r'custom_call_target="(\w+)"', found.text) == ["triton_kernel_call_ffi"]
        (path,) = tmp_path.rglob("*.ptx")
        (kernel,) = kernels_of(path.read_text())
        assert kernel.spilled == 0 and kernel.registers * kernel.threads <= 65536, kernel
        return kernel

    return run


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize(
    ("name", "group", "symmetric", "rows"),
    [
        (name, group, symmetric, rows)
        for name in ("llama_3_1_8b.q", "llama_3_1_8b.down", "smollm2_135m.gate")
        for group, symmetric, rows in ((128, True, 1), (64, False, 8), (32, True, 4))
        if MATMULS[name].inputs % group == 0
    ],
)
def test_compiles_for_gpus(resources, gpu, name, group, symmetric, rows):
    spec = MATMULS[name]
    w = jax.eval_shape(
        lambda w: round_to_nearest(w, format="int4", group=group, symmetric=symmetric),
        jax.ShapeDtypeStruct((spec.outputs, spec.inputs), jnp.float32),
    )
    run = lambda x, w: quant_matmul(x, w, implementation="jax_triton")
    kernel = resources(gpu, run, jax.ShapeDtypeStruct((rows, spec.inputs), jnp.float32), w)
    assert kernel.tensor_cores


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_compiles_for_gpus(resources, gpu, name, dtype, full):
    spec = NORMS[name]
    row, vector = jax.ShapeDtypeStruct((7, spec.width), dtype), jax.ShapeDtypeStruct((spec.width,), jnp.float32)

    def run(x, scale, bias):
        if not full:
            return rms_norm(x, scale, eps=spec.eps, implementation="jax_triton")
        given = {"kind": "layer", "eps": spec.eps, "residual": x, "activation": "gelu"}
        return fused_norm(x, scale, bias, **given, implementation="jax_triton")

    assert resources(gpu, run, row, vector, vector).widest_load >= (8 if spec.width % 4 == 0 else 2)
