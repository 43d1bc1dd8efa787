"""The random models of the golden tests, as a table: which config.json, which prompts, and what must show in the logits.

Every case is written once in the style of the transformers version its keys come from. `misread` is a change of the
config (or of the weights) that a careless reader would make; make_golden.py refuses a case whose logits would not show it.
"""

from __future__ import annotations

import dataclasses

DROP = object()  # as a value in `config`: the key is not in config.json at all

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One random model.

    Attributes:
      name: file name of the case.
      config: changes against `base`; the value DROP leaves the key out.
      base: V5 or V4.
      lengths: prompt lengths in tokens.
      misread: changes of the config under which the logits must come out different; None where nothing can be misread.
      without: the ending of tensor names that must matter: zeroed, they change the logits.
      own_head: the file holds an lm_head.weight that differs from the embedding although the config ties them.
    """

    name: str
    config: dict = dataclasses.field(default_factory=dict)
    base: dict = dataclasses.field(default_factory=lambda: V5)
    lengths: tuple[int, ...] = (1, 6, 17)
    misread: dict | None = None
    without: str | None = None
    own_head: bool = False

    def json_config(self, changes: dict | None = None) -> dict:
        """The content of config.json, optionally with more `changes`."""
        merged = self.base | self.config | (changes or {})
        return {key: value for key, value in sorted(merged.items()) if value is not DROP}


def _rope(kind: str, *, theta: float = 10000.0, **keys: object) -> dict:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **keys}}


_PLAIN = _rope("default")
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
    return _rope("yarn", **_YARN, **keys) | _YARN_SIZE


CASES = (
    # Attention and matrices.
    Case(name="mha", config={"num_key_value_heads": 4}),
    Case(name="gqa_9_3", config={"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}),
    Case(name="mqa", config={"num_key_value_heads": 1}),
    Case(name="tied", config={"tie_word_embeddings": True}),
    Case(name="tied_own_head", config={"tie_word_embeddings": True}, own_head=True),
    Case(name="attention_bias", config={"attention_bias": True}, without=".bias"),
    Case(name="mlp_bias", config={"mlp_bias": True}, without=".bias"),
    Case(name="both_biases", config={"attention_bias": True, "mlp_bias": True}, without="down_proj.bias"),
    Case(name="head_dim_24", config={"head_dim": 24}),
    Case(
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
    Case(name="eps_1e-6", config={"rms_norm_eps": 1e-6}, misread={"rms_norm_eps": 1e-5}),
    Case(name="eps_absent", base=V4, config={"rms_norm_eps": DROP}, misread={"rms_norm_eps": 1e-5}),
    Case(name="act_gelu", config={"hidden_act": "gelu"}, misread={"hidden_act": "gelu_pytorch_tanh"}),
    Case(name="act_gelu_tanh", config={"hidden_act": "gelu_pytorch_tanh"}, misread={"hidden_act": "gelu"}),
    Case(name="act_relu", config={"hidden_act": "relu"}, misread={"hidden_act": "silu"}),
    # Rotary frequencies, in the keys of transformers 5.
    Case(name="theta_5e5", config=_rope("default", theta=500000.0), misread=_PLAIN, lengths=_LONG),
    Case(name="linear", config=_rope("linear", factor=4.0), misread=_PLAIN),
    Case(
        name="dynamic",
        config=_rope("dynamic", factor=2.0) | {"max_position_embeddings": 32},
        misread=_PLAIN,
        lengths=_CROSSING,
    ),
    Case(name="yarn", config=_yarn(), misread=_yarn(attention_factor=1.0), lengths=_LONG),
    Case(name="yarn_attention_factor", config=_yarn(attention_factor=1.3), misread=_yarn(), lengths=_LONG),
    Case(name="yarn_mscale_pair", config=_yarn(mscale=2.0, mscale_all_dim=0.5), misread=_yarn(), lengths=_LONG),
    Case(
        name="yarn_mscale_alone",
        config=_yarn(mscale=2.0),
        misread=_yarn(attention_factor=1.277),
        lengths=_LONG,
    ),
    Case(name="yarn_betas", config=_yarn(beta_fast=8.0, beta_slow=2.0), misread=_yarn(), lengths=_LONG),
    Case(name="yarn_no_truncate", config=_yarn(truncate=False), misread=_yarn(), lengths=_LONG),
    Case(
        name="yarn_original_absent",
        config=_rope("yarn", factor=4.0) | {"max_position_embeddings": 256},
        misread=_rope("yarn", factor=4.0, original_max_position_embeddings=64),
        lengths=_LONG,
    ),
    Case(
        name="yarn_original_at_top",
        config=_rope("yarn", factor=4.0, original_max_position_embeddings=32)
        | _YARN_SIZE
        | {"original_max_position_embeddings": 256},
        misread={"original_max_position_embeddings": DROP},
        lengths=_LONG,
    ),
    Case(
        name="yarn_factor_null",
        config=_rope("yarn", **(_YARN | {"factor": None})) | _YARN_SIZE,
        misread=_rope("yarn", **(_YARN | {"factor": 1.0})),
        lengths=_LONG,
    ),
    Case(
        name="longrope",
        config=_rope("longrope", factor=4.0, **_LONGROPE),
        misread=_rope("longrope", **(_LONGROPE | {"long_factor": _LONGROPE["short_factor"], "factor": 4.0})),
        lengths=_CROSSING,
    ),
    Case(
        name="longrope_attention_factor",
        config=_rope("longrope", factor=4.0, attention_factor=1.5, **_LONGROPE),
        misread=_rope("longrope", factor=4.0, **_LONGROPE),
        lengths=_CROSSING,
    ),
    Case(
        name="longrope_original_at_top",
        config=_rope("longrope", **_LONGROPE_BARE) | {"max_position_embeddings": 256, "original_max_position_embeddings": 32},
        misread=_rope("longrope", factor=4.0, **_LONGROPE_BARE),
        lengths=_CROSSING,
    ),
    Case(name="llama3", config=_rope("llama3", theta=500000.0, **_LLAMA3), misread=_rope("default", theta=5e5), lengths=_LONG),
    # The keys of transformers 4.
    Case(name="v4", base=V4, config={"rope_theta": 500000.0}, misread={"rope_theta": 10000.0}, lengths=_LONG),
    Case(
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
    Case(
        name="v4_linear_type",
        base=V4,
        config={"rope_scaling": {"type": "linear", "factor": 4.0}},
        misread={"rope_scaling": None},
    ),
    Case(
        name="v4_dynamic_type",
        base=V4,
        config={"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32},
        misread={"rope_scaling": None},
        lengths=_CROSSING,
    ),
    Case(
        name="v4_llama3",
        base=V4,
        config={"rope_theta": 500000.0, "rope_scaling": _LLAMA3 | {"rope_type": "llama3"}, "head_dim": 16},
        misread={"rope_scaling": None},
        lengths=_LONG,
    ),
    Case(
        name="v4_yarn_both_types",
        base=V4,
        config={"rope_scaling": _YARN | {"type": "yarn", "rope_type": "yarn"}} | _YARN_SIZE,
        misread={"rope_scaling": None},
        lengths=_LONG,
    ),
    Case(name="harmless_keys", base=V4, config=HARMLESS),
)

# SmolLM2: plain text, code, a chat, digits, other scripts, one word, a long paragraph, a list.
SMOLLM2_PROMPTS = {
    "english": "The capital of France is",
    "code": 'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n        return n\n',
    "chat": [{"role": "user", "content": "What is the difference between a lake and a river?"}],
    "digits": "3.14159, 2.71828, 1.41421; 12 + 30 = 42, 7 * 8 = 56, 1024 / 4 =",
    "unicode": "Zürich, São Paulo, Łódź — naïve café 日本語 Привет мир 🙂🚀 is a line with",
    "word": "Hello",
    "paragraph": (
        "The lighthouse stood on a narrow spit of rock a mile from the village, and for most of the year the only way"
        " to reach it was a flat-bottomed boat that the keeper had built himself. He was a patient man. Each morning he"
        " climbed the hundred and nine steps to the lamp, trimmed the wick, wiped the salt from the glass, and wrote"
        " down the direction of the wind in a book with a green cover. In the afternoons he mended nets, although he"
        " no longer fished, because the work kept his hands warm and because the nets were never finished. Ships"
        " passed far out, and on clear days he could read their names through the telescope that his father had left"
        " him. He kept a list of those too. When the first storm of the autumn came, it arrived from the south-west,"
        " which was unusual, and it carried with it a smell of wood smoke and oranges. The keeper lit the lamp an hour"
        " early that evening. He had just sat down to his supper when he heard, quite clearly, above the noise of the"
        " water, somebody knocking at the door. He put down his spoon,"
    ),
    "list": "Shopping list:\n1. Apples\n2. Bread\n3. Cheese\n4.",
}

# Spread over the vocabulary of 49,152; their logits after the prompt are stored.
SMOLLM2_TOKENS = (0, 1, 2, 28, 198, 260, 504, 1234, 4649, 7042, 9999, 16384, 24577, 32768, 40000, 49151)
