"""Checkpoints of other systems' own quantisers are read with the numbers that these mean; and these read what is exported here.

What a system that cannot be had would have made or read is skipped, with the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_llama import TinyModel

import jaxinfer
from convert.export import export_checkpoint
from convert.load import QuantSpec, as_float
from convert.readers import open_checkpoint

pytestmark = pytest.mark.oracle
TESTS = Path(__file__).parents[1]
CLOSE = 1e-3  # of the largest logit
MADE = (
    *("w4a16", "w4a16-asym", "w8a16", "w8a8", "w8a8-static", "fp8-dynamic", "fp8-static", "fp8-block", "gptq-act-order", "awq"),
)
NAMES = (
    *(f"llmcompressor-{name}" for name in MADE),
    *("bitsandbytes-nf4", "bitsandbytes-int8", "gptqmodel", "gptqmodel-act-order", "transformers-mixtral"),
)


def python_of(variable: str, what: str) -> str:
    if not (python := os.environ.get(variable)):
        pytest.skip(f"{variable} names no Python with {what}")
    return python


def logits(model: jaxinfer.Decoder, prompt: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(model)(prompt.astype(np.int32)))


def check(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made(name): the folder of tests/peer_quantizers.py of that name; all are made at once, since importing takes longest."""
    python, folder = python_of("JAXINFER_QUANTIZERS_PYTHON", "quantisers"), tmp_path_factory.mktemp("peers")
    script = [python, TESTS / "peer_quantizers.py", folder, *NAMES]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=folder)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    errors = {line["name"]: line["error"] for line in lines}

    def get(name: str) -> Path:
        if name not in errors:
            pytest.fail(f"{name} was not made: {done.stderr[-2000:]}")
        if errors[name]:
            pytest.skip(f"{name} cannot be made here: {errors[name]}")
        return folder / name

    return get


@pytest.mark.parametrize("name", NAMES)
def test_files_of_quantisers(made: Callable[[str], Path], name: str) -> None:
    """Logits of the dequantised weights, inputs as they are."""
    folder = made(name)
    model = jaxinfer.load_model(folder, dtype="float32")
    check(logits(model, np.load(folder / "prompt.npy")), np.load(folder / "logits.npy"))
    stored = jaxinfer.load_model(folder).blocks[0].mlp.up.get_value()
    assert name.startswith("transformers") or stored.format in ("int4", "int8", "int4_ordered", "uint8", "fp8", "nf4")


@pytest.fixture(scope="module")
def grouped(tiny_model: Callable[..., TinyModel]) -> TinyModel:
    return tiny_model(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)


SPECS = {
    "int4": QuantSpec(format="int4", group=32),
    "int8": QuantSpec(format="int8"),
    "fp8": QuantSpec(format="fp8"),
}


@pytest.mark.parametrize(
    ("form", "name"), [*(("compressed-tensors", name) for name in SPECS), ("gptq", "int4"), ("gptq", "int8")]
)
def test_exported_folders_are_read(grouped: TinyModel, tmp_path: Path, form: str, name: str) -> None:
    """By transformers with compressed-tensors, and by GPTQModel."""
    python = python_of("JAXINFER_QUANTIZERS_PYTHON", "quantisers")
    export_checkpoint(tmp_path / "out", form, open_checkpoint(grouped.folder), spec=SPECS[name])
    done = subprocess.run([python, TESTS / "peer_readers.py", tmp_path / "out"], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    check(
        logits(jaxinfer.load_model(tmp_path / "out", dtype="float32"), np.load(tmp_path / "out" / "prompt.npy")),
        np.load(tmp_path / "out" / "logits.npy"),
    )


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[Callable[..., None]]:
    """llama_cpp(source, target, precision): llama.cpp's own quantize."""
    python = python_of("JAXINFER_LLAMA_CPP_PYTHON", "llama-cpp-python")

    def call(source: Path, target: Path, precision: str) -> None:
        worker = TESTS.parent / "scripts" / "bench" / "peer_llama_cpp.py"
        command = [python, worker, source, "--precision", precision, "--quantize", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    yield call


def check_numbers(packed: Path, floats: Path) -> set[str]:
    """Every tensor stands for the numbers of the float file; the forms that there are."""
    a, b = open_checkpoint(packed).tensors, open_checkpoint(floats).tensors
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        found, expected = (np.asarray(as_float(t).read(), np.float32) for t in (tensor, b[name]))
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max(), name
    return {str(t.packed.format if t.packed else t.dtype) for t in a.values()}


@pytest.mark.parametrize("precision", ["Q8_0", "Q4_0", "Q4_1", "Q4_K_M"])
def test_files_of_llama_cpp(llama_cpp: Callable[..., None], smollm2_gguf: Path, tmp_path: Path, precision: str) -> None:
    """Each weight is the number that llama.cpp itself dequantises it to, so that logits are the same too."""
    llama_cpp(smollm2_gguf, tmp_path / "packed.gguf", precision)
    llama_cpp(tmp_path / "packed.gguf", tmp_path / "floats.gguf", "F32")
    forms = check_numbers(tmp_path / "packed.gguf", tmp_path / "floats.gguf")
    assert {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4", "Q4_K_M": "float32"}[precision] in forms


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_llama_cpp_reads_what_is_exported(
    llama_cpp: Callable[..., None], smollm2_gguf: Path, tmp_path: Path, form: str
) -> None:
    """llama.cpp dequantises the exported file to the numbers that it means here."""
    export_checkpoint(tmp_path / "out.gguf", "gguf", open_checkpoint(smollm2_gguf), spec=QuantSpec(format=form, group=32))
    llama_cpp(tmp_path / "out.gguf", tmp_path / "floats.gguf", "F32")
    assert form in check_numbers(tmp_path / "out.gguf", tmp_path / "floats.gguf")
