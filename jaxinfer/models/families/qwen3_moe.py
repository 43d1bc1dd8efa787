"""Qwen3 with experts (Qwen3MoeForCausalLM). Qwen3 whose layers have many small experts, all of them or every so many."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.readers.base import LazyTensor
from convert.rules import Rule
from jaxinfer.models.config import ModelConfig, MoEConfig
from jaxinfer.models.families import llama, qwen3
from jaxinfer.models.families.common import DECODER, check_keys, expert_rules, layer_windows

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
}
# Of training alone; and the number of layers without a window, which this architecture has in all layers or in none.
UNUSED = {"output_router_logits", "router_aux_loss_coef", "max_window_layers"}

ignored = llama.ignored


def config(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """The ModelConfig of a Qwen3-MoE config.json and the checkpoint's tensors. Raises UnknownConfigKeyError."""
    check_keys(hf, DECODER | DEFAULTS.keys() | UNUSED | {"attention_bias"})
    hf = DEFAULTS | {key: value for key, value in hf.items() if value is not None or key == "sliding_window"}
    base = llama.build(hf, tensors, family="qwen3_moe")
    step, dense = int(hf["decoder_sparse_step"]), set(hf["mlp_only_layers"])
    layers = tuple(i for i in range(base.layers) if (i + 1) % step == 0 and i not in dense)
    moe = MoEConfig(
        experts=int(hf["num_experts"]),
        used=int(hf["num_experts_per_tok"]),
        width=int(hf["moe_intermediate_size"]),
        normalise=bool(hf["norm_topk_prob"]),
        layers=layers,
    )
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    return dataclasses.replace(
        base,
        attention=dataclasses.replace(base.attention, qk_norm=True),
        windows=layer_windows(hf, base.layers, window, lambda layer: True),
        moe=moe if layers and moe.experts else None,
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Hugging Face's tensor names -> module paths."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    width = config.moe.width if config.moe else 0
    return qwen3.rules(config) + expert_rules("model.layers.{i}.mlp.", names, width)
