"""Random GPT-2s: learned positions, fused and transposed matrices, both ways to name tensors and sizes."""

from golden_cases.case import DROP, Case

# As transformers writes a GPT2Config. The longest text takes every position but one.
BASE = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "model_type": "gpt2",
    "n_ctx": 42,
    "n_embd": 64,
    "n_head": 4,
    "n_inner": None,
    "n_layer": 2,
    "n_positions": 42,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.1,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "use_cache": True,
    "vocab_size": 96,
}
# What files of old versions hold beside the weights, under the names of the bare model.
_MASKS = {f"h.{i}.attn.{name}": shape for i in range(2) for name, shape in (("bias", (1, 1, 42, 42)), ("masked_bias", ()))}
_NAMED = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "max_position_embeddings": 50,
    **dict.fromkeys(["n_embd", "n_head", "n_layer", "n_positions", "n_ctx"], DROP),
}

CASES = (
    Case(name="gpt2", base=BASE, without="c_attn.bias"),
    Case(name="gpt2_bare_names", base=BASE, strip="transformer.", buffers=_MASKS, without="wpe.weight"),
    Case(name="gpt2_unscaled", base=BASE, config={"scale_attn_weights": False}, misread={"scale_attn_weights": True}),
    Case(
        name="gpt2_inner",
        base=BASE,
        config={"n_inner": 40, "activation_function": "relu"},
        misread={"activation_function": "gelu_new"},
    ),
    Case(name="gpt2_activation", base=BASE, config={"activation_function": DROP}, misread={"activation_function": "silu"}),
    Case(name="gpt2_general_keys", base=BASE, config=_NAMED, without="ln_f.bias"),
    Case(
        name="gpt2_own_head",
        base=BASE,
        config={"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
        misread={"layer_norm_epsilon": 1e-5},
    ),
)
