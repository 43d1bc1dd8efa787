"""Rows of real models, and odd ones."""

import dataclasses

from pallas_kernels.models import MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSpec:
    """A row of `width` elements."""

    width: int


SPECS = {
    "scores_8k": RowSpec(width=8192),
    "llama_3_1_8b.vocab": RowSpec(width=MODELS["llama_3_1_8b"].vocabulary),
    "odd.42": RowSpec(width=42),
    "odd.1": RowSpec(width=1),
}
