"""Choice of the next tokens from logits whose vocabulary may be split over shards.

Padded vocabulary entries arrive as -inf: they have probability 0 and are never chosen.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ShapeError
from pallas_kernels.registry import choose, register
from pallas_kernels.sampling import reference
from pallas_kernels.sampling.shards import WHOLE_VOCAB, VocabShards

__all__ = ["WHOLE_VOCAB", "VocabShards", "argmax", "log_probs", "sample", "top_log_probs"]

register("argmax", "reference", reference.argmax)
register("sample", "reference", reference.sample)
register("log_probs", "reference", reference.log_probs)
register("top_log_probs", "reference", reference.top_log_probs)


def argmax(logits, shards: VocabShards = WHOLE_VOCAB, *, implementation: str | None = None) -> jax.Array:
    """The most likely token, the lowest id on ties.

    logits: float [B, V], the local part of them. Returns int32 [B], the same on every shard. Two collectives, a max and a min
    of [B], where the vocabulary is split. Raises ShapeError.
    """
    _check("argmax", logits)
    return choose("argmax", implementation, shape=logits.shape, dtype=logits.dtype).function(logits, shards=shards)


def sample(
    logits,
    *,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    steps,
    shards: VocabShards = WHOLE_VOCAB,
    implementation: str | None = None,
) -> jax.Array:
    """A random token per row, or the most likely one where the temperature is 0.

        z = logits / temperature            p = softmax(z) over the tokens that are still kept
        top_k   keeps z_i >= the k-th largest z
        top_p   keeps i while the sum of p_j over z_j > z_i is less than top_p          (the likeliest is always kept)
        min_p   keeps p_i >= min_p * max p
        token = argmax(z_i + Gumbel noise of (seed, step, i)) over what is kept

    in this order; tokens with the same z are kept or dropped together. logits: float [B, V], the local part. temperature, top_p
    and min_p: float32 [B], off at 0, 1 and 0. top_k: int32 [B], off at 0. seeds: uint32 [B]. steps: int32 [B], the position of
    the token in its request. The noise depends on nothing else, so that neither batch nor mesh changes a draw. Returns int32
    [B].

    Nothing is sorted: a threshold is searched bit by bit on the integers that order like float32. A batch that switches a step
    off does not pay for it. A split vocabulary costs a sum of [B] per searched bit, at most 32 for each of the two. Raises
    ShapeError. Source: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2019, arXiv:1904.09751 (top-p); Nguyen et al.
    2024, arXiv:2407.01082 (min-p); order of the steps as in transformers.
    """
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seeds": seeds, "steps": steps}
    _check("sample", logits, **knobs)
    run = choose("sample", implementation, shape=logits.shape, dtype=logits.dtype)
    return run.function(logits, **knobs, shards=shards)


def log_probs(logits, tokens, shards: VocabShards = WHOLE_VOCAB, *, implementation: str | None = None) -> jax.Array:
    """Log-probabilities of given tokens.

        logits[token] - log(sum(exp(logits)))

    logits: float [B, V], the local part, before any temperature. tokens: int32 [B], global ids. Returns float32 [B], -inf for a
    padded entry. Raises ShapeError.
    """
    _check("log_probs", logits, tokens=tokens)
    return choose("log_probs", implementation, shape=logits.shape, dtype=logits.dtype).function(logits, tokens, shards=shards)


def top_log_probs(
    logits, n: int, shards: VocabShards = WHOLE_VOCAB, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """The n most likely tokens and their log-probabilities.

    logits: float [B, V], the local part, before any temperature. n: static, at most the size of the whole vocabulary.
    Returns (float32 [B, n], descending; int32 [B, n] global ids, lower ids first among equals). Raises ShapeError.
    """
    _check("top_log_probs", logits)
    if n < 1 or (shards is WHOLE_VOCAB and n > logits.shape[-1]):
        raise ShapeError(f"top_log_probs: n must be from 1 to the {logits.shape[-1]} entries of the vocabulary, got {n}")
    return choose("top_log_probs", implementation, shape=logits.shape, dtype=logits.dtype).function(logits, n, shards=shards)


_KINDS = {
    "temperature": jnp.floating,
    "top_k": jnp.signedinteger,
    "top_p": jnp.floating,
    "min_p": jnp.floating,
    "seeds": jnp.unsignedinteger,
    "steps": jnp.signedinteger,
    "tokens": jnp.signedinteger,
}


def _check(op: str, logits, **rows) -> None:
    if logits.ndim != 2 or 0 in logits.shape or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ShapeError(f"{op}: logits must be a float array [B, V] with B and V >= 1, got {logits.dtype}{list(logits.shape)}")
    for name, row in rows.items():
        if row.shape != logits.shape[:1] or not jnp.issubdtype(row.dtype, _KINDS[name]):
            raise ShapeError(
                f"{op}: {name} must be {_KINDS[name].__name__} [{logits.shape[0]}], one per row of logits, "
                f"got {row.dtype}{list(row.shape)}"
            )
