"""Widths D of real models, and odd ones, with the eps that their norms have."""

import dataclasses

from pallas_kernels.models import MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A norm over `width` elements."""

    width: int
    eps: float


SPECS = {
    **{
        name: NormSpec(width=MODELS[name].embed, eps=MODELS[name].eps)
        for name in ("smollm2_135m", "llama_3_1_8b", "llama_2_7b")
    },
    "odd.42": NormSpec(width=42, eps=1e-5),
    "odd.1": NormSpec(width=1, eps=1e-6),
}
