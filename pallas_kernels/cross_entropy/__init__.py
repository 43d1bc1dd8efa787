"""Log-probabilities of given tokens, also where the vocabulary is split over shards: no gathered logits, no array of probabilities."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy import reference
from pallas_kernels.errors import ShapeError
from pallas_kernels.registry import choose, register, register_file

register("vocabulary_parts", "reference", reference.vocabulary_parts)
register_file("vocabulary_parts", "pallas", "pallas_kernels.cross_entropy.pallas")

type Over = Callable[[jax.Array], jax.Array]


def log_probs(
    logits,
    targets,
    *,
    first=0,
    max_over_shards: Over | None = None,
    sum_over_shards: Over | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Log-probabilities of tokens under a softmax.

        log p = logits[target] - log sum exp(logits)

    logits: float [..., V], or this shard's part of them. targets: int32 [...], in the whole vocabulary. first: the token that this
    shard's first logit is of. max_over_shards, sum_over_shards: take float32 [...] to that of all shards (a pmax, a psum with its
    gradient); without them the logits are whole. Returns float32 [...]; of a target outside the vocabulary, -inf's kin: minus the log
    of the sum alone, so leave such rows out. Differentiable in the logits. Raises ShapeError.
    Source: Shoeybi et al. 2019, arXiv:1909.08053.
    """
    if logits.ndim < 1 or not jnp.issubdtype(logits.dtype, jnp.floating) or targets.shape != logits.shape[:-1]:
        raise ShapeError(
            f"log_probs: logits must be float [..., V] and targets [...], got {logits.dtype}{list(logits.shape)} and {list(targets.shape)}"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ShapeError(f"log_probs: targets must be integers, got {targets.dtype}")
    if (max_over_shards is None) is not (sum_over_shards is None):
        raise ShapeError("log_probs: max_over_shards and sum_over_shards come together; give both, or neither")
    run = choose("vocabulary_parts", implementation, shape=logits.shape)
    parts = run.function(logits, targets, jnp.asarray(first, jnp.int32))
    if max_over_shards is None or sum_over_shards is None:
        return parts.target - parts.largest - jnp.log(parts.total)
    # which value is subtracted does not matter to the result, so it has no gradient
    largest = max_over_shards(jax.lax.stop_gradient(parts.largest))
    total = sum_over_shards(parts.total * jnp.exp(parts.largest - largest))
    return sum_over_shards(parts.target) - largest - jnp.log(total)


def cross_entropy(logits, targets, **options) -> jax.Array:
    """Minus `log_probs`, with the same arguments: float32 [...]."""
    return -log_probs(logits, targets, **options)
