"""Phi-3 and Phi-4, dense (Phi3ForCausalLM). Llama with fused matrices, rotary positions on a part of each head, longrope, a window.

A row that grows past the original context while it is continued is read again at that point, as transformers does for this family alone.
So does an engine; `jaxinfer.generate` and those who call prefill and decode by hand keep the keys as they were rotated.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.readers.base import LazyTensor
from convert.rules import Rows, Rule
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import llama
from jaxinfer.models.families.common import DECODER, check_keys, layer_windows, rope

DEFAULTS = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}

ignored = llama.ignored


def config(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """The ModelConfig of a Phi-3 config.json and the checkpoint's tensors. Raises UnknownConfigKeyError."""
    check_keys(hf, DECODER | {"sliding_window", "partial_rotary_factor"})
    hf = {**DEFAULTS, **hf}
    scaling = dict(hf.pop("rope_scaling", None) or hf.pop("rope_parameters", None) or {})
    hf["rope_parameters"] = scaling
    partial = scaling.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
    if scaling.get("rope_type", scaling.get("type")) in ("su", "yarn"):  # names that longrope had in these files
        scaling |= {"rope_type": "longrope"}
    whole = llama.build({**hf, "rope_parameters": None}, tensors, family="phi3")
    turned = rope(hf, int(whole.attention.head_dim * partial))
    turned = dataclasses.replace(turned, read_again=turned.kind == "longrope")
    return dataclasses.replace(
        whole,
        attention=dataclasses.replace(whole.attention, rope=turned),
        windows=layer_windows(hf, whole.layers, hf["sliding_window"], lambda layer: True),
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Hugging Face's tensor names -> module paths; q, k and v are rows of one matrix, gate and up of another."""
    a, F = config.attention, config.mlp.width
    layer, block = "model.layers.{i}.", "blocks.{i}."
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    parts = {
        "attention.q": ("self_attn.qkv_proj", Rows(0, q)),
        "attention.k": ("self_attn.qkv_proj", Rows(q, kv)),
        "attention.v": ("self_attn.qkv_proj", Rows(q + kv, kv)),
        "mlp.gate": ("mlp.gate_up_proj", Rows(0, F)),
        "mlp.up": ("mlp.gate_up_proj", Rows(F, F)),
    }
    whole = [rule for rule in llama.rules(config) if rule.target.removeprefix(block) not in parts]
    return whole + [Rule(f"{layer}{name}.weight", block + target, (rows,)) for target, (name, rows) in parts.items()]
