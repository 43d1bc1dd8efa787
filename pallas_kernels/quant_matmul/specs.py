"""Weights of real models, [O, I], and odd ones: what tests, tuner and benchmarks run."""

import dataclasses

from pallas_kernels.models import MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulSpec:
    """A weight of `outputs` x `inputs`."""

    outputs: int
    inputs: int


def _of(model: str) -> dict[str, MatmulSpec]:
    """The matrices of a model by the names of their parts."""
    m = MODELS[model]
    sizes = {
        "q": (m.heads * m.head_dim, m.embed),
        "k": (m.kv_heads * m.head_dim, m.embed),
        "gate": (m.mlp, m.embed),
        "down": (m.embed, m.mlp),
        "head": (m.vocabulary, m.embed),
    }
    return {f"{model}.{part}": MatmulSpec(outputs=outputs, inputs=inputs) for part, (outputs, inputs) in sizes.items()}


SPECS = {
    **_of("smollm2_135m"),
    **_of("llama_3_1_8b"),
    **_of("llama_2_7b"),
    "odd.42x256": MatmulSpec(outputs=42, inputs=256),
    "odd.1x64": MatmulSpec(outputs=1, inputs=64),
    "odd.7x384": MatmulSpec(outputs=7, inputs=384),
    "odd.over_a_chunk": MatmulSpec(outputs=4099, inputs=384),
}
TINY = tuple(name for name, spec in SPECS.items() if spec.outputs * spec.inputs < 1 << 21)
