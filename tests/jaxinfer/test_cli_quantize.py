"""`jaxinfer quantize` in process on a tiny model: what is written is read, exported, mixed to a budget, resumed; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tiny_llama import TinyModel
from tokenizers import decoders, models, pre_tokenizers

import jaxinfer
from convert.load import materialize
from jaxinfer import cli
from jaxinfer.cli.info import source_facts
from jaxinfer.loading import open_source
from pallas_kernels.qtensor import ActivationQuant, QTensor, dequantize

TEXT = "".join(chr(33 + (7 * i * i + i) % 90) for i in range(2000))


@pytest.fixture(scope="module")
def spoken(tiny_model: Callable[..., TinyModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in groups of 32 with a tokenizer, and text.txt beside it."""
    folder = tmp_path_factory.mktemp("quantize") / "model"
    shutil.copytree(tiny_model(hidden_size=64, num_attention_heads=8, num_key_value_heads=4).folder, folder)
    letters = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if 33 <= ord(c) < 127]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["Ġ", *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def run(spoken: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(destination: Path, *options: str) -> tuple[int, str, str]:
        text = (
            "--calibration",
            str(spoken.parent / "text.txt"),
            "--sequences",
            "8",
            "--sequence-length",
            "32",
            "--group-size",
            "32",
        )
        status = cli.main(["quantize", str(spoken), str(destination), *text, *options])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.mark.slow
def test_gptq_is_written_verified_and_loaded(run, spoken: Path, tmp_path: Path) -> None:
    status, out, err = run(tmp_path / "q", "--bits", "4", "--method", "gptq", "--verify", "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert any(form.startswith("int4, group 32") for form in facts["after"]) and len(facts["relative_errors"]) == 21
    assert facts["verified"]["tokens"] == 8 * 31 and 0 < facts["verified"]["kl"] < 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q"]  # no work is left behind
    alone = jaxinfer.init_inference(tmp_path / "q", {"inference_max_tokens": 64})
    split = jaxinfer.init_inference(tmp_path / "q", {"inference_max_tokens": 64, "engine": {"tensor_parallel_size": 2}})
    params = jaxinfer.SamplingParams(max_tokens=6)
    assert alone.generate([[5, 9, 2]], params)[0].token_ids == split.generate([[5, 9, 2]], params)[0].token_ids


def test_exports_hold_the_same_numbers(run, tmp_path: Path) -> None:
    """What other systems read stands for the same weights as the native form, which has the same levels."""
    assert run(tmp_path / "native", "--method", "gptq")[0] == 0
    expected = materialize(open_source(tmp_path / "native").tensors)
    for form in ("gptq", "compressed-tensors"):
        assert run(tmp_path / form, "--method", "gptq", "--format", form)[0] == 0
        found = materialize(open_source(tmp_path / form).tensors)
        for path in ("blocks.0.attention.v", "blocks.2.mlp.down"):
            assert isinstance(found[path], QTensor)
            np.testing.assert_array_equal(dequantize(found[path]), dequantize(expected[path]))
    status, _, err = run(tmp_path / "asym", "--method", "rtn", "--asymmetric", "--format", "gptq")
    assert status == 1 and "gptq has no minimum per group" in err


@pytest.mark.slow
def test_static_inputs_are_written_split_and_exported(run, tmp_path: Path) -> None:
    """Scales of inputs that the text fixes: in the native form, on a mesh, in compressed-tensors and back, and what `info` says of them."""
    options = ("--bits", "8", "--method", "smoothquant", "--static-inputs", "--group-size", "0")
    assert run(tmp_path / "native", *options)[0] == 0
    tensors = open_source(tmp_path / "native").tensors
    values = materialize(tensors)
    q, k, down = (values[f"blocks.0.{name}"] for name in ("attention.q", "attention.k", "mlp.down"))
    assert isinstance(q, QTensor) and isinstance(k, QTensor) and isinstance(down, QTensor)
    assert q.activation == ActivationQuant(group=None, static=True) and q.input_scale.shape == (1, 1)
    assert q.input_scale == k.input_scale != down.input_scale  # inputs that are shared have one scale
    prompts, params = [[5, 9, 2], [40, 41]], jaxinfer.SamplingParams(max_tokens=6)
    answers = []
    for devices in ({}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        engine = jaxinfer.init_inference(tmp_path / "native", {"inference_max_tokens": 64, "engine": devices})
        answers.append([r.token_ids for r in engine.generate(prompts, params)])
    assert answers[0] == answers[1] == answers[2]
    assert run(tmp_path / "exported", *options, "--format", "compressed-tensors")[0] == 0
    exported = materialize(open_source(tmp_path / "exported").tensors)["blocks.0.mlp.down"]
    assert isinstance(exported, QTensor) and exported.activation == down.activation
    # its weights have float16 scales, so that inputs of later matrices differ a little
    np.testing.assert_allclose(exported.input_scale, down.input_scale, rtol=0.02)
    np.testing.assert_allclose(dequantize(exported), dequantize(down), atol=1.1 * float(down.scales.max()))
    facts = source_facts(str(tmp_path / "native"))
    reasons = [why for form, why in facts["not_native"].items() if "int8 inputs at a static scale" in form]
    assert len(reasons) == 1 and "not a static one" in reasons[0]
    status, _, err = run(tmp_path / "floats", "--bits", "8", "--static-inputs", "--activation-bits", "16", "--method", "rtn")
    assert status == 1 and "static scales are for inputs that are rounded" in err


@pytest.mark.slow
def test_auto_bits_fit_the_budget(run, tmp_path: Path) -> None:
    forms = "w4a16-g32,w8a16,bfloat16,float32"
    status, out, err = run(tmp_path / "auto", "--bits", "auto", "--budget", "110k", "--forms", forms, "--method", "rtn")
    assert status == 0, err
    assert "chosen" in out and "blocks.0" in out
    tensors = open_source(tmp_path / "auto").tensors
    size = sum(t.nbytes for t in tensors.values())
    kinds = {str(t.packed.format if t.packed else t.dtype) for path, t in tensors.items() if len(t.shape) == 2}
    assert 0.9 * 110_000 < size <= 110_000 and len(kinds) > 1
    assert not any(t.packed.zeros for t in tensors.values() if t.packed)
    status, out, _ = run(tmp_path / "near", "--bits", "auto", "--budget", "+2%", "--forms", forms, "--method", "rtn", "--json")
    costs = [choice["cost"] for choice in json.loads(out)["choices"].values()]
    assert status == 0 and 0.005 < sum(costs) <= np.log(1.02)
    status, _, err = run(tmp_path / "bad", "--bits", "auto", "--budget", "110k", "--forms", "w3a16")
    assert status == 1 and "'w3a16' is not understood" in err
    status, _, err = run(tmp_path / "less", "--bits", "auto", "--budget", "10k", "--method", "rtn")
    assert status == 1 and "smallest forms" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "5"], "weight_bits is 5; choose one of 8, 4"),
        (["--bits", "four"], "--bits is 'four'"),
        (["--group-size", "48"], "group_size is 48"),
        (["--group-size", "128"], "groups of 128 do not divide its 64 inputs"),
        (["--sequences", "1000"], "1000 sequences of 32 need 32000"),
        (["--sequence-length", "1000"], "the model was made for 128"),
        (["--rule", "nothing=int8"], "'nothing' of the quantisation matches no matrix"),
        (["--rule", "int8"], "is not PATTERN=FORM"),
        (["--weight-format", "fp8", "--bits", "4"], "weight_format is 'fp8', which has 8 bits"),
        (["--bits", "16"], "--bits is '16'; give 4, 8 or auto"),
        (["--bits", "auto", "--budget", "+0%"], "the loss is 0.0"),
        (["--rule", "*.q=nf4"], "nf4 is rounded to the nearest only"),
        (["--damping", "0"], "damping is 0"),
        (["--format", "gguf", "--bits", "8", "--group-size", "0"], "give a group size"),
        (["--calibration", "missing.txt"], "missing.txt cannot be read"),
    ],
)
def test_what_is_refused(run, tmp_path: Path, options: list[str], words: str) -> None:
    status, _, err = run(tmp_path / "q", *options)
    assert status == 1 and words in err
    assert not (tmp_path / "q").exists()


def test_destinations_and_methods_without_text(run, spoken: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "taken").write_text("x")
    status, _, err = run(tmp_path / "taken")
    assert status == 1 and "exists" in err
    for method, expected in (("awq", 1), ("rtn", 0)):
        status = cli.main(["quantize", str(spoken), str(tmp_path / method), "--method", method, "--bits", "8"])
        assert status == expected and ("needs a calibration text" in capsys.readouterr().err) == bool(expected)
    with pytest.raises(SystemExit):
        cli.main(["quantize", str(spoken), str(tmp_path / "x"), "--bits", "auto"])
