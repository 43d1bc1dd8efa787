"""Llama 1 to 3.x, and what shares its config: SmolLM2, TinyLlama, Yi, DeepSeek-LLM, ... (LlamaForCausalLM)."""

from collections.abc import Mapping
from typing import Any

from convert.readers.base import LazyTensor
from convert.rules import Rule
from jaxinfer.models.config import AttentionConfig, MLPConfig, ModelConfig
from jaxinfer.models.families.common import DECODER, activation, check_keys, is_tied, rope

UNDERSTOOD = DECODER | {"attention_bias", "mlp_bias"}


def config(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """The ModelConfig of a Llama config.json and the checkpoint's tensors. Raises UnknownConfigKeyError."""
    check_keys(hf, UNDERSTOOD if set(hf.get("layer_types") or ()) - {"full_attention"} else UNDERSTOOD | {"layer_types"})
    return build(hf, tensors, family="llama")


def build(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor], *, family: str) -> ModelConfig:
    """The ModelConfig of keys that were checked, for all families in the manner of Llama; absent keys have Llama's defaults."""
    embed, heads = int(hf["hidden_size"]), int(hf["num_attention_heads"])
    head_dim = int(hf.get("head_dim") or embed // heads)
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(
        family=family,
        vocab=int(hf["vocab_size"]),
        embed=embed,
        layers=int(hf["num_hidden_layers"]),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=int(hf.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope(hf, head_dim),
            bias=bias,
            output_bias=bias,
        ),
        mlp=MLPConfig(
            width=int(hf["intermediate_size"]),
            activation=activation(hf.get("hidden_act", "silu")),
            bias=bool(hf.get("mlp_bias", False)),
        ),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tied=is_tied(hf, tensors, embedding="model.embed_tokens.weight", head="lm_head.weight"),
        max_positions=int(hf.get("max_position_embeddings") or 2048),
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Hugging Face's tensor names -> module paths."""
    layer, block = "model.layers.{i}.", "blocks.{i}."
    table = {
        "model.embed_tokens.weight": "embedding",
        "model.norm.weight": "norm",
        layer + "input_layernorm.weight": block + "attention.norm",
        layer + "post_attention_layernorm.weight": block + "mlp.norm",
    }
    for kind in ("q", "k", "v", "o"):
        table[f"{layer}self_attn.{kind}_proj.weight"] = f"{block}attention.{kind}"
        if config.attention.output_bias if kind == "o" else config.attention.bias:
            table[f"{layer}self_attn.{kind}_proj.bias"] = f"{block}attention.{kind}_bias"
    for kind in ("gate", "up", "down"):
        table[f"{layer}mlp.{kind}_proj.weight"] = f"{block}mlp.{kind}"
        if config.mlp.bias:
            table[f"{layer}mlp.{kind}_proj.bias"] = f"{block}mlp.{kind}_bias"
    if not config.tied:
        table["lm_head.weight"] = "head"
    return [Rule(source, target) for source, target in table.items()]


def ignored(config: ModelConfig) -> tuple[str, ...]:
    """Patterns of tensors that hold nothing of their own: tables, and a copy of the embedding as a head."""
    tables = ("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    return (*tables, "lm_head.weight") if config.tied else tables
