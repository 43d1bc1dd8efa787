"""Vocabularies of real models, whole or as one of several shards, and odd ones."""

import dataclasses

from pallas_kernels.models import MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularySpec:
    """Logits of `tokens` tokens over `vocabulary` words."""

    tokens: int
    vocabulary: int


SPECS = {
    "smollm2_135m": VocabularySpec(tokens=64, vocabulary=MODELS["smollm2_135m"].vocabulary),
    "llama_3_1_8b": VocabularySpec(tokens=512, vocabulary=MODELS["llama_3_1_8b"].vocabulary),
    "llama_3_1_8b.shard_of_8": VocabularySpec(tokens=512, vocabulary=MODELS["llama_3_1_8b"].vocabulary // 8),
    "odd.1000": VocabularySpec(tokens=3, vocabulary=1000),
    "odd.1": VocabularySpec(tokens=2, vocabulary=1),
}
