"""Weights of real models, [O, I], and odd ones: what tests, tuner and benchmarks run."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulSpec:
    """A weight of `outputs` x `inputs`."""

    outputs: int
    inputs: int


SPECS = {
    "smollm2_135m.q": MatmulSpec(outputs=576, inputs=576),
    "smollm2_135m.k": MatmulSpec(outputs=192, inputs=576),
    "smollm2_135m.gate": MatmulSpec(outputs=1536, inputs=576),
    "smollm2_135m.down": MatmulSpec(outputs=576, inputs=1536),
    "smollm2_135m.head": MatmulSpec(outputs=49152, inputs=576),
    "llama_3_1_8b.q": MatmulSpec(outputs=4096, inputs=4096),
    "llama_3_1_8b.k": MatmulSpec(outputs=1024, inputs=4096),
    "llama_3_1_8b.gate": MatmulSpec(outputs=14336, inputs=4096),
    "llama_3_1_8b.down": MatmulSpec(outputs=4096, inputs=14336),
    "llama_3_1_8b.head": MatmulSpec(outputs=128256, inputs=4096),
    "llama_2_7b.q": MatmulSpec(outputs=4096, inputs=4096),
    "llama_2_7b.gate": MatmulSpec(outputs=11008, inputs=4096),
    "llama_2_7b.down": MatmulSpec(outputs=4096, inputs=11008),
    "llama_2_7b.head": MatmulSpec(outputs=32000, inputs=4096),
    "odd.42x256": MatmulSpec(outputs=42, inputs=256),
    "odd.1x64": MatmulSpec(outputs=1, inputs=64),
    "odd.7x384": MatmulSpec(outputs=7, inputs=384),
    "odd.over_a_chunk": MatmulSpec(outputs=4099, inputs=384),
}
TINY = tuple(name for name, spec in SPECS.items() if spec.outputs * spec.inputs < 1 << 21)
