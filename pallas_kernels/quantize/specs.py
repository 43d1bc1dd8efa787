"""Inputs I of real models' matmuls and the groups that share a scale, and odd ones."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """Rows of `inputs` elements in groups of `group`, or one scale a token."""

    inputs: int
    group: int | None = 64


SPECS = {
    "smollm2_135m.embed": ActivationSpec(inputs=576),
    "smollm2_135m.mlp": ActivationSpec(inputs=1536),
    "smollm2_135m.token": ActivationSpec(inputs=576, group=None),
    "llama_3_1_8b.embed": ActivationSpec(inputs=4096),
    "llama_3_1_8b.mlp": ActivationSpec(inputs=14336),
    "llama_2_7b.mlp": ActivationSpec(inputs=11008),
    "odd.shorter_last_group": ActivationSpec(inputs=100),
    "odd.one_input": ActivationSpec(inputs=1),
    "odd.group_of_one": ActivationSpec(inputs=5, group=1),
}
