"""Random Qwen2 and Qwen3: biases, norms of q and k, and windows that only some layers have."""

from golden_cases.case import DROP, Case
from golden_cases.llama import V4, V5, rope
from golden_cases.mistral import CROSSING

# As transformers 5 writes them, without the layer_types that it adds: files of the hub have none.
QWEN2 = {key: v for key, v in V5.items() if key not in ("attention_bias", "mlp_bias", "pretraining_tp", "head_dim")} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 16}
UPPER = {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def _qwen(*, base: dict, lengths: tuple[int, ...] = CROSSING, **keys) -> Case:
    return Case(base=base, lengths=lengths, **keys)


CASES = (
    _qwen(name="qwen2_biases", base=QWEN2, without="k_proj.bias"),
    _qwen(name="qwen2_window", base=QWEN2, config=UPPER, misread={"max_window_layers": 2}),
    # as the hub's files have it: a window that is not in use
    _qwen(
        name="qwen2_window_off",
        base=QWEN2,
        config={"sliding_window": 6, "max_window_layers": 1},
        misread={"use_sliding_window": True},
    ),
    _qwen(
        name="qwen2_layer_types",
        base=QWEN2,
        config=UPPER | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        misread={"layer_types": DROP},
    ),
    _qwen(
        name="qwen2_v4",
        base={key: v for key, v in V4.items() if key not in ("attention_bias", "mlp_bias", "rope_scaling")}
        | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        config={"rope_theta": 1e6, "tie_word_embeddings": True, "sliding_window": 131072, "max_window_layers": 21},
        misread={"rope_theta": 1e4},
    ),
    _qwen(name="qwen2_yarn", base=QWEN2, config=rope("yarn", **_YARN), misread=rope("default"), lengths=(3, 17, 40)),
    _qwen(name="qwen3_norms", base=QWEN3, config={"hidden_size": 72}, without="k_norm.weight"),
    _qwen(name="qwen3_head_dim", base=QWEN3, config={"head_dim": 24}, misread={"rms_norm_eps": 1e-4}),
    _qwen(
        name="qwen3_absent",
        base=QWEN3,
        config={
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": DROP,
            "attention_bias": DROP,
            "rope_parameters": DROP,
            "rms_norm_eps": DROP,
            "use_sliding_window": DROP,
            "max_window_layers": DROP,
        },
        misread={"rms_norm_eps": 1e-5},
    ),
    _qwen(name="qwen3_biases", base=QWEN3, config={"attention_bias": True}, without="o_proj.bias"),
    _qwen(name="qwen3_window", base=QWEN3, config=UPPER | {"max_window_layers": 2}, misread={"max_window_layers": 1}),
    _qwen(
        name="qwen3_layer_types",
        base=QWEN3,
        config=UPPER | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        misread={"layer_types": DROP},
    ),
)
