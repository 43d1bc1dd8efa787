"""GPT-2, and what shares its config: DistilGPT-2, DialoGPT, ... (GPT2LMHeadModel).

Learned positions, layer norms, biases everywhere, and matrices that are stored as [inputs, outputs].
"""

from collections.abc import Mapping
from typing import Any

from convert.readers.base import LazyTensor
from convert.rules import Rows, Rule, Transform, Transpose
from jaxinfer.models.config import AttentionConfig, MLPConfig, ModelConfig
from jaxinfer.models.families.common import activation, check_keys, is_tied

# Its own names, each with the general one that transformers reads too.
SIZES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
OTHERS = ("vocab_size", "n_inner", "activation_function", "layer_norm_epsilon", "scale_attn_weights")
# n_ctx was n_positions before; then how half-precision scores are computed; summary_*: heads for other tasks.
SUMMARY = ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
UNUSED = ("n_ctx", "reorder_and_upcast_attn", *(f"summary_{key}" for key in SUMMARY))
UNDERSTOOD = frozenset([*SIZES, *SIZES.values(), *OTHERS, *UNUSED])
PREFIXES = ("", "transformer.")  # files of the bare model, and of the model with a head
# Module path -> its name here, and the general one that other formats are read under.
ENDS = {
    "embedding": ("wte.weight", "embed_tokens.weight"),
    "positions": ("wpe.weight", "embed_positions.weight"),
    "norm": ("ln_f.weight", "norm.weight"),
    "norm_bias": ("ln_f.bias", "norm.bias"),
}
QKV = ("attn.c_attn", "self_attn.qkv_proj")
BLOCK = {
    "attention.norm": ("ln_1", "input_layernorm"),
    "attention.q": QKV,
    "attention.k": QKV,
    "attention.v": QKV,
    "attention.o": ("attn.c_proj", "self_attn.o_proj"),
    "mlp.norm": ("ln_2", "post_attention_layernorm"),
    "mlp.up": ("mlp.c_fc", "mlp.up_proj"),
    "mlp.down": ("mlp.c_proj", "mlp.down_proj"),
}


def config(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """The ModelConfig of a GPT-2 config.json and the checkpoint's tensors. Raises UnknownConfigKeyError."""
    per_layer = "scale_attn_by_inverse_layer_idx"  # scores divided by the layer's number, not supported
    check_keys(hf, UNDERSTOOD if hf.get(per_layer) else UNDERSTOOD | {per_layer})
    size = {own: int(hf[own] if own in hf else hf[general]) for own, general in SIZES.items()}
    embed, heads = size["n_embd"], size["n_head"]
    embedding = next((name for p in PREFIXES if (name := f"{p}wte.weight") in tensors), "model.embed_tokens.weight")
    return ModelConfig(
        family="gpt2",
        vocab=int(hf["vocab_size"]),
        embed=embed,
        layers=size["n_layer"],
        attention=AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_dim=embed // heads,
            scale=(embed // heads) ** -0.5 if hf.get("scale_attn_weights", True) else 1.0,
            rope=None,
            bias=True,
            output_bias=True,
        ),
        mlp=MLPConfig(
            width=int(hf.get("n_inner") or 4 * embed),
            activation=activation(hf.get("activation_function", "gelu_new")),
            gated=False,
            bias=True,
        ),
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        tied=is_tied(hf, tensors, embedding=embedding, head="lm_head.weight", default=True),
        max_positions=size["n_positions"],
        norm="layer",
        learned_positions=True,
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Hugging Face's tensor names, with and without their prefix, and the general names, whose matrices are [outputs, inputs]."""
    D = config.embed
    rows: dict[str, tuple[Transform, ...]] = {f"attention.{kind}": (Rows(i * D, D),) for i, kind in enumerate("qkv")}
    table = [] if config.tied else [Rule("lm_head.weight", "head")]
    for top, layer, column in (*((p, f"{p}h.{{i}}.", 0) for p in PREFIXES), ("model.", "model.layers.{i}.", 1)):
        table += [Rule(top + names[column], target) for target, names in ENDS.items()]
        for target, names in BLOCK.items():
            source, part = layer + names[column], rows.get(target, ())
            turned = (Transpose(),) if column == 0 and not target.endswith("norm") else ()
            table.append(Rule(f"{source}.weight", f"blocks.{{i}}.{target}", (*turned, *part)))
            table.append(Rule(f"{source}.bias", f"blocks.{{i}}.{target}_bias", part))
    return table


def ignored(config: ModelConfig) -> tuple[str, ...]:
    """Patterns of tensors that hold nothing of their own: causal masks, and a copy of the embedding as a head."""
    masks = tuple(f"{p}h.{{i}}.attn.{name}" for p in PREFIXES for name in ("bias", "masked_bias"))
    return (*masks, "lm_head.weight") if config.tied else masks
