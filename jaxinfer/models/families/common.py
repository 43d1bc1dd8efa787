"""What families share in reading a config.json: which keys are understood, activations, windows, and rotary settings."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from convert.load import as_float
from convert.readers.base import LazyTensor
from convert.rules import Rows, Rule
from jaxinfer.errors import UnknownConfigKeyError
from jaxinfer.models.positions import KINDS, RopeConfig
from sharding.partition import Units

# Keys that never change what a forward pass computes: bookkeeping, training, generation defaults, output options.
HARMLESS = frozenset(
    [
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "architectures",
        "auto_map",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "transformers_weights",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "cls_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "use_cache",
        "cache_implementation",
        "initializer_range",
        "pretraining_tp",
        "attention_dropout",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "is_decoder",
        "is_encoder_decoder",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "return_dict",
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "torchscript",
        "use_bfloat16",
        "gradient_checkpointing",
        "chunk_size_feed_forward",
        "pruned_heads",
        "problem_type",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "tokenizer_class",
        "prefix",
        "task_specific_params",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "remove_invalid_values",
        "tf_legacy_loss",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "unsloth_version",
        "unsloth_fixed",
        "is_llama_config",
        "max_sequence_length",
        "transformers.js_config",
    ]
)

# Keys that would change the arithmetic, with the values at which they do not.
NEUTRAL: dict[str, Any] = {
    "rope_interleaved": False,
    "is_causal": True,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "use_sliding_window": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "interpolate_factor": 1,
    "full_attn_mod": 1,
}

# What every decoder in the manner of Llama reads.
DECODER = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
    ]
)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def check_keys(hf: Mapping[str, Any], understood: Collection[str]) -> None:
    """Raise UnknownConfigKeyError for keys that are neither understood nor known to be harmless, all at once. null changes nothing."""
    unknown = sorted(
        key
        for key, value in hf.items()
        if key not in understood and key not in HARMLESS and value is not None and NEUTRAL.get(key, ...) != value
    )
    if unknown:
        raise UnknownConfigKeyError(
            f"config.json has keys that may change the arithmetic and are not understood: "
            f"{', '.join(f'{k}={hf[k]!r}' for k in unknown)}; remove them from config.json if the model does not need them"
        )


def layer_windows(
    hf: Mapping[str, Any], layers: int, window: int | None, slides: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """The window of each layer as ModelConfig has it. window: of the layers that have one, or None. slides(layer): whether it has,
    where the config has no layer_types, which decide. Raises UnknownConfigKeyError for other types, and for a window without size."""
    types = hf.get("layer_types")
    sliding = [slides(i) for i in range(layers)] if types is None else [kind == "sliding_attention" for kind in types]
    if types is not None and (len(types) != layers or set(types) - {"full_attention", "sliding_attention"}):
        raise UnknownConfigKeyError(
            f"layer_types must name full_attention or sliding_attention for {layers} layers, got {types}"
        )
    if types is not None and any(sliding) and window is None:
        raise UnknownConfigKeyError(
            "layer_types has sliding_attention, but no sliding_window is in use; give one, or correct them"
        )
    return tuple(window if s else None for s in sliding) if window is not None and any(sliding) else ()


def expert_rules(block: str, names: Mapping[str, str], width: int) -> list[Rule]:
    """Of the router and the experts of layers whose tensors are named block + "gate" and block + "experts.": names[part] of each expert,
    or of all in one tensor. part: gate, up or down. width: of an expert. Files that newer transformers save as their modules hold
    gate and up of all experts in one tensor too."""
    rules = [Rule(f"{block}gate.weight", "blocks.{i}.mlp.router")]
    for part, name in names.items():
        target = f"blocks.{{i}}.mlp.{part}"
        rules.append(Rule(f"{block}experts.{{e}}.{name}.weight", target, stack="e"))
        rules.append(Rule(f"{block}experts.{name}.weight", target))
    for part, start in (("gate", 0), ("up", width)):
        rows = (Rows(start, width, axis=1),)
        rules.append(Rule(f"{block}experts.gate_up_proj", f"blocks.{{i}}.mlp.{part}", rows))
    return [*rules, Rule(f"{block}experts.down_proj", "blocks.{i}.mlp.down")]


def is_tied(
    hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor], *, embedding: str, head: str, default: bool = False
) -> bool:
    """Whether the head is the embedding. A stored head that differs is used, whatever tie_word_embeddings says, as in transformers.
    default: of tie_word_embeddings in the family."""
    if not hf.get("tie_word_embeddings", default):
        return False
    if head not in tensors or embedding not in tensors:
        return True
    a, b = tensors[embedding], tensors[head]
    if a.shape != b.shape:
        return False
    step = 1024  # rows in memory at once
    rows = (Units(1, tuple(range(i, min(i + step, a.shape[0])))) for i in range(0, a.shape[0], step))
    return all(np.array_equal(np.asarray(as_float(a).read((r, None))), np.asarray(as_float(b).read((r, None)))) for r in rows)


def activation(name: str) -> str:
    """The runtime's name of an activation. Raises UnknownConfigKeyError."""
    if name not in ACTIVATIONS:
        raise UnknownConfigKeyError(f"activation {name!r} is not supported; supported are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


# What each kind of scaling reads, besides its name and theta.
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "factors": {"factors"},
}


def rope(hf: Mapping[str, Any], dim: int) -> RopeConfig:
    """Rotary settings from rope_theta and rope_scaling, or rope_parameters (transformers 5), for heads of `dim` rotary dimensions.

    Precedence and defaults are those of transformers' modeling_rope_utils: rope_scaling before rope_parameters, and the context
    before scaling at the top level before the one among the scaling's own keys.
    """
    scaling = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    theta = float(scaling.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind not in KINDS:
        raise UnknownConfigKeyError(f"rope type {kind!r} is not supported; supported are {', '.join(KINDS)}")
    own_original = scaling.pop("original_max_position_embeddings", None)
    original = hf.get("original_max_position_embeddings") or own_original
    positions = int(hf.get("max_position_embeddings") or 2048)
    unknown = sorted(set(scaling) - _KEYS[kind])
    if unknown:
        raise UnknownConfigKeyError(f"rope scaling of type {kind!r} has keys that are not understood: {', '.join(unknown)}")
    original_positions = int(original or positions)
    factor = scaling.get("factor")
    if factor is None:
        factor = positions / original_positions if kind in ("yarn", "longrope") else 1.0
    values: dict[str, Any] = {"dim": dim, "theta": theta, "kind": kind, "factor": float(factor)}
    values["original_positions"] = positions if kind == "dynamic" else original_positions
    if scaling.get("truncate") is not None:
        values["truncate"] = bool(scaling["truncate"])
    for key in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
        if scaling.get(key):  # 0 stands for the default too
            values[key] = float(scaling[key])
    if kind in ("longrope", "factors"):
        values["short_factors"] = tuple(map(float, scaling["short_factor" if kind == "longrope" else "factors"]))
        values["long_factors"] = tuple(map(float, scaling.get("long_factor", ())))
    values["attention_factor"] = _attention_factor(kind, scaling, float(factor), original_positions)
    return RopeConfig(**values)


def _attention_factor(kind: str, scaling: Mapping[str, Any], factor: float, original: int) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if kind == "yarn":
        mscale = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
        return mscale(1.0)
    if kind == "longrope" and factor > 1:
        return math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0
