"""Random Llamas: every rotary scaling, in the keys of transformers 4 and 5, shapes, biases, norms and activations."""

from golden_cases.case import DROP, Case

# As transformers 5 writes a LlamaConfig.
V5 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": 96,
}

# As transformers 4 wrote it: the rotary keys at the top, torch_dtype, and (before 4.46) no head_dim.
V4 = {key: value for key, value in V5.items() if key not in ("rope_parameters", "dtype", "head_dim", "pad_token_id")} | {
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
}

# What models on the hub carry besides: of no meaning for the result.
HARMLESS = {
    "_name_or_path": "somebody/some-model",
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": [2, 3],
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "max_sequence_length": 64,
    "pad_token_id": -1,
    "pretraining_tp": 2,
    "rope_interleaved": False,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
    "use_cache": False,
}


def _llama(*, base: dict = V5, **keys) -> Case:
    return Case(base=base, **keys)


def rope(kind: str, *, theta: float = 10000.0, **keys: object) -> dict:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **keys}}


_PLAIN = rope("default")
# 32 positions were trained: one prompt stays below them, one crosses while it is continued, one starts beyond.
_CROSSING = (5, 28, 41)
# A difference in the low frequencies needs a prompt of some length.
_LONG = (3, 17, 40)

_YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
_YARN_SIZE = {"max_position_embeddings": 1024}
_LONGROPE = {
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.35, 1.5, 1.75],
    "long_factor": [1.1, 1.4, 1.9, 2.6, 3.3, 4.1, 5.0, 6.5],
    "original_max_position_embeddings": 32,
}
_LONGROPE_BARE = {key: value for key, value in _LONGROPE.items() if key != "original_max_position_embeddings"}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def _yarn(**keys: object) -> dict:
    return rope("yarn", **_YARN, **keys) | _YARN_SIZE


CASES = (
    # Attention and matrices.
    _llama(name="mha", config={"num_key_value_heads": 4}),
    _llama(name="gqa_9_3", config={"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}),
    _llama(name="mqa", config={"num_key_value_heads": 1}),
    _llama(name="tied", config={"tie_word_embeddings": True}),
    _llama(name="tied_own_head", config={"tie_word_embeddings": True}, own_head=True),
    _llama(name="attention_bias", config={"attention_bias": True}, without=".bias"),
    _llama(name="mlp_bias", config={"mlp_bias": True}, without=".bias"),
    _llama(name="both_biases", config={"attention_bias": True, "mlp_bias": True}, without="down_proj.bias"),
    _llama(name="head_dim_24", config={"head_dim": 24}),
    _llama(
        name="odd_shape",
        config={
            "vocab_size": 257,
            "hidden_size": 66,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "intermediate_size": 42,
            "num_hidden_layers": 3,
        },
    ),
    # Norm and activation.
    _llama(name="eps_1e-6", config={"rms_norm_eps": 1e-6}, misread={"rms_norm_eps": 1e-5}),
    _llama(name="eps_absent", base=V4, config={"rms_norm_eps": DROP}, misread={"rms_norm_eps": 1e-5}),
    _llama(name="act_gelu", config={"hidden_act": "gelu"}, misread={"hidden_act": "gelu_pytorch_tanh"}),
    _llama(name="act_gelu_tanh", config={"hidden_act": "gelu_pytorch_tanh"}, misread={"hidden_act": "gelu"}),
    _llama(name="act_relu", config={"hidden_act": "relu"}, misread={"hidden_act": "silu"}),
    # Rotary frequencies, in the keys of transformers 5.
    _llama(name="theta_5e5", config=rope("default", theta=500000.0), misread=_PLAIN, lengths=_LONG),
    _llama(name="linear", config=rope("linear", factor=4.0), misread=_PLAIN),
    _llama(
        name="dynamic",
        config=rope("dynamic", factor=2.0) | {"max_position_embeddings": 32},
        misread=_PLAIN,
        lengths=_CROSSING,
    ),
    _llama(name="yarn", config=_yarn(), misread=_yarn(attention_factor=1.0), lengths=_LONG),
    _llama(name="yarn_attention_factor", config=_yarn(attention_factor=1.3), misread=_yarn(), lengths=_LONG),
    _llama(name="yarn_mscale_pair", config=_yarn(mscale=2.0, mscale_all_dim=0.5), misread=_yarn(), lengths=_LONG),
    _llama(
        name="yarn_mscale_alone",
        config=_yarn(mscale=2.0),
        misread=_yarn(attention_factor=1.277),
        lengths=_LONG,
    ),
    _llama(name="yarn_betas", config=_yarn(beta_fast=8.0, beta_slow=2.0), misread=_yarn(), lengths=_LONG),
    _llama(name="yarn_no_truncate", config=_yarn(truncate=False), misread=_yarn(), lengths=_LONG),
    _llama(
        name="yarn_original_absent",
        config=rope("yarn", factor=4.0) | {"max_position_embeddings": 256},
        misread=rope("yarn", factor=4.0, original_max_position_embeddings=64),
        lengths=_LONG,
    ),
    _llama(
        name="yarn_original_at_top",
        config=rope("yarn", factor=4.0, original_max_position_embeddings=32)
        | _YARN_SIZE
        | {"original_max_position_embeddings": 256},
        misread={"original_max_position_embeddings": DROP},
        lengths=_LONG,
    ),
    _llama(
        name="yarn_factor_null",
        config=rope("yarn", **(_YARN | {"factor": None})) | _YARN_SIZE,
        misread=rope("yarn", **(_YARN | {"factor": 1.0})),
        lengths=_LONG,
    ),
    _llama(
        name="longrope",
        config=rope("longrope", factor=4.0, **_LONGROPE),
        misread=rope("longrope", **(_LONGROPE | {"long_factor": _LONGROPE["short_factor"], "factor": 4.0})),
        lengths=_CROSSING,
    ),
    _llama(
        name="longrope_attention_factor",
        config=rope("longrope", factor=4.0, attention_factor=1.5, **_LONGROPE),
        misread=rope("longrope", factor=4.0, **_LONGROPE),
        lengths=_CROSSING,
    ),
    _llama(
        name="longrope_original_at_top",
        config=rope("longrope", **_LONGROPE_BARE) | {"max_position_embeddings": 256, "original_max_position_embeddings": 32},
        misread=rope("longrope", factor=4.0, **_LONGROPE_BARE),
        lengths=_CROSSING,
    ),
    _llama(name="llama3", config=rope("llama3", theta=500000.0, **_LLAMA3), misread=rope("default", theta=5e5), lengths=_LONG),
    # The keys of transformers 4.
    _llama(name="v4", base=V4, config={"rope_theta": 500000.0}, misread={"rope_theta": 10000.0}, lengths=_LONG),
    _llama(
        name="v4_nothing",
        base=V4,
        config={
            "rope_theta": DROP,
            "rope_scaling": DROP,
            "num_key_value_heads": DROP,
            "attention_bias": DROP,
            "mlp_bias": DROP,
            "tie_word_embeddings": DROP,
            "hidden_act": DROP,
        },
        misread={"rope_theta": 500000.0},
        lengths=_LONG,
    ),
    _llama(
        name="v4_linear_type",
        base=V4,
        config={"rope_scaling": {"type": "linear", "factor": 4.0}},
        misread={"rope_scaling": None},
    ),
    _llama(
        name="v4_dynamic_type",
        base=V4,
        config={"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32},
        misread={"rope_scaling": None},
        lengths=_CROSSING,
    ),
    _llama(
        name="v4_llama3",
        base=V4,
        config={"rope_theta": 500000.0, "rope_scaling": _LLAMA3 | {"rope_type": "llama3"}, "head_dim": 16},
        misread={"rope_scaling": None},
        lengths=_LONG,
    ),
    _llama(
        name="v4_yarn_both_types",
        base=V4,
        config={"rope_scaling": _YARN | {"type": "yarn", "rope_type": "yarn"}} | _YARN_SIZE,
        misread={"rope_scaling": None},
        lengths=_LONG,
    ),
    _llama(name="harmless_keys", base=V4, config=HARMLESS),
)
