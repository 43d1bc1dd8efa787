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

from pallas_kernels.deviceless import compile_for
from pallas_kernels.errors import BackendError
from pallas_kernels.jax_triton import register_triton
from pallas_kernels.qtensor import round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
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


def test_what_it_does_not_take_is_said():
    pytest.importorskip("jax_triton")
    for facts, reason in (({"format": "int8"}, "not int8"), ({"rows": 9}, "not 9"), ({"group": 48}, "not 48")):
        with pytest.raises(BackendError, match=reason):
            choose("quant_matmul", "jax_triton", GPU, **{**FACTS, **facts})


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


def test_numbers_in_the_interpreter(rng):
    pytest.importorskip("jax_triton")
    script = Path(__file__).parents[1] / "triton_interpreter.py"
    path = os.pathsep.join([str(script.parents[1]), *sys.path])
    command = [sys.executable, str(script), str(rng.integers(1 << 31))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("gpu", "group", "symmetric", "rows"), [("a100", 128, True, 1), ("h100", 64, False, 8)])
def test_compiles_for_gpus(gpu, group, symmetric, rows):
    pytest.importorskip("jax_triton")
    w = jax.eval_shape(
        lambda w: round_to_nearest(w, format="int4", group=group, symmetric=symmetric),
        jax.ShapeDtypeStruct((4096, 4096), jnp.float32),
    )
    run = lambda x, w: quant_matmul(x, w, implementation="jax_triton")
    found = compile_for(gpu, run, jax.ShapeDtypeStruct((rows, 4096), jnp.float32), w)
    # its code is inside the call: what it takes does not show
    assert re.findall(r'custom_call_target="(\w+)"', found.text) == ["triton_kernel_call_ffi"]
