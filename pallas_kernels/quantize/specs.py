"""Inputs I of real models' matmuls and the groups that share a scale, and odd ones."""

import dataclasses

from pallas_kernels.models import MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """Rows of `inputs` elements in groups of `group`, or one scale a token."""

    inputs: int
    group: int | None = 64


SPECS = {
    "smollm2_135m.embed": ActivationSpec(inputs=MODELS["smollm2_135m"].embed),
    "smollm2_135m.mlp": ActivationSpec(inputs=MODELS["smollm2_135m"].mlp),
    "smollm2_135m.token": ActivationSpec(inputs=MODELS["smollm2_135m"].embed, group=None),
    "llama_3_1_8b.embed": ActivationSpec(inputs=MODELS["llama_3_1_8b"].embed),
    "llama_3_1_8b.mlp": ActivationSpec(inputs=MODELS["llama_3_1_8b"].mlp),
    "llama_2_7b.mlp": ActivationSpec(inputs=MODELS["llama_2_7b"].mlp),
    "odd.shorter_last_group": ActivationSpec(inputs=100),
    "odd.one_input": ActivationSpec(inputs=1),
    "odd.group_of_one": ActivationSpec(inputs=5, group=1),
}
