"""Gemma 2 (Gemma2ForCausalLM): soft caps, windows in every other layer, norms before and after each half, scaled embeddings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.readers.base import LazyTensor
from convert.rules import Rule
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import llama
from jaxinfer.models.families.common import DECODER, check_keys, layer_windows

DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
# A norm multiplies by 1 + weight; a GGUF file stores that sum, and its reader says so here.
NORM_KEY = "norm_holds_offset"

ignored = llama.ignored


def config(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """The ModelConfig of a Gemma 2 config.json and the checkpoint's tensors. Raises UnknownConfigKeyError."""
    hf = {**DEFAULTS, **hf}
    known = DECODER | DEFAULTS.keys() | {"attention_bias", "layer_types", NORM_KEY}
    # written by old tools beside sliding_window, which alone is read
    check_keys(hf, known | {"sliding_window_size"} if hf.get("sliding_window_size") == hf["sliding_window"] else known)
    hf["hidden_act"] = hf["hidden_activation"]  # the files have both
    base = llama.build(hf, tensors, family="gemma2")
    attention = dataclasses.replace(
        base.attention, scale=float(hf["query_pre_attn_scalar"]) ** -0.5, soft_cap=_number(hf["attn_logit_softcapping"])
    )
    return dataclasses.replace(
        base,
        attention=attention,
        norm="rms" if hf.get(NORM_KEY) else "rms_offset",
        post_norms=True,
        windows=layer_windows(hf, base.layers, hf["sliding_window"], lambda layer: layer % 2 == 0),
        embed_scale=base.embed**0.5,
        soft_cap=_number(hf["final_logit_softcapping"]),
    )


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def rules(config: ModelConfig) -> list[Rule]:
    """Hugging Face's tensor names -> module paths; post_attention_layernorm is what its name says here, unlike in Llama."""
    layer, block = "model.layers.{i}.", "blocks.{i}."
    norms = {
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp.norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    }
    others = [rule for rule in llama.rules(config) if rule.target != block + "mlp.norm"]
    return others + [Rule(f"{layer}{source}.weight", block + target) for source, target in norms.items()]
