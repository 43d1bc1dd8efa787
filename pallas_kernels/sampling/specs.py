"""Vocabularies V of real models, as they are padded for split heads, and odd ones."""

import dataclasses

from pallas_kernels.models import MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabSpec:
    """A vocabulary of `size` entries, `padding` of them -inf."""

    size: int
    padding: int = 0


SPECS = {
    **{name: VocabSpec(size=MODELS[name].vocabulary) for name in ("smollm2_135m", "llama_3_1_8b", "llama_2_7b")},
    "odd.257": VocabSpec(size=257, padding=3),
    "odd.1": VocabSpec(size=1),
}
