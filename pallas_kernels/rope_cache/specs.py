"""Heads of real models, and odd ones: what tests, tuner and benchmarks run; `attention` reads the same list."""

import dataclasses

from pallas_kernels.models import MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """heads: of queries. rotated: elements of a head that rope turns. soft_cap: of the scores, or None."""

    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    soft_cap: float | None = None


SPECS = {
    **{
        name: HeadSpec(heads=m.heads, kv_heads=m.kv_heads, head_dim=m.head_dim, rotated=m.head_dim, soft_cap=m.soft_cap)
        for name, m in MODELS.items()
    },
    "phi_3_mini": HeadSpec(heads=32, kv_heads=32, head_dim=96, rotated=96),
    "odd": HeadSpec(heads=6, kv_heads=2, head_dim=20, rotated=12),
}
