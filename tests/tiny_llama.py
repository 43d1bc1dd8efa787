"""A small random Llama that divides badly: its config.json, its tensors, and what is asked of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxinfer
from jaxinfer import SamplingParams

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
    "tie_word_embeddings": False,
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


PROMPTS = [[5], [17, 3, 88, 41, 2], [*range(40, 56)], [96, 0, 96], [7, 7], [1, 2, 3, 4, 5, 6, 7], [33, 60]]
NEW = 20
GREEDY = SamplingParams(max_tokens=NEW)
SAMPLED = [
    SamplingParams(max_tokens=NEW, temperature=1.0, seed=11),
    SamplingParams(max_tokens=9, temperature=0.7, top_k=5, seed=12),
    SamplingParams(max_tokens=NEW, temperature=1.3, top_p=0.9, seed=11),
    SamplingParams(max_tokens=12, temperature=2.0, min_p=0.05, seed=2**32 - 1),
    SamplingParams(max_tokens=1, temperature=1.0, seed=4),
    SamplingParams(max_tokens=NEW),
    SamplingParams(max_tokens=NEW, temperature=1.0, seed=13),
]

type Ask = Callable[[list[int]], np.ndarray]  # tokens -> logits [n, V]


def tokens_of(results: list[jaxinfer.GenerationResult]) -> list[list[int]]:
    return [result.token_ids for result in results]


def padded(prompts: list[list[int]], width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, width] padded on the right, and lengths [B]."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def check(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    """The message holds all of these words."""
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
