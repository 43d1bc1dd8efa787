"""Random Gemma 2s: soft caps, alternating windows, norms on both sides, scaled embeddings, and what absent keys stand for."""

from golden_cases.case import DROP, Case
from golden_cases.llama import V5
from golden_cases.mistral import CROSSING

# As the hub's files have it, with transformers 5's rotary keys. Caps and window are small, so that small models feel them.
BASE = {key: value for key, value in V5.items() if key not in ("mlp_bias", "pretraining_tp")} | {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 4.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 2.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2",
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-6,
    "sliding_window": 6,
    "tie_word_embeddings": True,
}
_FLIPPED = ["full_attention", "sliding_attention", "full_attention"]


def _gemma2(**keys) -> Case:
    return Case(base=BASE, lengths=CROSSING, **keys)


CASES = (
    _gemma2(name="gemma2", misread={"layer_types": _FLIPPED}),
    _gemma2(name="gemma2_layer_types", config={"layer_types": _FLIPPED}, misread={"layer_types": DROP}),
    _gemma2(name="gemma2_attention_cap", config={"final_logit_softcapping": None}, misread={"attn_logit_softcapping": None}),
    _gemma2(name="gemma2_final_cap", config={"attn_logit_softcapping": None}, misread={"final_logit_softcapping": None}),
    _gemma2(
        name="gemma2_scalar",
        config={"query_pre_attn_scalar": 7, "head_dim": 24, "sliding_window_size": 6},
        misread={"query_pre_attn_scalar": 24},
    ),
    _gemma2(
        name="gemma2_activation",
        config={"hidden_act": "relu", "hidden_activation": "gelu", "attention_bias": True},
        misread={"hidden_activation": "relu"},
    ),
    _gemma2(name="gemma2_own_head", config={"tie_word_embeddings": False}, without="post_feedforward_layernorm.weight"),
    # caps of 50 and 30, a window of 4096, heads of 256 whatever the embedding, a scale that is not the heads'
    _gemma2(
        name="gemma2_absent",
        config={
            "attn_logit_softcapping": DROP,
            "final_logit_softcapping": DROP,
            "sliding_window": DROP,
            "head_dim": DROP,
            "num_key_value_heads": DROP,
            "query_pre_attn_scalar": DROP,
            "hidden_activation": DROP,
            "rms_norm_eps": DROP,
            "rope_parameters": DROP,
            "tie_word_embeddings": False,
            "num_hidden_layers": 2,
        },
        misread={"final_logit_softcapping": None},
    ),
)
