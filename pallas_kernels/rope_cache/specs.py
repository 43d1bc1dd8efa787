"""Heads of real models, and odd ones: what tests, tuner and benchmarks run; `attention` reads the same list."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """heads: of queries. rotated: elements of a head that rope turns. soft_cap: of the scores, or None."""

    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    soft_cap: float | None = None


SPECS = {
    "smollm2_135m": HeadSpec(heads=9, kv_heads=3, head_dim=64, rotated=64),
    "llama_3_1_8b": HeadSpec(heads=32, kv_heads=8, head_dim=128, rotated=128),
    "llama_2_7b": HeadSpec(heads=32, kv_heads=32, head_dim=128, rotated=128),
    "gemma_2_9b": HeadSpec(heads=16, kv_heads=8, head_dim=256, rotated=256, soft_cap=50.0),
    "phi_3_mini": HeadSpec(heads=32, kv_heads=32, head_dim=96, rotated=96),
    "odd": HeadSpec(heads=6, kv_heads=2, head_dim=20, rotated=12),
}
