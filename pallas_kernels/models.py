"""Sizes of real models: what the specs of all rooms are made of, for tests, tuner and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder: embed D, mlp F, heads of queries and of keys and values, head_dim H, vocabulary V. soft_cap: of the scores, or None."""

    embed: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    eps: float
    soft_cap: float | None = None


MODELS = {
    "smollm2_135m": ModelShape(embed=576, mlp=1536, heads=9, kv_heads=3, head_dim=64, vocabulary=49152, eps=1e-5),
    "llama_3_1_8b": ModelShape(embed=4096, mlp=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256, eps=1e-5),
    "llama_2_7b": ModelShape(embed=4096, mlp=11008, heads=32, kv_heads=32, head_dim=128, vocabulary=32000, eps=1e-6),
    "gemma_2_9b": ModelShape(
        embed=3584, mlp=14336, heads=16, kv_heads=8, head_dim=256, vocabulary=256000, eps=1e-6, soft_cap=50.0
    ),
}
