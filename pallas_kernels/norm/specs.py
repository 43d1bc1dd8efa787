"""Widths D of real models, and odd ones, with the eps that their norms have."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A norm over `width` elements."""

    width: int
    eps: float


SPECS = {
    "smollm2_135m": NormSpec(width=576, eps=1e-5),
    "llama_3_1_8b": NormSpec(width=4096, eps=1e-5),
    "llama_2_7b": NormSpec(width=4096, eps=1e-6),
    "odd.42": NormSpec(width=42, eps=1e-5),
    "odd.1": NormSpec(width=1, eps=1e-6),
}
