"""Experts of real models, and odd ones."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """`experts` gated MLPs of `hidden` between `embed`, `chosen` of them for a token."""

    experts: int
    chosen: int
    embed: int
    hidden: int


SPECS = {
    "mixtral_8x7b": ExpertsSpec(experts=8, chosen=2, embed=4096, hidden=14336),
    "qwen3_30b_a3b": ExpertsSpec(experts=128, chosen=8, embed=2048, hidden=768),
    "deepseek_v2_lite": ExpertsSpec(experts=64, chosen=6, embed=2048, hidden=1408),
    "odd.5": ExpertsSpec(experts=5, chosen=2, embed=64, hidden=40),
}
