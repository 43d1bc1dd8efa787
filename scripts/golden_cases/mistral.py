"""Random Mistrals: the window, where it is not, and what absent keys stand for."""

from golden_cases.case import DROP, Case
from golden_cases.llama import V4, V5, rope

# As transformers 5 writes a MistralConfig.
BASE = {key: value for key, value in V5.items() if key not in ("attention_bias", "mlp_bias", "pretraining_tp")} | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 8,
}
# Within the window, crossing it while it is continued, and across it from the start.
CROSSING = (3, 7, 21)


def _mistral(*, base: dict = BASE, lengths: tuple[int, ...] = CROSSING, **keys) -> Case:
    return Case(base=base, lengths=lengths, **keys)


CASES = (
    _mistral(name="mistral_window", misread={"sliding_window": 9}),
    _mistral(name="mistral_window_2", config={"sliding_window": 2, "num_hidden_layers": 3}, misread={"sliding_window": 1}),
    _mistral(name="mistral_no_window", config={"sliding_window": None}, misread={"sliding_window": 16}),
    # the model of version 0.2: other heads than the embedding has room for
    _mistral(
        name="mistral_head_dim",
        config={"head_dim": 24, "sliding_window": 12, "num_attention_heads": 6, **rope("default", theta=1e6)},
        misread={"sliding_window": None},
    ),
    _mistral(
        name="mistral_v4",
        base=V4 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        config={"rope_theta": 1e6, "sliding_window": 20, "attention_bias": DROP, "mlp_bias": DROP, "rope_scaling": DROP},
        misread={"rope_theta": 1e4},
    ),
    # 8 kv heads, no rotary keys, a window of 4096
    _mistral(
        name="mistral_absent",
        config={
            "num_attention_heads": 16,
            "head_dim": DROP,
            "num_key_value_heads": DROP,
            "rope_parameters": DROP,
            "rms_norm_eps": DROP,
            "hidden_act": DROP,
            "sliding_window": DROP,
            "tie_word_embeddings": DROP,
        },
        misread={"rms_norm_eps": 1e-5},
    ),
)
