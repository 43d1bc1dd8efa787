"""GGUF names and metadata -> canonical (Hugging Face) names and config.json keys.

Names of llama.cpp's converter, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import UnsupportedFormatError

TOP = {
    "token_embd": "model.embed_tokens",
    "position_embd": "model.embed_positions",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# architectures whose converter reorders the rows of q and k so that rotary pairs lie side by side
INTERLEAVED = frozenset({"llama", "mixtral"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How files of one architecture differ from the tables here.

    name: of the architecture in config.json. block, keys: entries in place of those of BLOCK and CONFIG. defaults: keys of config.json
    that a file does not tell. biases: keys that tell whether these matrices of the first layer have a bias.
    """

    name: str
    block: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, str] = dataclasses.field(default_factory=dict)


_ROTARY = {"rope_theta": 10000.0, "hidden_act": "silu"}
# Router and experts, those of a layer in one tensor.
_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")} | {"ffn_gate_inp": "mlp.gate"}
_MIXTRAL = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}
_ATTENTION_BIAS = {"attention_bias": "self_attn.q_proj"}
# Matrices are [outputs, inputs] in all of them; in GPT-2's own files they are the other way round.
ARCHITECTURES = {
    "llama": Architecture(name="LlamaForCausalLM", defaults=_ROTARY, biases={**_ATTENTION_BIAS, "mlp_bias": "mlp.up_proj"}),
    "qwen3moe": Architecture(
        name="Qwen3MoeForCausalLM",
        block=_EXPERTS,
        keys={"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        defaults={**_ROTARY, "norm_topk_prob": True},  # which llama.cpp does whatever the model
        biases=_ATTENTION_BIAS,
    ),
    # a llama with experts, see `architecture_of`
    "mixtral": Architecture(
        name="MixtralForCausalLM",
        block={name: f"block_sparse_moe.experts.{own}" for name, own in _MIXTRAL.items()}
        | {"ffn_gate_inp": "block_sparse_moe.gate"},
        defaults=_ROTARY,
    ),
    "qwen2": Architecture(name="Qwen2ForCausalLM", defaults=_ROTARY),
    "qwen3": Architecture(name="Qwen3ForCausalLM", defaults=_ROTARY, biases=_ATTENTION_BIAS),
    "phi3": Architecture(
        name="Phi3ForCausalLM",
        block={"ffn_up": "mlp.gate_up_proj"},
        keys={"rope.scaling.original_context_length": "original_max_position_embeddings"},
        defaults=_ROTARY,
    ),
    "gemma2": Architecture(
        name="Gemma2ForCausalLM",
        block={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        keys={"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
        # its converter adds the norms' unit offset to what it writes
        defaults={**_ROTARY, "hidden_activation": "gelu_pytorch_tanh", "norm_holds_offset": True},
        biases=_ATTENTION_BIAS,
    ),
    "gpt2": Architecture(
        name="GPT2LMHeadModel",
        keys={
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        defaults={"activation_function": "gelu_new"},
    ),
}
GEMMA2_27B = 46  # layers; the one Gemma 2 whose scores are not scaled by the size of its heads, which no key tells

_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)(?:\.(?P<expert>\d+))?\.(?P<kind>weight|bias)")

# metadata key without "<architecture>." -> config.json key
CONFIG = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
ROPE = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear")
YARN = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
YARN_ATTENTION = "rope.scaling.attn_factor"
UNUSED = ("rope.scaling.finetuned", "tensor_data_layout")  # how the model and the file came to be


def architecture_of(metadata: Mapping[str, Any]) -> str | None:
    """The key of ARCHITECTURES that a file's metadata means: its own name of the architecture, but for a llama that has experts."""
    name = metadata.get("general.architecture")
    return "mixtral" if name == "llama" and metadata.get("llama.expert_count") else name


def canonical_name(name: str, architecture: str | None = None) -> str:
    """The Hugging Face name of a GGUF tensor in a file of this architecture; a name that is not in the table is passed on as it is."""
    match = _NAME.fullmatch(name)
    own = ARCHITECTURES[architecture].block if architecture in ARCHITECTURES else {}
    table = TOP if match is None or match["layer"] is None else {**BLOCK, **own}
    if match is None:
        return name
    # files of early 2024 have a tensor for each expert
    part = match["part"] if match["expert"] is None else f"{match['part']}_exps"
    if part not in table:
        return name
    prefix, module = "" if match["layer"] is None else f"model.layers.{match['layer']}.", table[part]
    if match["expert"] is not None:
        block, _, matrix = module.rpartition(".")
        module = f"{block}.{match['expert']}.{matrix}"
    return f"{prefix}{module}.{match['kind']}"


def rotary_heads(name: str, config: Mapping[str, Any]) -> Any:
    """How many heads the rows of an interleaved tensor hold (a list where layers differ), or None. `name` is canonical."""
    match = re.search(r"\.self_attn\.([qk])_proj\.", name)
    if match is None:
        return None
    return config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]


def half_split_order(rows: int, heads: int) -> np.ndarray:
    """For each half-split row (h, half, pair) the interleaved row (h, pair, half) that it is stored in."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def config_from_metadata(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A config.json out of GGUF metadata. shapes: of the tensors, by canonical name.

    A key of the architecture that has no counterpart is passed on under its GGUF name, so that a strict family refuses it.
    """
    architecture, meant = metadata.get("general.architecture"), architecture_of(metadata)
    if not isinstance(architecture, str):
        raise UnsupportedFormatError("the GGUF file has no general.architecture; convert it again with a current llama.cpp")
    own = {k.removeprefix(f"{architecture}."): v for k, v in metadata.items() if k.startswith(f"{architecture}.")}
    if "rope_factors_long.weight" in shapes:
        raise UnsupportedFormatError(
            f"the GGUF file of a {architecture} holds longrope factors as tensors, which are not read; use the model's safetensors"
        )
    config: dict[str, Any] = {"model_type": meant}
    known = ARCHITECTURES.get(meant or architecture)
    keys = {**CONFIG, **known.keys} if known else CONFIG
    if known:
        config["architectures"] = [known.name]
        if "attention.head_count" not in own or "embedding_length" not in own:
            raise UnsupportedFormatError(f"the GGUF file has no {architecture}.attention.head_count or .embedding_length")
    yarn = own.get("rope.scaling.type") == "yarn"
    for key, value in own.items():
        if key in keys:
            config[keys[key]] = _scalar(value)
        elif key not in (*HEAD, *ROPE, *UNUSED) and not (yarn and key in (*YARN, YARN_ATTENTION)):
            config[f"{architecture}.{key}"] = value
    if config.get("num_local_experts") == 0:  # written for dense models too
        for key in ("num_local_experts", "num_experts_per_tok"):
            config.pop(key, None)
    _add_heads(config, own, shapes.get("model.layers.0.self_attn.q_proj.weight", (0,))[0])
    scaling = _rope_scaling(own, architecture)
    if scaling:
        config["rope_scaling"] = scaling
    if "model.embed_tokens.weight" in shapes:
        config["vocab_size"] = shapes["model.embed_tokens.weight"][0]
    if known:
        config = {**known.defaults, **config}
        config |= {key: f"model.layers.0.{matrix}.bias" in shapes for key, matrix in known.biases.items()}
    if architecture == "gemma2":
        per_head = own["embedding_length"] / own["attention.head_count"]
        config["query_pre_attn_scalar"] = per_head if own.get("block_count") == GEMMA2_27B else config["head_dim"]
    if config.get("sliding_window") == 0:  # written for models without
        config["sliding_window"] = None
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    for token in ("bos", "eos", "padding"):
        if (value := metadata.get(f"tokenizer.ggml.{token}_token_id")) is not None:
            config[f"{'pad' if token == 'padding' else token}_token_id"] = value
    return config


def _scalar(value):
    """One value for all layers, where the file gives the same one for each."""
    return value[0] if isinstance(value, list) and value and all(v == value[0] for v in value) else value


def _add_heads(config: dict[str, Any], own: Mapping[str, Any], query_rows: int) -> None:
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    config.setdefault("num_key_value_heads", heads)
    rotary = own.get("rope.dimension_count")
    # the rows of q tell it best: writers leave key_length out although heads * head_dim differs from the embedding
    head_dim = own.get("attention.key_length") or query_rows // heads or hidden // heads
    config["head_dim"] = head_dim
    if rotary and rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    if own.get("attention.value_length", head_dim) != head_dim:
        config["v_head_dim"] = own["attention.value_length"]


def _rope_scaling(own: Mapping[str, Any], architecture: str) -> dict[str, Any] | None:
    linear = own.get("rope.scale_linear")  # of files older than rope.scaling.type
    kind = own.get("rope.scaling.type", "linear" if linear not in (None, 1, 1.0) else "none")
    if kind == "none":
        return None
    factor = own.get("rope.scaling.factor", linear)
    if kind not in ("linear", "yarn") or not factor:
        raise UnsupportedFormatError(
            f"{architecture}.rope.scaling.type {kind!r} with factor {factor}: only none, linear and yarn are known"
        )
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": float(factor)}
    if original := own.get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = original
    if (attention := own.get(YARN_ATTENTION)) is not None:
        # llama.cpp multiplies its factor with yarn's own; Hugging Face's attention_factor replaces that
        scaling["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
    return scaling | {name: own[key] for key, name in YARN.items() if key in own}
