"""The policy of requests as arrays: one entry a sequence, so that a batch of different requests is one program.

What differs per request is an array here; nothing of it is static.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.sampling_params import SamplingParams
from pallas_kernels.sampling import WHOLE_VOCAB, VocabShards, argmax, log_probs, sample, top_log_probs
from sharding.context import ParallelContext

MAX_STOP_TOKENS = 16  # per request, the model's own end tokens included


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_k", "top_p", "min_p", "seed", "stop_tokens", "limit", "wants_logprobs"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingArrays:
    """SamplingParams of B sequences.

    temperature, top_p, min_p: float32 [B]. top_k, limit (new tokens at most): int32 [B]. seed: uint32 [B].
    stop_tokens: int32 [B, MAX_STOP_TOKENS], -1 where unused. wants_logprobs: bool [B].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    stop_tokens: jax.Array
    limit: jax.Array
    wants_logprobs: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "SamplingArrays":
        """Greedy requests that may produce nothing: what an unused slot holds."""
        return cls(
            temperature=jnp.zeros(shape, jnp.float32),
            top_k=jnp.zeros(shape, jnp.int32),
            top_p=jnp.ones(shape, jnp.float32),
            min_p=jnp.zeros(shape, jnp.float32),
            seed=jnp.zeros(shape, jnp.uint32),
            stop_tokens=jnp.full((*shape, MAX_STOP_TOKENS), -1, jnp.int32),
            limit=jnp.zeros(shape, jnp.int32),
            wants_logprobs=jnp.zeros(shape, bool),
        )

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], limits: Sequence[int], stop_tokens: Sequence[Sequence[int]], rows: int
    ) -> "SamplingArrays":
        """The arrays of some requests, padded to `rows` with unused ones."""
        out = jax.tree.map(lambda a: np.array(a), cls.zeros((rows,)))
        for i, (p, limit, stops) in enumerate(zip(params, limits, stop_tokens, strict=True)):
            out.temperature[i], out.top_k[i], out.top_p[i], out.min_p[i] = p.temperature, p.top_k, p.top_p, p.min_p
            out.seed[i], out.limit[i], out.wants_logprobs[i] = p.seed, limit, p.logprobs is not None
            out.stop_tokens[i, : len(stops)] = stops
        return out


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("token", "logprob", "top_logprobs", "top_ids"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A token per sequence: int32 [B]; its log-probability float32 [B] (0 unless asked for); n alternatives [B, n]."""

    token: jax.Array
    logprob: jax.Array
    top_logprobs: jax.Array
    top_ids: jax.Array


def vocab_shards(ctx: ParallelContext, width: int) -> VocabShards:
    """How sampling reaches the other parts of a vocabulary of which this device holds `width` entries."""
    if not ctx.vocab:
        return WHOLE_VOCAB
    return VocabShards(
        offset=ctx.vocab_index() * width,
        max=ctx.max_over_vocab,
        sum=ctx.leave_vocab,
        min=ctx.min_over_vocab,
        gather=ctx.gather_vocab,
    )


def choose_tokens(logits, sampling: SamplingArrays, steps, ctx: ParallelContext, top: int) -> Choice:
    """The next token of every row. logits: float32 [B, V] of this shard. steps: int32 [B], tokens chosen so far; with the seed they
    are the random key. top: alternatives to report (static)."""
    with jax.named_scope("sample"):
        shards = vocab_shards(ctx, logits.shape[-1])

        def drawn():
            # one gather of the logits is cheaper than a collective per step of the threshold search
            return sample(
                ctx.gather_vocab(logits),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seeds=sampling.seed,
                steps=steps,
                shards=WHOLE_VOCAB,
            )

        token = lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: argmax(logits, shards))
        logprob = lax.cond(
            jnp.any(sampling.wants_logprobs),
            lambda: log_probs(logits, token, shards),
            lambda: jnp.zeros(token.shape, jnp.float32),
        )
        if top:
            values, ids = top_log_probs(logits, top, shards)
        else:
            values, ids = jnp.zeros((*token.shape, 0), jnp.float32), jnp.zeros((*token.shape, 0), jnp.int32)
        return Choice(token=token, logprob=logprob, top_logprobs=values, top_ids=ids)
