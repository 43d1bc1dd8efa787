"""Mixtral (MixtralForCausalLM). Mistral with experts in every layer, and a window only where one is asked for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.readers.base import LazyTensor
from convert.rules import Rule
from jaxinfer.models.config import ModelConfig, MoEConfig
from jaxinfer.models.families import llama
from jaxinfer.models.families.common import DECODER, check_keys, expert_rules, layer_windows

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
# Of training alone.
UNUSED = {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}

ignored = llama.ignored


def config(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """The ModelConfig of a Mixtral config.json and the checkpoint's tensors. Raises UnknownConfigKeyError."""
    check_keys(hf, DECODER | DEFAULTS.keys() | UNUSED)
    hf = {**DEFAULTS, **hf}
    base = llama.build(hf, tensors, family="mixtral")
    moe = MoEConfig(
        experts=int(hf["num_local_experts"]),
        used=int(hf["num_experts_per_tok"]),
        width=base.mlp.width,
        normalise=True,
        layers=tuple(range(base.layers)),
    )
    windows = layer_windows(hf, base.layers, hf["sliding_window"], lambda layer: True)
    return dataclasses.replace(base, windows=windows, moe=moe)


def rules(config: ModelConfig) -> list[Rule]:
    """Hugging Face's tensor names -> module paths: w1, w2 and w3 of each expert are its gate, down and up. transformers 5 calls the block
    mlp where it saves its modules as they are."""
    dense = [rule for rule in llama.rules(config) if ".mlp." not in rule.source]
    assert config.moe is not None
    names, width = {"gate": "w1", "down": "w2", "up": "w3"}, config.moe.width
    blocks = ("model.layers.{i}.block_sparse_moe.", "model.layers.{i}.mlp.")
    return dense + [rule for block in blocks for rule in expert_rules(block, names, width)]
