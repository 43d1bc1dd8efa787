"""Choice of tokens in plain jnp over a vocabulary that may be split: the meaning of the operations, and without a sort."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sampling.random import gumbel

_TOP_BIT = np.uint32(1 << 31)
_LAST_ID = np.int32(2**31 - 1)


def _ids(logits, shards):
    return jnp.arange(logits.shape[-1], dtype=jnp.int32) + shards.offset


def argmax(logits, *, shards):
    # the maximum, then the lowest id that has it: jnp.argmax is 10x slower on XLA:CPU
    logits = logits.astype(jnp.float32)
    largest = shards.max(jnp.max(logits, -1, keepdims=True))
    # "not less" rather than "equal" gives an id of the vocabulary for a row of NaN too
    return shards.min(jnp.min(jnp.where(logits < largest, _LAST_ID, _ids(logits, shards)), -1))


def sample(logits, *, temperature, top_k, top_p, min_p, seeds, steps, shards):
    logits = logits.astype(jnp.float32)
    sampled = temperature > 0

    def draw():
        z = logits / jnp.where(sampled, temperature, 1)[:, None]
        largest = shards.max(jnp.max(z, -1))
        least = kept_from(z, largest, jnp.where(sampled, top_k, 0), jnp.where(sampled, top_p, 1), min_p, shards)
        noisy = jnp.where(z < least[:, None], -jnp.inf, z + gumbel(seeds, steps, _ids(z, shards)))
        return jnp.where(sampled[:, None], noisy, logits)

    # a batch without a sampled row draws nothing
    return argmax(jax.lax.cond(jnp.any(sampled), draw, lambda: logits), shards=shards)


def kept_from(z, largest, top_k, top_p, min_p, shards):
    """The least logit that may be drawn, float32 [B]: top-k, then top-p of what it leaves, then min-p of the likeliest."""
    keys = _to_keys(z)
    any_key = jnp.zeros(z.shape[:1], jnp.uint32)

    def by_count():
        def search(key):
            count = shards.sum(jnp.sum((keys >= key[:, None]).astype(jnp.int32), -1))
            return count >= top_k, count == top_k

        return _largest_key(search, top_k <= 0)

    from_k = jax.lax.cond(jnp.any(top_k > 0), by_count, lambda: any_key)

    def by_mass():
        weight = jnp.where(keys < from_k[:, None], 0, jnp.exp(z - largest[:, None]))
        # at least one token is kept, whatever top_p is
        wanted = jnp.maximum(top_p, 1e-30) * shards.sum(jnp.sum(weight, -1))

        def search(key):
            mass = shards.sum(jnp.sum(jnp.where(keys < key[:, None], 0, weight), -1))
            return mass >= wanted, False

        return _largest_key(search, top_p >= 1)

    from_p = jax.lax.cond(jnp.any(top_p < 1), by_mass, lambda: any_key)
    return jnp.maximum(_from_keys(jnp.maximum(from_k, from_p)), largest + jnp.log(min_p))


def _largest_key(search, done):
    """The largest key uint32 [B] whose tokens are still enough, bit by bit from the top; 0 for rows that are done.

    search(key) -> whether the tokens from that key on are enough, and whether they are exactly enough: a row is done then.
    """

    def step(state):
        bit, low, done = state
        enough, exactly = search(low | bit)
        return bit >> 1, jnp.where(enough & ~done, low | bit, low), done | exactly

    state = (jnp.uint32(_TOP_BIT), jnp.zeros(done.shape, jnp.uint32), done)
    return jax.lax.while_loop(lambda s: (s[0] > 0) & ~jnp.all(s[-1]), step, state)[1]


def _to_keys(z):
    """float32 -> uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(z, jnp.uint32)
    return jnp.where(bits < _TOP_BIT, bits | _TOP_BIT, ~bits)


def _from_keys(keys):
    """The float32 of a key. Key 0, below that of -inf, is a NaN pattern and becomes -inf."""
    bits = jnp.where(keys < _TOP_BIT, ~keys, keys ^ _TOP_BIT)
    z = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(z), -jnp.inf, z)


def _log_normaliser(logits, shards):
    """log(sum(exp(logits))) over all shards, float32 [B]."""
    largest = shards.max(jnp.max(logits, -1))
    return largest + jnp.log(shards.sum(jnp.sum(jnp.exp(logits - largest[:, None]), -1)))


def log_probs(logits, tokens, *, shards):
    logits = logits.astype(jnp.float32)
    local = tokens - shards.offset
    here = (local >= 0) & (local < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.clip(local, 0, logits.shape[-1] - 1)[:, None], -1)[:, 0]
    return shards.sum(jnp.where(here, picked, 0)) - _log_normaliser(logits, shards)


def top_log_probs(logits, n, *, shards):
    logits = logits.astype(jnp.float32)
    # of equal values top_k takes the lowest index, locally and, shards being in order, over the shards
    values, index = jax.lax.top_k(logits, min(n, logits.shape[-1]))
    values, ids = shards.gather(values), shards.gather(index.astype(jnp.int32) + shards.offset)
    values, index = jax.lax.top_k(values, n)
    return values - _log_normaliser(logits, shards)[:, None], jnp.take_along_axis(ids, index, -1)
