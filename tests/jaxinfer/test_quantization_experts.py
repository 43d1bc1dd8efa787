"""Models with experts: methods by the tokens that each expert sees, and their checkpoints in other systems' forms and back."""

from __future__ import annotations

from pathlib import Path

import golden_weights
import jax
import numpy as np
import packed_writers
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file

import jaxinfer
from convert.export import export_checkpoint
from convert.load import QuantSpec, materialize
from convert.names.gguf import canonical_name
from convert.readers import open_checkpoint
from jaxinfer import QuantizationConfig, errors
from jaxinfer.loading import module_of, open_source
from jaxinfer.models.decoder import parameters
from jaxinfer.quantization.calibration import Layers
from jaxinfer.quantization.experts import FEWEST, scaled_experts
from jaxinfer.quantization.methods import Method
from jaxinfer.quantization.policy import kept
from jaxinfer.quantization.quantizer import Quantizer, layer_weights, read_layer
from pallas_kernels.qtensor import QTensor, dequantize

TOKENS = np.random.default_rng(0).integers(0, 96, (8, 32)).astype(np.int32)
INT4 = QuantSpec(format="int4", group=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_weights.write_case_folder(golden_weights.load_case("mixtral"), tmp_path_factory.mktemp("mixtral"))


def logits(model: jaxinfer.Decoder) -> np.ndarray:
    return np.asarray(jax.jit(model)(TOKENS[:2]))


def near(found: np.ndarray, expected: np.ndarray) -> None:
    """At most tokens: rounding sends some of them to another expert."""
    assert np.median(np.abs(found - expected).max(-1)) < 0.05 * np.abs(expected).max()


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    return logits(jaxinfer.load_model(folder, dtype="float32"))


def quantized(folder: Path, work: Path, name: str, spec: str = "w4a16-g32", tokens: np.ndarray | None = TOKENS):
    opened = open_source(folder)
    quantization = QuantizationConfig.parse(spec)
    how = kept(parameters(opened.config), dtype=None, quantization=quantization, head_dim=opened.config.attention.head_dim)
    quantizer = Quantizer(opened.tensors, opened.config, how, Method(name=name), tokens=tokens, work=work)
    reports = quantizer.run()
    return module_of(opened.config, materialize(quantizer.results())), reports


def test_statistics_are_of_the_tokens_that_an_expert_sees(folder: Path) -> None:
    """Each token goes to the experts that the router prefers, as numpy finds them, and gate and up share what they see."""
    opened = open_source(folder)
    layers, values = Layers(opened.config, 32), read_layer(opened.tensors, 1)
    layers.batch = 3
    x = np.random.default_rng(1).normal(size=(8, 32, 64)).astype(np.float32)
    seen = layers.experts(layer_weights(values), x, 1)
    assert seen["gate"] is seen["up"] and set(seen) == {"gate", "up", "down"} and seen["up"].tokens.sum() == 8 * 32 * 2
    n = (x / np.sqrt((x**2).mean(-1, keepdims=True) + opened.config.norm_eps) * values["mlp.norm"]).reshape(-1, 64)
    chosen = np.argsort(-(n @ values["mlp.router"].T), -1)[:, :2]
    for e in range(4):
        rows = n[(chosen == e).any(-1)]
        assert seen["up"].tokens[e] == len(rows)
        np.testing.assert_allclose(seen["up"].experts[e].hessian, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
        act = lambda z: z / (1 + np.exp(-z))
        inner = act(rows @ values["mlp.gate"][e].T) * (rows @ values["mlp.up"][e].T)
        np.testing.assert_allclose(seen["down"].experts[e].mean, np.abs(inner).mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["gptq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rtn", "awq", "awq+gptq"))])
def test_methods_lose_less_than_the_nearest_levels(folder: Path, expected: np.ndarray, tmp_path: Path, name: str) -> None:
    model, reports = quantized(folder, tmp_path / "work", name)
    plain = logits(jaxinfer.load_model(folder, quantization="w4a16-g32"))
    up = model.blocks[1].mlp.up.get_value()
    assert isinstance(up, QTensor) and up.format == "int4" and up.shape == (4, 96, 64)
    error = lambda a: float(((a - expected) ** 2).mean())
    # without a text the error of the matrices is made least, not that of the logits
    assert error(logits(model)) < (1.05 if name == "rtn" else 0.8) * error(plain)
    assert {"mlp.gate", "mlp.up", "mlp.down", "attention.q"} <= reports[0].errors.keys()


@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_scaling_keeps_the_function(folder: Path, name: str) -> None:
    """The norm is divided, gate, up and router multiplied; up of each expert divided, its down multiplied."""
    opened = open_source(folder)
    layers, values = Layers(opened.config, 32), read_layer(opened.tensors, 1)
    x = np.random.default_rng(1).normal(size=(8, 32, 64)).astype(np.float32)
    x *= np.exp(np.random.default_rng(2).normal(size=64)).astype(np.float32)
    seen = layers.experts(layer_weights(values), x, 1)
    part = {path.removeprefix("mlp."): v for path, v in values.items() if path.startswith("mlp.")}
    specs = dict.fromkeys(("gate", "up", "down"), INT4)
    changed, divided = scaled_experts(part, seen, specs, Method(name=name), opened.config)
    assert all(not np.allclose(changed[n], part[n], rtol=0.05) for n in ("norm", "router", "gate", "up", "down"))
    after = values | {f"mlp.{n}": v for n, v in changed.items()}
    before = layers.run("mlp", layer_weights(values), x, 1)
    np.testing.assert_allclose(
        layers.run("mlp", layer_weights(after), x, 1), before, rtol=1e-3, atol=1e-3 * np.abs(before).max()
    )
    again = layers.experts(layer_weights(after), x, 1)
    for e in range(4):
        np.testing.assert_allclose(divided["down"].experts[e].mean, again["down"].experts[e].mean, rtol=1e-2)


def test_experts_that_see_little_are_rounded_and_named(folder: Path, tmp_path: Path) -> None:
    few = TOKENS[:3]
    _, reports = quantized(folder, tmp_path / "work", "gptq", tokens=few)
    opened = open_source(folder)
    named = {path for report in reports for path in report.plainly}
    assert 0 < len(named) < 3 * 4 * 3 and all(path.startswith("blocks.") and ".mlp." in path for path in named)
    assert few.size * 2 / 4 < FEWEST  # of an even share all experts would see too little
    again = Quantizer(
        opened.tensors,
        opened.config,
        kept(parameters(opened.config), dtype=None, quantization=QuantizationConfig.parse("w4a16-g32"), head_dim=16),
        Method(name="gptq"),
        tokens=few,
        work=tmp_path / "work",
    )
    assert {path for report in again.run() for path in report.plainly} == named  # it is kept with the work


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors", "gguf"])
def test_exports_read_back(folder: Path, tmp_path: Path, form: str) -> None:
    """Each expert's matrices are written under their own names, or stacked in GGUF, and stand for the same numbers."""
    path = tmp_path / ("model.gguf" if form == "gguf" else form)
    export_checkpoint(path, form, open_checkpoint(folder), spec=INT4)
    rounded = jaxinfer.load_model(folder, quantization=QuantizationConfig(weight_bits=4, group_size=32, head_bits=16))
    found = open_source(path)
    stack = found.tensors["blocks.2.mlp.down"].read()
    want = rounded.blocks[2].mlp.down.get_value()
    np.testing.assert_allclose(dequantize(stack), dequantize(jax.tree.map(np.asarray, want)), rtol=1e-6)
    model = jaxinfer.load_model(path)
    np.testing.assert_allclose(logits(model), logits(rounded), rtol=1e-3, atol=1e-3)
    if form == "gguf":
        fields = GGUFReader(path).fields
        assert fields["llama.expert_count"].contents() == 4 and fields["general.architecture"].contents() == "llama"


def test_a_qwen3_moe_as_gguf(tmp_path: Path) -> None:
    source = golden_weights.write_case_folder(golden_weights.load_case("qwen3_moe"), tmp_path / "hf")
    with pytest.raises(errors.QuantizationError, match="groups of 32 do not divide its 24 inputs"):
        export_checkpoint(tmp_path / "q.gguf", "gguf", open_checkpoint(source), spec=INT4)
    export_checkpoint(tmp_path / "ct", "compressed-tensors", open_checkpoint(source), spec=QuantSpec(format="int8"))
    near(logits(jaxinfer.load_model(tmp_path / "ct")), logits(jaxinfer.load_model(source, dtype="float32")))


@pytest.mark.parametrize(
    "form",
    [
        "awq",
        "gptq_act_order",
        *(
            pytest.param(form, marks=pytest.mark.slow)
            for form in ("gptq", "int4", "int8_inputs", "int8_static_inputs", "fp8_static_inputs")
        ),
    ],
)
def test_packed_mixtrals_are_read(folder: Path, tmp_path: Path, form: str) -> None:
    """The layouts of peers: every expert's matrices under its own name, packed."""
    config = golden_weights.load_case("mixtral")["config"]
    tensors = load_file(folder / "model.safetensors")
    truth = packed_writers.write_folder(tmp_path / form, config, tensors, form)
    floats = golden_weights.write_folder(tmp_path / "floats", config, truth)
    found, want = logits(jaxinfer.load_model(tmp_path / form)), logits(jaxinfer.load_model(floats))
    if packed_writers.FORMATS[form].exact:
        assert np.abs(found - want).max() < 1e-3 * np.abs(want).max()
    else:
        near(found, want)


@pytest.mark.slow
def test_fused_and_old_layouts(folder: Path, expected: np.ndarray, tmp_path: Path) -> None:
    """Gate and up of all experts in one tensor, as transformers 5 holds them; and GGUF files with a tensor for each expert."""
    config = golden_weights.load_case("mixtral")["config"]
    fused: dict[str, np.ndarray] = {}
    experts: dict[str, dict[str, list[np.ndarray]]] = {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        block, _, rest = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        if rest:
            experts.setdefault(block, {}).setdefault(rest.split(".")[1], []).append(tensor)
        else:
            fused[block] = tensor
    for block, parts in experts.items():
        fused[f"{block}.experts.gate_up_proj"] = np.stack(
            [np.concatenate(p) for p in zip(parts["w1"], parts["w3"], strict=True)]
        )
        fused[f"{block}.experts.down_proj"] = np.stack(parts["w2"])
    path = golden_weights.write_folder(tmp_path / "fused", config, fused)
    np.testing.assert_allclose(logits(jaxinfer.load_model(path)), expected, rtol=1e-5, atol=1e-5)
    split = jaxinfer.init_inference(path, {"inference_max_tokens": 64, "engine": {"tensor_parallel_size": 2}})
    whole = jaxinfer.init_inference(folder, {"inference_max_tokens": 64})
    params = jaxinfer.SamplingParams(max_tokens=8)
    assert split.generate([[5, 9, 2]], params)[0].token_ids == whole.generate([[5, 9, 2]], params)[0].token_ids
    export_checkpoint(tmp_path / "ct", "compressed-tensors", open_checkpoint(path), spec=QuantSpec(format="int8"))
    near(logits(jaxinfer.load_model(tmp_path / "ct")), expected)
    names = {}
    for part, own in (("ffn_gate", "w1"), ("ffn_down", "w2"), ("ffn_up", "w3")):
        names[f"blk.2.{part}.3.weight"] = f"model.layers.2.block_sparse_moe.experts.3.{own}.weight"
    assert {name: canonical_name(name, "mixtral") for name in names} == names
