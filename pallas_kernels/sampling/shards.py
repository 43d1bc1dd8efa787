"""How a vocabulary is split over devices, as far as sampling needs to know."""

import dataclasses
from collections.abc import Callable

import jax


def _same(x: jax.Array) -> jax.Array:
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabShards:
    """This shard's place in the vocabulary and the collectives over the shards, which the caller gives.

    offset: id of the first local logit, an int or an int32 scalar. max, sum, min: reduce an array over the shards. gather:
    joins arrays [B, n] of all shards to [B, shards * n], shards in the order of their offsets. The defaults are those of a
    whole vocabulary.
    """

    offset: int | jax.Array = 0
    max: Callable[[jax.Array], jax.Array] = _same
    sum: Callable[[jax.Array], jax.Array] = _same
    min: Callable[[jax.Array], jax.Array] = _same
    gather: Callable[[jax.Array], jax.Array] = _same


WHOLE_VOCAB = VocabShards()
