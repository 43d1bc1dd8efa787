"""Qwen2 and Qwen2.5, dense (Qwen2ForCausalLM). Llama with biases on q, k and v, and windows in the upper layers if asked for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.readers.base import LazyTensor
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import llama
from jaxinfer.models.families.common import DECODER, check_keys, layer_windows

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

rules, ignored = llama.rules, llama.ignored


def config(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """The ModelConfig of a Qwen2 config.json and the checkpoint's tensors. Raises UnknownConfigKeyError."""
    check_keys(hf, DECODER | DEFAULTS.keys() | {"layer_types"})
    hf = {**DEFAULTS, **hf, "attention_bias": True}
    base = llama.build(hf, tensors, family="qwen2")
    return dataclasses.replace(
        base, attention=dataclasses.replace(base.attention, output_bias=False), windows=windows(hf, base.layers)
    )


def windows(hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Layers below max_window_layers see all keys; use_sliding_window is off where it is absent."""
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    return layer_windows(hf, layers, window, lambda layer: layer >= hf["max_window_layers"])
