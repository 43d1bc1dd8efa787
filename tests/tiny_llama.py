"""A small random Llama that divides badly: what its config.json says and which tensors it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# 9 heads on 3 kv heads, 3 layers and 97 tokens divide by few meshes: padding, replicas and unequal stages all occur
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a Llama config.json without biases."""
    embed, width, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    layer = {
        "input_layernorm.weight": [embed],
        "self_attn.q_proj.weight": [queries, embed],
        "self_attn.k_proj.weight": [keys, embed],
        "self_attn.v_proj.weight": [keys, embed],
        "self_attn.o_proj.weight": [embed, queries],
        "post_attention_layernorm.weight": [embed],
        "mlp.gate_proj.weight": [width, embed],
        "mlp.up_proj.weight": [width, embed],
        "mlp.down_proj.weight": [embed, width],
    }
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], embed], "model.norm.weight": [embed]}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": [config["vocab_size"], embed]}


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A Hugging Face folder, and what is in it."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]
