"""Rows of real models, and odd ones."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSpec:
    """A row of `width` elements."""

    width: int


SPECS = {
    "scores_8k": RowSpec(width=8192),
    "llama_3_1_8b.vocab": RowSpec(width=128256),
    "odd.42": RowSpec(width=42),
    "odd.1": RowSpec(width=1),
}
