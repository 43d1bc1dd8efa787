"""Experts of real models, and odd ones."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """`experts` gated MLPs of `hidden` between `embed`, `chosen` of them for a token. Others: of `route`."""

    experts: int
    chosen: int
    embed: int
    hidden: int
    scoring: str = "softmax"
    groups: int = 1
    kept_groups: int = 1
    group_score: str = "max"

    @property
    def routing(self) -> dict:
        """Arguments of `route`."""
        more = {name: getattr(self, name) for name in ("scoring", "groups", "kept_groups", "group_score")}
        return more | {"experts_per_token": self.chosen}


SPECS = {
    "mixtral_8x7b": ExpertsSpec(experts=8, chosen=2, embed=4096, hidden=14336),
    "qwen3_30b_a3b": ExpertsSpec(experts=128, chosen=8, embed=2048, hidden=768),
    "deepseek_v2_lite": ExpertsSpec(experts=64, chosen=6, embed=2048, hidden=1408),
    "deepseek_v3": ExpertsSpec(
        experts=256, chosen=8, embed=7168, hidden=2048, scoring="sigmoid", groups=8, kept_groups=4, group_score="top2"
    ),
    "odd.5": ExpertsSpec(experts=5, chosen=2, embed=64, hidden=40),
}
