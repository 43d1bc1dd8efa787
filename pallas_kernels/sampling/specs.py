"""Vocabularies V of real models, as they are padded for split heads, and odd ones."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabSpec:
    """A vocabulary of `size` entries, `padding` of them -inf."""

    size: int
    padding: int = 0


SPECS = {
    "smollm2_135m": VocabSpec(size=49152),
    "llama_3_1_8b": VocabSpec(size=128256),
    "llama_2_7b": VocabSpec(size=32000),
    "odd.257": VocabSpec(size=257, padding=3),
    "odd.1": VocabSpec(size=1),
}
