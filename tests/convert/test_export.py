"""What is exported reads back as the same QTensors, and as the GGUF package reads it; nothing half-written is left."""

import dataclasses
import json

import numpy as np
import packed_writers
import pytest
from gguf import GGUFReader, quants

from convert import export as exporting
from convert.errors import DestinationExistsError, UnsupportedFormatError
from convert.export import export, export_checkpoint, quantized_for
from convert.load import QuantSpec, checked
from convert.readers import open_checkpoint
from convert.readers.base import TokenizerAssets
from convert.readers.gguf import MappedFile, read_header
from pallas_kernels.qtensor import ActivationQuant, dequantize

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
SHAPES = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "gate": (96, 64), "up": (96, 64), "down": (64, 96)}
INT4, INT8 = QuantSpec(format="int4", group=32), QuantSpec(format="int8", group=32)


@pytest.fixture(scope="module")
def floats():
    rng = np.random.default_rng(9)
    out = {"model.embed_tokens.weight": rng.standard_normal((50, 64)).astype(np.float32)}
    for name, shape in SHAPES.items():
        block = "self_attn" if name in "qkvo" else "mlp"
        out[f"model.layers.0.{block}.{name}_proj.weight"] = (rng.standard_normal(shape) * 0.1).astype(np.float32)
    for name in ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"):
        out[f"{name}.weight"] = rng.standard_normal(64).astype(np.float32)
    return out


@pytest.fixture
def source(floats, lazy):
    return {name: lazy(name, array) for name, array in floats.items()}


def written(dst, form, tensors, **options):
    export(dst, form, config=CONFIG, tensors=tensors, assets=TokenizerAssets(), **options)
    return open_checkpoint(dst)


def same(tensor, original):
    """Equal as stored, but for one scale per channel, which a reader may keep in groups."""
    a, b = tensor.read(), original.read()
    if original.packed is None:
        np.testing.assert_array_equal(a, b)
        return
    assert (a.format, a.activation) == (b.format, b.activation)
    np.testing.assert_array_equal(dequantize(a), dequantize(b))
    if b.group:
        assert a.group == b.group
        for part in ("values", "scales", "zeros"):
            np.testing.assert_array_equal(getattr(a, part), getattr(b, part))


@pytest.mark.parametrize(
    ("form", "spec"),
    [
        ("gptq", INT4),
        ("gptq", INT8),
        ("gptq", QuantSpec(format="int8")),
        ("compressed-tensors", INT4),
        ("compressed-tensors", QuantSpec(format="int8", activation=ActivationQuant(group=None))),
        ("compressed-tensors", QuantSpec(format="int8", group=16, activation=ActivationQuant(group=32))),
        ("gguf", INT4),
        ("gguf", INT8),
        ("gguf", QuantSpec(format="int4", group=32, symmetric=False)),
    ],
)
def test_read_back_equal(tmp_path, source, form, spec):
    tensors = quantized_for(form, source, spec)
    assert sum(t.packed is not None for t in tensors.values()) == len(SHAPES)
    again = written(tmp_path / "out", form, tensors)
    assert set(again.tensors) == set(tensors)
    for name, tensor in tensors.items():
        same(again.tensors[name], tensor)
    assert {key: again.config[key] for key in CONFIG if key not in ("hidden_act", "torch_dtype")} == {
        key: value for key, value in CONFIG.items() if key != "hidden_act"
    }


@pytest.mark.parametrize(
    ("name", "form"), [("awq", "gptq"), ("awq", "compressed-tensors"), ("int8_zeros", "compressed-tensors")]
)
def test_packed_checkpoints_go_over_unrounded(tmp_path, floats, name, form):
    packed_writers.write_folder(tmp_path / "in", CONFIG, floats, name)
    tensors = quantized_for(form, open_checkpoint(tmp_path / "in").tensors, None)
    again = written(tmp_path / "out", form, tensors)
    for path, tensor in tensors.items():
        np.testing.assert_array_equal(*(dequantize(t.read()) if t.packed else t.read() for t in (again.tensors[path], tensor)))


def test_schemes_that_differ_are_groups(tmp_path, source):
    four, eight = quantized_for("gptq", source, INT4), quantized_for("gptq", source, INT8)
    tensors = {name: eight[name] if "down" in name else four[name] for name in four}
    again = written(tmp_path / "out", "compressed-tensors", tensors)
    for name, tensor in tensors.items():
        same(again.tensors[name], tensor)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 2
    with pytest.raises(UnsupportedFormatError, match="one form"):
        written(tmp_path / "none", "gptq", tensors)


def test_several_files_have_an_index(tmp_path, source, monkeypatch):
    monkeypatch.setattr(exporting, "FILE_BYTES", 5000)
    tensors = quantized_for("gptq", source, INT4)
    again = written(tmp_path / "out", "gptq", tensors)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    for name, tensor in tensors.items():
        same(again.tensors[name], tensor)


def test_the_gguf_package_reads_the_same(tmp_path, source):
    tensors = quantized_for("gguf", source, INT4)
    written(tmp_path / "m.gguf", "gguf", tensors)
    read = {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(tmp_path / "m.gguf").tensors}
    q, up = (dequantize(tensors[f"model.layers.0.{name}_proj.weight"].read()) for name in ("self_attn.q", "mlp.up"))
    np.testing.assert_array_equal(read["blk.0.ffn_up.weight"], up)
    interleaved = np.empty_like(q)  # row (head, pair, half) of a file is row (head, half, pair) here
    for row in range(64):
        head, pair, half = row // 16, row % 16 // 2, row % 2
        interleaved[row] = q[head * 16 + half * 8 + pair]
    np.testing.assert_array_equal(read["blk.0.attn_q.weight"], interleaved)


def test_a_gguf_file_goes_over_with_its_tokenizer(tmp_path, source, gguf_file):
    tokens = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.token_type": [1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": 1,
    }
    array = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    stored = {
        "token_embd.weight": (np.ones((3, 64), np.float32), "Q8_0"),
        "blk.0.attn_q.weight": (array, "Q4_1"),
        "rope_freqs.weight": (np.linspace(1, 2, 8, dtype=np.float32), None),
    }
    first = open_checkpoint(gguf_file(stored, tokens))
    export_checkpoint(tmp_path / "out.gguf", "gguf", first)
    again = open_checkpoint(tmp_path / "out.gguf")
    assert again.config == first.config and again.assets == first.assets and again.assets.tokenizer_json
    for name, tensor in first.tensors.items():
        same(again.tensors[name], checked(tensor))
    float_embedding = quantized_for(
        "gptq", {**first.tensors, "x_proj.weight": first.tensors["model.embed_tokens.weight"]}, None
    )
    assert first.tensors["model.embed_tokens.weight"].packed and not float_embedding["model.embed_tokens.weight"].packed
    header = read_header(MappedFile(again.path))
    assert {key: header.metadata[key] for key in tokens} == tokens and header.tensors["blk.0.attn_q.weight"][1].name == "Q4_1"


def test_checkpoints_that_are_not_exported(tmp_path, source, gguf_file):
    native = dataclasses.replace(
        open_checkpoint(gguf_file({"output_norm.weight": (np.ones(64, np.float32), None)})), format="native"
    )
    with pytest.raises(UnsupportedFormatError, match="native checkpoint; export the one"):
        export_checkpoint(tmp_path / "out", "gptq", native, spec=INT4)
    other = dataclasses.replace(native, format="gguf", config={"model_type": "gemma2"})
    with pytest.raises(UnsupportedFormatError, match="GGUF file of a gemma2"):
        export_checkpoint(tmp_path / "out", "gptq", other, spec=INT4)


@pytest.mark.parametrize(
    ("form", "spec", "config", "match"),
    [
        ("gptq", QuantSpec(format="int4", group=32, symmetric=False), {}, "minimum per group"),
        ("gptq", QuantSpec(format="nf4", group=32), {}, "nf4, which gptq cannot hold"),
        ("gptq", QuantSpec(format="int8", activation=ActivationQuant()), {}, "quantised inputs"),
        ("gptq", None, {}, "no tensor is quantised"),
        ("compressed-tensors", INT4, {"rope_scaling": {"rope_type": "factors", "factors": [1.0]}}, "no key in config.json"),
        ("gguf", QuantSpec(format="int8"), {}, "a row"),
        ("gguf", INT4, {"model_type": "gpt_neox"}, "'gpt_neox' is not written"),
        ("gguf", INT4, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ("gguf", INT4, {"sliding_window": 32}, "sliding_window 32"),
        ("awq", INT4, {}, "'awq' is not written"),
    ],
)
def test_what_is_not_written_is_named(tmp_path, source, form, spec, config, match):
    with pytest.raises(UnsupportedFormatError, match=match):
        tensors = quantized_for(form, source, spec)
        export(tmp_path / "out", form, config={**CONFIG, **config}, tensors=tensors, assets=TokenizerAssets())
    assert not list(tmp_path.iterdir())


def test_other_families_and_full_places(tmp_path, source, lazy):
    with pytest.raises(UnsupportedFormatError, match="not exported"):
        quantized_for("gptq", {"h.0.attn.c_attn.weight": lazy("w", np.ones((4, 4)))}, INT4)
    unknown = quantized_for("gguf", source, INT4) | {
        "model.extra.weight": checked(lazy("model.extra.weight", np.ones(4, np.float32)))
    }
    with pytest.raises(UnsupportedFormatError, match=r"model\.extra\.weight has no name"):
        written(tmp_path / "m.gguf", "gguf", unknown)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(DestinationExistsError, match="never overwrites"):
        written(tmp_path / "full", "gptq", quantized_for("gptq", source, INT4))


@pytest.mark.parametrize("form", exporting.FORMS)
def test_an_error_on_the_way_leaves_nothing(tmp_path, source, form):
    tensors = quantized_for(form, source, INT4)
    done = []

    def progress(count, total, name):
        done.append(name)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "out", form, tensors, progress=progress)
    assert len(done) == 4 and not list(tmp_path.iterdir())
