"""Every damaged, foreign or unknown checkpoint has an error of its own class, before anything is compiled."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import golden_weights
import numpy as np
import pytest
from tiny_llama import TINY, check, tensor_shapes

import jaxinfer
from jaxinfer import errors
from jaxinfer.loading import open_source


@pytest.fixture(autouse=True)
def nothing_compiled(compiled: list[str]):
    """Of every test here: whatever is refused is refused before XLA is asked."""
    yield
    assert not compiled


@pytest.fixture
def change(tiny, tmp_path: Path) -> Callable[..., Path]:
    """change(config={...}, tensors={...}): the tiny model with these keys and tensors instead; None removes one."""

    def make(config: dict[str, Any] | None = None, tensors: dict[str, np.ndarray | None] | None = None) -> Path:
        merge = lambda old, new: {k: v for k, v in (old | (new or {})).items() if v is not None}
        return golden_weights.write_folder(tmp_path / "model", merge(tiny.config, config), merge(tiny.tensors, tensors))

    return make


def refused(kind: type[Exception], folder: Path, *words: str) -> None:
    """Both ways in refuse the folder alike."""
    for load in (jaxinfer.init_inference, jaxinfer.load_model):
        with pytest.raises(kind) as error:
            load(folder)
        assert type(error.value) is kind
        check(error, *words)


DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


def test_missing_tensors(change) -> None:
    refused(errors.MissingTensorError, change(tensors={DOWN: None, NORM: None}), "blocks.1.mlp.down", "blocks.2.attention.norm")


def test_missing_head(change) -> None:
    refused(errors.MissingTensorError, change(tensors={"lm_head.weight": None}), "head")


def test_unexpected_tensor(change) -> None:
    extra = {
        "model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32),
        "model.layers.3.mlp.up_proj.weight": np.ones(8, np.float32),
    }
    refused(errors.UnexpectedTensorError, change(tensors=extra), *extra)


def test_wrong_shape(change, tiny) -> None:
    refused(errors.TensorShapeError, change(tensors={DOWN: tiny.tensors[DOWN].T}), DOWN, "(96, 72)", "(72, 96)")


def test_several_problems_are_told_at_once(change, tiny) -> None:
    folder = change(tensors={DOWN: tiny.tensors[DOWN].T, NORM: None, "extra.weight": np.ones(2, np.float32)})
    with pytest.raises(errors.CheckpointMismatchError) as error:
        jaxinfer.init_inference(folder)
    check(error, DOWN, "blocks.2.attention.norm", "extra.weight")
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(change, tiny, value: float) -> None:
    for name in (DOWN, NORM, "model.embed_tokens.weight"):
        broken = tiny.tensors[name].copy()
        broken.flat[7] = value
        refused(errors.NonFiniteWeightError, change(tensors={name: broken}), name, "1 NaN or infinite values", "get it again")


def test_weights_that_are_no_numbers_on_a_mesh(change, tiny) -> None:
    """The bad value is in the last shard."""
    broken = tiny.tensors[DOWN].copy()
    broken[-1, -1] = np.nan
    for values in ({}, {"dtype": "bfloat16"}, {"quantization": "w8a8"}):
        with pytest.raises(errors.NonFiniteWeightError, match=re.escape(DOWN)):
            jaxinfer.init_inference(change(tensors={DOWN: broken}), {"engine": {"tensor_parallel_size": 3}} | values)


def test_weights_that_overflow(change, tiny) -> None:
    large = tiny.tensors[DOWN].copy()
    large[0, 0] = 1e5
    with pytest.raises(errors.NonFiniteWeightError) as error:
        jaxinfer.init_inference(change(tensors={DOWN: large}), {"dtype": "float16"})
    check(error, DOWN, "100000", "65504")


def test_truncated_safetensors(change) -> None:
    folder = change()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        file.write_bytes(whole[:size])
        refused(errors.TruncatedFileError, folder, str(file), f"{size} bytes", "again")


def write_gguf(path: Path, architecture: str = "llama") -> Path:
    """The tiny model without its tensors' contents: a header, metadata and zeros."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(72)
    writer.add_feed_forward_length(96)
    writer.add_head_count(9)
    writer.add_head_count_kv(3)
    writer.add_layer_norm_rms_eps(1e-5)
    names = {"self_attn.{}_proj": "attn_{}", "mlp.{}_proj": "ffn_{}"}
    for name, shape in tensor_shapes(TINY | {"num_hidden_layers": 1}).items():
        name = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        name = name.replace("lm_head", "output")
        name = name.replace("model.layers.", "blk.").replace("input_layernorm", "attn_norm")
        name = name.replace("post_attention_layernorm", "ffn_norm").replace("self_attn.o_proj", "attn_output")
        for long, short in names.items():
            for part in ("q", "k", "v", "gate", "up", "down"):
                name = name.replace(long.format(part), short.format(part))
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_truncated_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    assert jaxinfer.init_inference(path).plan.config.layers == 1
    whole = path.read_bytes()
    for size in (len(whole) - 100, len(whole) // 2, 200, 20, 0):
        path.write_bytes(whole[:size])
        refused(errors.TruncatedFileError, path, str(path), "again")


def test_unknown_architecture(change, tmp_path: Path) -> None:
    folder = change(config={"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    refused(errors.UnknownArchitectureError, folder, "MambaForCausalLM", "supported are", "LlamaForCausalLM")
    refused(errors.UnknownArchitectureError, change(config={"architectures": None, "model_type": "mamba"}), "'mamba'")
    refused(errors.UnknownArchitectureError, write_gguf(tmp_path / "model.gguf", "mamba"), "'mamba'", "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("is_causal", False),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 4096),
        ("rope_interleaved", True),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("num_local_experts", 8),
        ("something_new", 1),
    ],
)
def test_config_keys_that_change_the_maths(change, key: str, value: Any) -> None:
    refused(errors.UnknownConfigKeyError, change(config={key: value}), f"{key}={value!r}", "remove")


def test_config_values_that_are_not_supported(change) -> None:
    refused(errors.UnknownConfigKeyError, change(config={"hidden_act": "mish"}), "'mish'", "silu")
    refused(errors.UnknownConfigKeyError, change(config={"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}), "'ntk'", "yarn")
    scaling = {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}
    refused(errors.UnknownConfigKeyError, change(config={"rope_scaling": scaling}), "'linear'", "low_freq_factor")


def test_config_keys_that_change_nothing(change) -> None:
    neutral = {"is_causal": True, "partial_rotary_factor": 1.0, "use_cache": False, "sliding_window": None}
    assert open_source(change(config=neutral)).config.layers == 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers"]),
        ({"num_key_value_heads": 4}, ["9 query heads", "4 kv heads"]),
        ({"num_hidden_layers": "three"}, ["three"]),
    ],
    ids=str,
)
def test_config_that_makes_no_model(change, config: dict[str, Any], words: list[str]) -> None:
    refused(errors.UnsupportedFormatError, change(config=config), "config.json", *words)


def test_no_checkpoint(tmp_path: Path) -> None:
    refused(errors.UnsupportedFormatError, tmp_path, str(tmp_path), "it holds nothing")
    (tmp_path / "text.txt").write_text("no model")
    refused(errors.UnsupportedFormatError, tmp_path / "text.txt", "text.txt")
    refused(errors.CheckpointNotFoundError, tmp_path / "none.gguf", "none.gguf", "'demo'")
    refused(errors.CheckpointNotFoundError, Path("./not/there"), "not/there")


def test_hub_that_cannot_be_reached(monkeypatch, tmp_path: Path) -> None:
    import huggingface_hub

    def refuse(*args: Any, **keywords: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(errors.CheckpointNotFoundError) as error:
        jaxinfer.init_inference("nobody/nothing")
    check(error, "nobody/nothing", "no network")


def test_native_of_another_version(tiny, tmp_path: Path) -> None:
    from convert.native import save_native

    opened = open_source(tiny.folder)
    save_native(tmp_path / "native", config=opened.config.to_dict(), tensors=opened.tensors, assets=opened.assets)
    about = tmp_path / "native" / "jaxinfer.json"
    stored = json.loads(about.read_text())
    about.write_text(json.dumps(stored | {"format_version": 99}))
    refused(errors.NativeFormatError, tmp_path / "native", "99")
    about.write_text(json.dumps(stored | {"config": {"family": "llama"}}))
    refused(errors.NativeFormatError, tmp_path / "native", "ModelConfig", "convert the model again")


def test_bad_tokenizer_is_not_passed_over(tiny, tmp_path: Path) -> None:
    """A folder without a tokenizer takes token ids; one whose tokenizer cannot be read is damaged."""
    shutil.copytree(tiny.folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.NoTokenizerError) as error:
        jaxinfer.init_inference(tmp_path / "model")
    check(error, "tokenizer.json cannot be read")
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(errors.NoTokenizerError) as error:
        jaxinfer.init_inference(tmp_path / "model")
    check(error, "transformers cannot build a tokenizer")
    assert jaxinfer.init_inference(tiny.folder).tokenizer is None
