"""Qwen3, dense (Qwen3ForCausalLM). Llama with a norm of every head of q and k, and a head size of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.readers.base import LazyTensor
from convert.rules import Rule
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import llama, qwen2
from jaxinfer.models.families.common import DECODER, check_keys

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}

ignored = llama.ignored


def config(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """The ModelConfig of a Qwen3 config.json and the checkpoint's tensors. Raises UnknownConfigKeyError."""
    check_keys(hf, DECODER | DEFAULTS.keys() | {"layer_types", "attention_bias"})
    hf = {**DEFAULTS, **hf}
    base = llama.build(hf, tensors, family="qwen3")
    return dataclasses.replace(
        base, attention=dataclasses.replace(base.attention, qk_norm=True), windows=qwen2.windows(hf, base.layers)
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Hugging Face's tensor names -> module paths."""
    norms = [
        Rule(f"model.layers.{{i}}.self_attn.{kind}_norm.weight", f"blocks.{{i}}.attention.{kind}_norm") for kind in ("q", "k")
    ]
    return llama.rules(config) + norms
