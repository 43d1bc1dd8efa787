"""Random Mixtrals and Qwen3s with experts: how many, how wide, how their weights add up, and layers that have none."""

from __future__ import annotations

from golden_cases.case import DROP, Case
from golden_cases.mistral import BASE as MISTRAL
from golden_cases.mistral import CROSSING
from golden_cases.qwen import QWEN3

# As transformers 5 writes them.
MIXTRAL = MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def _one_by_one(shapes: dict[str, list[int]], names: dict[str, str], block: str) -> dict[str, list[int]]:
    """Files hold every expert's matrices for themselves, the module holds them in stacks, gate and up in one."""
    out: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        prefix, _, part = name.partition(".mlp.")
        if part == "experts.gate_up_proj":
            parts, size = ("gate", "up"), [shape[1] // 2, shape[2]]
        elif part == "experts.down_proj":
            parts, size = ("down",), shape[1:]
        else:
            out[f"{prefix}.{block}.{part}" if part == "gate.weight" else name] = shape
            continue
        for e in range(shape[0]):
            out |= {f"{prefix}.{block}.experts.{e}.{names[which]}.weight": size for which in parts}
    return out


def _mixtral(*, base: dict = MIXTRAL, **keys) -> Case:
    names = {"gate": "w1", "down": "w2", "up": "w3"}
    return Case(base=base, stored=lambda shapes: _one_by_one(shapes, names, "block_sparse_moe"), **keys)


def _qwen(*, base: dict = QWEN3_MOE, **keys) -> Case:
    names = {"gate": "gate_proj", "down": "down_proj", "up": "up_proj"}
    return Case(base=base, stored=lambda shapes: _one_by_one(shapes, names, "mlp"), **keys)


CASES = (
    _mixtral(name="mixtral", config={"num_hidden_layers": 3}, misread={"num_experts_per_tok": 1}),
    # as many as no mesh divides, wider than the embedding, all of a token's windows short
    _mixtral(
        name="mixtral_window",
        config={"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 40, "sliding_window": 8},
        lengths=CROSSING,
        misread={"sliding_window": None},
    ),
    # 8 experts, 2 of a token, 8 kv heads, and a base of a million
    _mixtral(
        name="mixtral_absent",
        config={
            "num_attention_heads": 16,
            "head_dim": DROP,
            "intermediate_size": 24,
            "num_key_value_heads": DROP,
            "rope_parameters": DROP,
            "rms_norm_eps": DROP,
            "num_local_experts": DROP,
            "num_experts_per_tok": DROP,
        },
        misread={"num_experts_per_tok": 3},
    ),
    # one expert a token, whose weight is 1 whatever its logit; the head is the embedding
    _mixtral(
        name="mixtral_one",
        config={"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True, "head_dim": 24},
        misread={"num_experts_per_tok": 2},
    ),
    # every expert for every token, behind another activation, with rotations of another base
    _mixtral(
        name="mixtral_every",
        config={
            "num_local_experts": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        misread={"hidden_act": "silu"},
    ),
    _qwen(name="qwen3_moe", misread={"norm_topk_prob": False}),
    # every second layer has experts, and one of these after all has none
    _qwen(
        name="qwen3_moe_mixed",
        config={"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": DROP},
        misread={"norm_topk_prob": True},
    ),
    _qwen(
        name="qwen3_moe_dense_first",
        config={"num_hidden_layers": 3, "mlp_only_layers": [0], "attention_bias": True, "num_experts": 6, "head_dim": 24},
        without="mlp.gate.weight",
    ),
    _qwen(
        name="qwen3_moe_window",
        config={"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True},
        lengths=CROSSING,
        misread={"sliding_window": 7},
    ),
    # one expert a token, whose weight stays its share among all
    _qwen(
        name="qwen3_moe_one",
        config={"num_experts": 5, "num_experts_per_tok": 1, "norm_topk_prob": False, "moe_intermediate_size": 40},
        misread={"norm_topk_prob": True},
    ),
)
