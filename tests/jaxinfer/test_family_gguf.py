"""GGUF files of every architecture, written with the gguf package's own tables: the logits are those of the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_weights
import jax
import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map

import jaxinfer
from jaxinfer import errors
from jaxinfer.loading import open_source

CASES = {
    "qwen2_biases": MODEL_ARCH.QWEN2,
    "qwen3_norms": MODEL_ARCH.QWEN3,
    "gpt2": MODEL_ARCH.GPT2,
    "phi3_window": MODEL_ARCH.PHI3,
    "gemma2": MODEL_ARCH.GEMMA2,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
}

type Write = Callable[..., Path]


def merged(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The matrices of a layer's experts in one tensor, which has their name without its number."""
    out, stacks = {}, {}
    for name, tensor in tensors.items():
        block, _, rest = name.partition(".experts.")
        if rest:
            stacks.setdefault(f"{block}.experts.{rest.partition('.')[2]}", []).append(tensor)
        else:
            out[name] = tensor
    return out | {name: np.stack(stack) for name, stack in stacks.items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(case, arch, extra tensors, **metadata): a golden case as llama.cpp's converter would write it."""

    def make(name: str, arch: MODEL_ARCH, extra: dict[str, np.ndarray] | None = None, **metadata: Any) -> Path:
        case = golden_weights.load_case(name)
        config = case["config"]
        get = lambda *keys: next(config[key] for key in keys if config.get(key) is not None)
        layers, embed, heads = (
            get("num_hidden_layers", "n_layer"),
            get("hidden_size", "n_embd"),
            get("num_attention_heads", "n_head"),
        )
        path = tmp_path / f"{name}.gguf"
        writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
        writer.add_block_count(layers)
        writer.add_embedding_length(embed)
        writer.add_context_length(get("max_position_embeddings", "n_positions"))
        writer.add_head_count(heads)
        if arch is MODEL_ARCH.GPT2:
            writer.add_feed_forward_length(4 * embed)
            writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        else:
            writer.add_feed_forward_length(config["intermediate_size"])
            writer.add_head_count_kv(config["num_key_value_heads"])
            writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
            writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        if arch is MODEL_ARCH.PHI3:
            writer.add_rope_dimension_count(embed // heads)
            writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        if arch in (MODEL_ARCH.PHI3, MODEL_ARCH.GEMMA2):
            writer.add_sliding_window(config["sliding_window"] or 0)
        if "num_experts_per_tok" in config:
            writer.add_expert_count(get("num_local_experts", "num_experts"))
            writer.add_expert_used_count(config["num_experts_per_tok"])
        if arch is MODEL_ARCH.QWEN3MOE:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        if arch in (MODEL_ARCH.QWEN3, MODEL_ARCH.QWEN3MOE, MODEL_ARCH.GEMMA2):
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
        if arch is MODEL_ARCH.GEMMA2:
            writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        for key, value in metadata.items():
            writer.add_float32(key.replace("__", "."), value)
        names = get_tensor_name_map(arch, layers)
        for hf, tensor in merged(golden_weights.make_tensors(case["tensors"], case["seed"])).items():
            if hf.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
                tensor = np.ascontiguousarray(tensor.T)
            if arch is MODEL_ARCH.GEMMA2 and hf.endswith("norm.weight"):
                tensor = tensor + 1
            if arch is MODEL_ARCH.LLAMA and hf.endswith(("q_proj.weight", "k_proj.weight")):  # rotary pairs side by side
                rows = tensor.reshape(-1, 2, config["head_dim"] // 2, tensor.shape[1])
                tensor = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(tensor.shape))
            target = names.get_name(hf, try_suffixes=(".weight", ".bias"))
            assert target is not None, hf
            writer.add_tensor(target, tensor)
        for target, tensor in (extra or {}).items():
            writer.add_tensor(target, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


@pytest.mark.parametrize("name", CASES)
def test_logits(write: Write, name: str) -> None:
    model = jaxinfer.load_model(write(name, CASES[name]))
    case = golden_weights.load_case(name)
    prompt, expected = case["prompts"][-1], case["logits"][-1]
    found = np.asarray(jax.jit(model)(np.array([prompt], np.int32)))[0]
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-4


def test_configs(write: Write) -> None:
    """The same as of config.json, but for what a file stores in another way."""
    for name, arch in CASES.items():
        if name == "gemma2":
            continue  # its norms hold their offset
        case = golden_weights.load_case(name)
        folder = golden_weights.write_case_folder(case, write(name, arch).with_suffix(""))
        assert open_source(write(name, arch)).config == open_source(folder).config


def test_a_window_of_zero_is_none(write: Write) -> None:
    assert open_source(write("phi3", MODEL_ARCH.PHI3)).config.windows == ()


def test_longrope_factors_are_refused(write: Write) -> None:
    factors = {f"rope_factors_{kind}.weight": np.ones(8, np.float32) for kind in ("long", "short")}
    with pytest.raises(errors.UnsupportedFormatError, match="longrope factors"):
        open_source(write("phi3", MODEL_ARCH.PHI3, factors))
    with pytest.raises(errors.UnknownConfigKeyError, match=r"phi3\.rope\.scaling\.attn_factor"):
        open_source(write("phi3", MODEL_ARCH.PHI3, phi3__rope__scaling__attn_factor=1.19))
