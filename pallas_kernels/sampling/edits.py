"""Changes of logits before a choice, and what the tokens so far forbid, in plain jnp over a vocabulary that may be split.

Each shard changes the logits that it holds: there is no collective here.
"""

import jax
import jax.numpy as jnp
from jax import lax


def _places(ids, logits, shards):
    """Where in the local logits ids lie, int32 [B, n]; those that lie elsewhere, and negative ones, past the end, where a scatter drops."""
    local, width = ids - shards.offset, logits.shape[-1]
    return jnp.where((ids >= 0) & (local >= 0) & (local < width), local, width)


def _rows(ids):
    return jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]


def penalize(logits, tokens, *, prompt_lengths, lengths, repetition, presence, frequency, shards):
    logits = logits.astype(jnp.float32)
    beyond, step = logits.shape[-1], jnp.arange(tokens.shape[1], dtype=jnp.int32)
    places, rows = _places(tokens, logits, shards), _rows(tokens)
    known = step < lengths[:, None]

    def repeated(z):
        # a token that occurs often is written often, with the same value each time
        seen = jnp.where(known, places, beyond)
        old = jnp.take_along_axis(z, jnp.minimum(seen, beyond - 1), -1)
        return z.at[rows, seen].set(jnp.where(old < 0, old * repetition[:, None], old / repetition[:, None]), mode="drop")

    def counted(z):
        new = jnp.where(known & (step >= prompt_lengths[:, None]), places, beyond)
        counts = jnp.zeros(z.shape, jnp.float32).at[rows, new].add(1, mode="drop")
        return z - frequency[:, None] * counts - presence[:, None] * (counts > 0)

    logits = lax.cond(jnp.any(repetition != 1), repeated, lambda z: z, logits)
    return lax.cond(jnp.any((presence != 0) | (frequency != 0)), counted, lambda z: z, logits)


def ngram_completions(tokens, *, lengths, sizes):
    step = jnp.arange(tokens.shape[1], dtype=jnp.int32)

    def compare(back, same):
        """Is the token `back` places before each the one `back` places before the next? Asked of ngrams that are as long."""
        last = jnp.take_along_axis(tokens, jnp.maximum(lengths - back, 0)[:, None], 1)
        return same & ((jnp.roll(tokens, back, 1) == last) | (back >= sizes[:, None]))

    # the first sizes - 1 tokens end no ngram, so that what the roll brings round is never asked for
    ends = (step >= sizes[:, None] - 1) & (step < lengths[:, None]) & (sizes[:, None] > 0)
    longest = jnp.max(jnp.where(sizes <= lengths, sizes, 0))
    return jnp.where(lax.fori_loop(1, longest, compare, ends), tokens, -1)


def word_completions(tokens, *, lengths, words):
    before = words.shape[-1] - 1
    at = lengths[:, None] - before + jnp.arange(before, dtype=jnp.int32)
    tail = jnp.where(at >= 0, jnp.take_along_axis(tokens, jnp.maximum(at, 0), 1), -2)  # -2 is no token and no padding
    begun = jnp.all((words[..., :-1] == tail[:, None]) | (words[..., :-1] < 0), -1)
    return jnp.where(begun, words[..., -1], -1)


def ban(logits, ids, *, shards):
    return logits.astype(jnp.float32).at[_rows(ids), _places(ids, logits, shards)].set(-jnp.inf, mode="drop")


def add_bias(logits, ids, bias, *, shards) -> jax.Array:
    return logits.astype(jnp.float32).at[_rows(ids), _places(ids, logits, shards)].add(bias, mode="drop")
