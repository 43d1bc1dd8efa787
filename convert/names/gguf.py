"""GGUF names and metadata -> canonical (Hugging Face) names and config.json keys.

Names of llama.cpp's converter, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import UnsupportedFormatError

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# architectures whose converter reorders the rows of q and k so that rotary pairs lie side by side
INTERLEAVED = frozenset({"llama"})
ARCHITECTURES = {"llama": "LlamaForCausalLM"}

_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")

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


def canonical_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that is not in the table is passed on as it is."""
    match = _NAME.fullmatch(name)
    table = TOP if match is None or match["layer"] is None else BLOCK
    if match is None or match["part"] not in table:
        return name
    prefix = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{prefix}{table[match['part']]}.{match['kind']}"


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
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise UnsupportedFormatError("the GGUF file has no general.architecture; convert it again with a current llama.cpp")
    own = {k.removeprefix(f"{architecture}."): v for k, v in metadata.items() if k.startswith(f"{architecture}.")}
    config: dict[str, Any] = {"model_type": architecture}
    if architecture in ARCHITECTURES:
        config["architectures"] = [ARCHITECTURES[architecture]]
        if "attention.head_count" not in own or "embedding_length" not in own:
            raise UnsupportedFormatError(f"the GGUF file has no {architecture}.attention.head_count or .embedding_length")
    yarn = own.get("rope.scaling.type") == "yarn"
    for key, value in own.items():
        if key in CONFIG:
            config[CONFIG[key]] = _scalar(value)
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
    if architecture in ARCHITECTURES:
        config["hidden_act"] = "silu"
        config.setdefault("rope_theta", 10000.0)
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
        config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in shapes
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
