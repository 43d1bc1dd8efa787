"""Choice of the next tokens from logits whose vocabulary may be split over shards, and changes of the logits before it.

Padded vocabulary entries arrive as -inf: they have probability 0 and are never chosen.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.cpu import operations as native
from pallas_kernels.errors import ShapeError
from pallas_kernels.registry import choose, register, register_file
from pallas_kernels.sampling import edits, reference
from pallas_kernels.sampling.shards import WHOLE_VOCAB, VocabShards

__all__ = [
    "WHOLE_VOCAB",
    "VocabShards",
    "add_bias",
    "argmax",
    "ban",
    "log_probs",
    "ngram_completions",
    "penalize",
    "sample",
    "top_log_probs",
    "word_completions",
]

register("argmax", "reference", reference.argmax)
register("argmax", "native", native.argmax, supports=native.supports_argmax, priority=native.PRIORITY)
register("sample", "reference", reference.sample)
register("sample", "native", native.sample, supports=native.supports_sample, priority=native.PRIORITY)
for _op in ("argmax", "sample"):
    register_file(_op, "pallas", "pallas_kernels.sampling.pallas")
register("log_probs", "reference", reference.log_probs)
register("top_log_probs", "reference", reference.top_log_probs)
register("penalize", "reference", edits.penalize)
register("ngram_completions", "reference", edits.ngram_completions)
register("word_completions", "reference", edits.word_completions)
register("ban", "reference", edits.ban)
register("add_bias", "reference", edits.add_bias)


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
    run = choose("sample", implementation, shape=logits.shape, dtype=logits.dtype, split=shards is not WHOLE_VOCAB)
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


def penalize(
    logits,
    tokens,
    *,
    prompt_lengths,
    lengths,
    repetition,
    presence,
    frequency,
    shards: VocabShards = WHOLE_VOCAB,
    implementation: str | None = None,
) -> jax.Array:
    """Logits of tokens that have occurred, made smaller.

        z_i = logits_i / repetition where it is positive, logits_i * repetition where negative      for i in tokens[:length]
        c_i = how often i is in tokens[prompt_length:length]
        z_i - frequency * c_i - presence * [c_i > 0]

    logits: float [B, V], the local part. tokens: int32 [B, S], a prompt and what came after it; places from `lengths` on are not looked
    at. prompt_lengths, lengths: int32 [B], at most S. repetition: float32 [B] above 0, off at 1. presence, frequency: float32 [B], off
    at 0. Returns float32 [B, V]. A batch that switches a penalty off does not pay for it. Raises ShapeError. Source: Keskar et al. 2019,
    arXiv:1909.05858, section 4.1, with the sign rule of transformers (repetition); OpenAI's API reference (presence, frequency).
    """
    rows = {"prompt_lengths": prompt_lengths, "lengths": lengths}
    rows |= {"repetition": repetition, "presence": presence, "frequency": frequency}
    _check("penalize", logits, **rows)
    _check_ids("penalize", "tokens [B, S]", tokens, logits.shape[0], 2)
    run = choose("penalize", implementation, shape=logits.shape, dtype=logits.dtype)
    return run.function(logits, tokens, **rows, shards=shards)


def ngram_completions(tokens, *, lengths, sizes, implementation: str | None = None) -> jax.Array:
    """Tokens that would complete an ngram a second time.

        { tokens[e] : n - 1 <= e < length, tokens[e-n+1:e] = tokens[length-n+1:length] }        n = size

    tokens: int32 [B, S]. lengths: int32 [B], at most S. sizes: int32 [B], 0 is off; 1 gives every token. Returns int32 [B, S], ids and
    -1 elsewhere, for `ban`. Costs S comparisons for each token of the longest ngram. Raises ShapeError. Source: Paulus et al. 2017,
    arXiv:1705.04304, section 2.5.
    """
    _check_ids("ngram_completions", "tokens [B, S]", tokens, None, 2)
    for name, row in (("lengths [B]", lengths), ("sizes [B]", sizes)):
        _check_ids("ngram_completions", name, row, tokens.shape[0], 1)
    run = choose("ngram_completions", implementation, shape=tokens.shape, dtype=tokens.dtype)
    return run.function(tokens, lengths=lengths, sizes=sizes)


def word_completions(tokens, *, lengths, words, implementation: str | None = None) -> jax.Array:
    """The last token of each word whose other tokens are the last ones so far; one of a single token is always about to be completed.

    tokens: int32 [B, S]. lengths: int32 [B], at most S. words: int32 [B, W, L], each at the right end of its row with -1 before it; a
    row of -1 is none. Returns int32 [B, W], ids and -1 elsewhere, for `ban`. Raises ShapeError.
    """
    _check_ids("word_completions", "tokens [B, S]", tokens, None, 2)
    _check_ids("word_completions", "lengths [B]", lengths, tokens.shape[0], 1)
    _check_ids("word_completions", "words [B, W, L]", words, tokens.shape[0], 3)
    run = choose("word_completions", implementation, shape=words.shape, dtype=words.dtype)
    return run.function(tokens, lengths=lengths, words=words)


def ban(logits, ids, shards: VocabShards = WHOLE_VOCAB, *, implementation: str | None = None) -> jax.Array:
    """Logits with -inf at some ids: their probability is 0.

    logits: float [B, V], the local part. ids: int32 [B, n], global; negative ones are none. Returns float32 [B, V]. Raises ShapeError.
    """
    _check("ban", logits)
    _check_ids("ban", "ids [B, n]", ids, logits.shape[0], 2)
    return choose("ban", implementation, shape=logits.shape, dtype=logits.dtype).function(logits, ids, shards=shards)


def add_bias(logits, ids, bias, shards: VocabShards = WHOLE_VOCAB, *, implementation: str | None = None) -> jax.Array:
    """Logits with a bias added at some ids.

    logits: float [B, V], the local part. ids: int32 [B, n], global; negative ones are none. bias: float32 [B, n]. Returns float32 [B, V].
    Raises ShapeError.
    """
    _check("add_bias", logits)
    _check_ids("add_bias", "ids [B, n]", ids, logits.shape[0], 2)
    if bias.shape != ids.shape or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ShapeError(f"add_bias: bias must be float {list(ids.shape)}, one per id, got {bias.dtype}{list(bias.shape)}")
    run = choose("add_bias", implementation, shape=logits.shape, dtype=logits.dtype)
    return run.function(logits, ids, bias, shards=shards)


_KINDS = {
    "temperature": jnp.floating,
    "top_k": jnp.signedinteger,
    "top_p": jnp.floating,
    "min_p": jnp.floating,
    "seeds": jnp.unsignedinteger,
    "steps": jnp.signedinteger,
    "tokens": jnp.signedinteger,
    "prompt_lengths": jnp.signedinteger,
    "lengths": jnp.signedinteger,
    "repetition": jnp.floating,
    "presence": jnp.floating,
    "frequency": jnp.floating,
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


def _check_ids(op: str, what: str, ids, rows: int | None, ndim: int) -> None:
    """Whether an array of whole numbers has `ndim` axes, the first of them of `rows` (None: of any number)."""
    if ids.ndim != ndim or not jnp.issubdtype(ids.dtype, jnp.signedinteger) or (rows is not None and ids.shape[0] != rows):
        of = "" if rows is None else f" with B = {rows}"
        raise ShapeError(f"{op}: {what} must be int32{of}, got {ids.dtype}{list(ids.shape)}")
