"""Random Phi-3s: fused matrices, rotary positions on a part of a head, longrope under all its names, a window."""

from golden_cases.case import DROP, Case
from golden_cases.llama import V4, V5, rope
from golden_cases.mistral import CROSSING

_NOT_ITS_OWN = ("attention_bias", "mlp_bias", "pretraining_tp", "head_dim")
# As transformers 5 writes a Phi3Config, and as transformers 4 wrote it.
BASE = {key: value for key, value in V5.items() if key not in _NOT_ITS_OWN} | {
    "architectures": ["Phi3ForCausalLM"],
    "embd_pdrop": 0.0,
    "model_type": "phi3",
    "original_max_position_embeddings": 128,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 10000.0, "rope_type": "default"},
    "sliding_window": None,
}
BASE_4 = {key: value for key, value in V4.items() if key not in _NOT_ITS_OWN} | {
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "model_type": "phi3",
    "original_max_position_embeddings": 32,
    "pad_token_id": 0,
    "sliding_window": 262144,
}
_SHORT = [1.0, 1.05, 1.1, 1.2, 1.3, 1.35, 1.5, 1.75]
_LONG = [1.1, 1.4, 1.9, 2.6, 3.3, 4.1, 5.0, 6.5]
_FACTORS = {"short_factor": _SHORT, "long_factor": _LONG}
# 32 positions were trained. Most texts do not cross them while they are continued: there transformers computes the whole text again.
APART = (1, 8, 41)


def _phi3(*, base: dict = BASE, **keys) -> Case:
    return Case(base=base, **keys)


CASES = (
    _phi3(name="phi3", config={"num_key_value_heads": 1, "intermediate_size": 40}, without="qkv_proj.weight"),
    _phi3(name="phi3_window", config={"sliding_window": 7}, misread={"sliding_window": 8}, lengths=CROSSING),
    _phi3(
        name="phi3_partial",
        base=BASE_4,
        config={"partial_rotary_factor": 0.75, "original_max_position_embeddings": DROP},
        misread={"partial_rotary_factor": DROP},
    ),
    _phi3(
        name="phi3_longrope",
        config=rope("longrope", **_FACTORS) | {"original_max_position_embeddings": 32},
        misread=rope("longrope", short_factor=_SHORT, long_factor=_SHORT),
        lengths=APART,
    ),
    _phi3(
        name="phi3_longrope_crossing",
        config=rope("longrope", **_FACTORS) | {"original_max_position_embeddings": 32, "sliding_window": 20},
        misread={"original_max_position_embeddings": 64},
        lengths=(12, 31, 32, 33),
    ),
    _phi3(
        name="phi3_su",
        base=BASE_4,
        config={
            "rope_scaling": {"type": "su", "original_max_position_embeddings": 32, **_FACTORS},
            "num_key_value_heads": DROP,
        },
        misread={"rope_scaling": None},
        lengths=APART,
    ),
    _phi3(
        name="phi3_yarn_is_longrope",
        base=BASE_4,
        config={"rope_scaling": {"type": "yarn", **_FACTORS}, "rope_theta": DROP, "sliding_window": 20},
        misread={"sliding_window": None},
        lengths=APART,
    ),
    # the small Phi-4: all of it at once, and a shared head
    _phi3(
        name="phi3_partial_longrope",
        base=BASE_4,
        config={
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 1.75, 2.0], "long_factor": [1.5, 3.0, 5.0, 9.0]},
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "full_attn_mod": 1,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "mlp_bias": False,
        },
        misread={"max_position_embeddings": 64},
        lengths=APART,
    ),
    _phi3(
        name="phi3_absent",
        config={
            "rope_parameters": DROP,
            "rms_norm_eps": DROP,
            "original_max_position_embeddings": DROP,
            "max_position_embeddings": DROP,
            "sliding_window": DROP,
            "num_key_value_heads": None,
        },
        misread={"rms_norm_eps": 1e-6},
    ),
)
