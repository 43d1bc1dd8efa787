"""Widths F of real models' hidden layers, and odd ones."""

import dataclasses

from pallas_kernels.models import MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """Rows of `width` results of an activation; gated: made of twice as many inputs."""

    kind: str
    width: int
    gated: bool


SPECS = {
    "smollm2_135m": ActivationSpec(kind="silu", width=MODELS["smollm2_135m"].mlp, gated=True),
    "llama_3_1_8b": ActivationSpec(kind="silu", width=MODELS["llama_3_1_8b"].mlp, gated=True),
    "gemma_2_9b": ActivationSpec(kind="gelu_tanh", width=MODELS["gemma_2_9b"].mlp, gated=True),
    "bert_base": ActivationSpec(kind="gelu", width=3072, gated=False),
    "opt_6_7b": ActivationSpec(kind="relu", width=16384, gated=False),
    "odd.42": ActivationSpec(kind="gelu", width=42, gated=True),
    "odd.1": ActivationSpec(kind="silu", width=1, gated=False),
}
