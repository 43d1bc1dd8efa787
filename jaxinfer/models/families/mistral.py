"""Mistral, and what shares its config: Zephyr, OpenHermes, ... (MistralForCausalLM). Llama with a window in every layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.readers.base import LazyTensor
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import llama
from jaxinfer.models.families.common import DECODER, check_keys, layer_windows

# What an absent key stands for; null is something else: a sliding_window of null is none.
DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}

rules, ignored = llama.rules, llama.ignored


def config(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """The ModelConfig of a Mistral config.json and the checkpoint's tensors. Raises UnknownConfigKeyError."""
    check_keys(hf, DECODER | {"sliding_window"})
    hf = {**DEFAULTS, **hf}
    base = llama.build(hf, tensors, family="mistral")
    return dataclasses.replace(base, windows=layer_windows(hf, base.layers, hf["sliding_window"], lambda layer: True))
