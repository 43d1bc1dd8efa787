"""The policy of requests as arrays: one entry a sequence, so that a batch of different requests is one program.

What differs per request is an array here. Only a user's own logits processors are static: a function is part of the program.

A token is chosen from the model's logits through these, in the order of transformers:

    repetition penalty; presence and frequency penalty; n-grams that would repeat; bad words; end tokens before min_tokens;
    logit bias; the user's own processor; temperature; top-k; top-p; min-p

What no row asks for is not computed. Log-probabilities are of the model's logits as they are, before all of these.
"""

import collections
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.errors import SamplingParamsError
from jaxinfer.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, LogitsProcessor, SamplingParams
from pallas_kernels.sampling import (
    WHOLE_VOCAB,
    VocabShards,
    add_bias,
    argmax,
    ban,
    log_probs,
    ngram_completions,
    penalize,
    sample,
    top_log_probs,
    word_completions,
)
from sharding.context import ParallelContext

MAX_STOP_TOKENS = 16  # per request, the model's own end tokens included
MAX_PROCESSORS = 32  # functions that an engine remembers, besides those of requests that are there

type NumberedProcessors = tuple[tuple[int, LogitsProcessor], ...]  # static: the functions that a program holds


def _pytree(cls):
    fields = tuple(f.name for f in dataclasses.fields(cls))
    return jax.tree_util.register_dataclass(cls, data_fields=fields, meta_fields=())


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class EditArrays:
    """What changes the logits of B sequences before anything else: read only where a row asks for one of these.

    repetition, presence, frequency: float32 [B], off at 1, 0, 0. ngram: int32 [B], 0 is off. bias_ids: int32 [B, MAX_LOGIT_BIAS], -1 where
    unused, with bias float32. bad_words: int32 [B, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS], each at the right end of its row, -1 elsewhere.
    processor: int32 [B], the number of the user's own function, 0 for none.
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    ngram: jax.Array
    bias_ids: jax.Array
    bias: jax.Array
    bad_words: jax.Array
    processor: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...], xp=jnp) -> "EditArrays":
        return cls(
            repetition=xp.ones(shape, np.float32),
            presence=xp.zeros(shape, np.float32),
            frequency=xp.zeros(shape, np.float32),
            ngram=xp.zeros(shape, np.int32),
            bias_ids=xp.full((*shape, MAX_LOGIT_BIAS), -1, np.int32),
            bias=xp.zeros((*shape, MAX_LOGIT_BIAS), np.float32),
            bad_words=xp.full((*shape, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32),
            processor=xp.zeros(shape, np.int32),
        )


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingArrays:
    """SamplingParams of B sequences.

    temperature, top_p, min_p: float32 [B]. top_k, limit (new tokens at most), min_tokens: int32 [B]. seed: uint32 [B]. stop_tokens: int32
    [B, MAX_STOP_TOKENS], -1 where unused. wants_logprobs: bool [B]. edited: bool [B], whether any of `edits` is in use. said: int32 [B],
    tokens at the end of the prompt that are text already, of a sequence that is read again.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    stop_tokens: jax.Array
    limit: jax.Array
    min_tokens: jax.Array
    wants_logprobs: jax.Array
    edited: jax.Array
    said: jax.Array
    edits: EditArrays

    @classmethod
    def zeros(cls, shape: tuple[int, ...], xp=jnp) -> "SamplingArrays":
        """Greedy requests that may produce nothing: what an unused slot holds. xp: jax.numpy or numpy."""
        return cls(
            temperature=xp.zeros(shape, np.float32),
            top_k=xp.zeros(shape, np.int32),
            top_p=xp.ones(shape, np.float32),
            min_p=xp.zeros(shape, np.float32),
            seed=xp.zeros(shape, np.uint32),
            stop_tokens=xp.full((*shape, MAX_STOP_TOKENS), -1, np.int32),
            limit=xp.zeros(shape, np.int32),
            min_tokens=xp.zeros(shape, np.int32),
            wants_logprobs=xp.zeros(shape, bool),
            edited=xp.zeros(shape, bool),
            said=xp.zeros(shape, np.int32),
            edits=EditArrays.zeros(shape, xp),
        )

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        limits: Sequence[int],
        stop_tokens: Sequence[Sequence[int]],
        rows: int,
        processors: "Processors | None" = None,
        *,
        said: Sequence[int] = (),
    ) -> "SamplingArrays":
        """The arrays of some requests, padded to `rows` with unused ones.

        processors: numbers of the functions; needed where a request has one. said: see there, 0 by default. Raises
        SamplingParamsError for bad words that are strings (`jaxinfer.requests.for_model` makes them token ids) and for a function without
        a number.
        """
        out = cls.zeros((rows,), np)
        for i, (p, limit, stops) in enumerate(zip(params, limits, stop_tokens, strict=True)):
            out.temperature[i], out.top_k[i], out.top_p[i], out.min_p[i] = p.temperature, p.top_k, p.top_p, p.min_p
            out.seed[i], out.limit[i], out.wants_logprobs[i] = p.seed, limit, p.logprobs is not None
            out.stop_tokens[i, : len(stops)] = stops
            out.min_tokens[i] = p.min_tokens
            out.edited[i] = _set_edits(out.edits, i, p, processors)
        out.said[: len(said)] = said
        return out


def _set_edits(edits: EditArrays, row: int, p: SamplingParams, processors: "Processors | None") -> bool:
    """Write one request's edits; whether it has any."""
    if p.logits_processor is not None and processors is None:
        raise SamplingParamsError(f"logits_processor is {p.logits_processor!r}; give `processors`, which numbers it")
    edits.repetition[row] = p.repetition_penalty
    edits.presence[row], edits.frequency[row] = p.presence_penalty, p.frequency_penalty
    edits.ngram[row] = p.no_repeat_ngram_size
    edits.bias_ids[row, : len(p.logit_bias)] = list(p.logit_bias)
    edits.bias[row, : len(p.logit_bias)] = list(p.logit_bias.values())
    for words, word in zip(edits.bad_words[row], p.bad_words, strict=False):
        if isinstance(word, str):
            raise SamplingParamsError(f"bad_words holds {word!r}; give token ids here, only an engine has a tokenizer")
        words[-len(word) :] = word
    if processors is not None:
        edits.processor[row] = processors.number(p.logits_processor)
    penalties = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
    return bool(penalties or p.no_repeat_ngram_size or p.logit_bias or p.bad_words or p.logits_processor)


@dataclasses.dataclass(frozen=True, eq=False)
class Numbered:
    """A user's own logits processor under the number that it has for as long as somebody holds this."""

    number: int
    function: LogitsProcessor


class Processors:
    """The users' own logits processors that an engine knows, numbered from 1.

    A program holds those that its sequences use, under their numbers: the same functions are the same program. Those that were asked for
    last are remembered, and those that requests hold; another one has a new number when it comes again, and is compiled again. May be used
    by several threads.
    """

    def __init__(self, vocab: int):
        self._vocab, self._lock, self._numbers = vocab, threading.Lock(), itertools.count(1)
        self._known: weakref.WeakValueDictionary[LogitsProcessor, Numbered] = weakref.WeakValueDictionary()
        self._recent: collections.OrderedDict[int, Numbered] = collections.OrderedDict()

    def hold(self, function: LogitsProcessor) -> Numbered:
        """A function with its number. A new one is traced without being compiled. Raises SamplingParamsError where that fails."""
        with self._lock:
            held = self._known.get(function)
            if held is None:
                self._check(function)
                held = self._known[function] = Numbered(next(self._numbers), function)
            self._recent[held.number] = held
            self._recent.move_to_end(held.number)
            while len(self._recent) > MAX_PROCESSORS:
                self._recent.popitem(last=False)
            return held

    def number(self, function: LogitsProcessor | None) -> int:
        """Of a function, 0 for None; see `hold`."""
        return 0 if function is None else self.hold(function).number

    def used(self, functions: Iterable[LogitsProcessor | None]) -> NumberedProcessors:
        """What a program needs for sequences that ask for these functions."""
        numbers = {self.number(function): function for function in functions if function is not None}
        return tuple(sorted(numbers.items()))

    def _check(self, function: LogitsProcessor) -> None:
        whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        try:
            out = jax.eval_shape(function, jax.ShapeDtypeStruct((self._vocab,), jnp.float32), whole(16), whole())
        except Exception as error:  # whatever a user's function raises while jax traces it
            raise SamplingParamsError(f"logits_processor {function!r} cannot be traced by jax: {error}") from error
        if getattr(out, "shape", None) != (self._vocab,) or out.dtype != jnp.float32:
            raise SamplingParamsError(
                f"logits_processor {function!r} gives {out}; it must give float32 [{self._vocab}], like the logits that it gets"
            )


@_pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Past:
    """What the edits of B sequences look at. tokens: int32 [B, S], prompt and text so far, of which `lengths` int32 [B] are real."""

    tokens: jax.Array
    lengths: jax.Array
    edits: EditArrays


@_pytree
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


def _where(condition, change: Callable[[jax.Array], jax.Array], logits):
    return lax.cond(condition, change, lambda z: z, logits)


def edit_logits(logits, sampling: SamplingArrays, past: Past, steps, shards: VocabShards):
    """Logits float32 [B, V] of this shard after everything that comes before the user's own processor. steps: int32 [B], new tokens."""
    e, tokens, lengths = past.edits, past.tokens, past.lengths
    logits = penalize(
        logits,
        tokens,
        prompt_lengths=lengths - steps,
        lengths=lengths,
        repetition=e.repetition,
        presence=e.presence,
        frequency=e.frequency,
        shards=shards,
    )
    repeats = lambda: ngram_completions(tokens, lengths=lengths, sizes=e.ngram)
    repeated = lax.cond(jnp.any(e.ngram > 0), repeats, lambda: jnp.full_like(tokens, -1))
    spoken = word_completions(tokens, lengths=lengths, words=e.bad_words)
    early = jnp.where((steps < sampling.min_tokens)[:, None], sampling.stop_tokens, -1)
    banned = jnp.concatenate([repeated, spoken, early], -1)  # in one scatter, since their order is nothing
    logits = _where(jnp.any(banned >= 0), lambda z: ban(z, banned, shards), logits)
    return _where(jnp.any(e.bias_ids >= 0), lambda z: add_bias(z, e.bias_ids, e.bias, shards), logits)


def apply_processors(logits, past: Past, processors: NumberedProcessors):
    """Logits float32 [B, V] of the whole vocabulary after each row's own function."""
    if not processors:
        return logits
    S, V = past.tokens.shape[1], logits.shape[-1]
    # what a slot's former sequence left behind is hidden behind an id that scatters drop
    tokens = jnp.where(jnp.arange(S) < past.lengths[:, None], past.tokens, V)
    for number, function in processors:
        mine = past.edits.processor == number

        def change(z, function=function, mine=mine):
            return jnp.where(mine[:, None], jax.vmap(function)(z, tokens, past.lengths), z)

        logits = _where(jnp.any(mine), change, logits)
    return logits


def choose_tokens(
    logits,
    sampling: SamplingArrays,
    steps,
    past: Callable[[], Past],
    ctx: ParallelContext,
    *,
    vocab: int,
    top: int,
    processors: NumberedProcessors = (),
    live=None,
    likeliest: Callable[[], jax.Array] | None = None,
) -> Choice:
    """The next token of every row.

    logits: float32 [B, V] of this shard; with `likeliest` a function that makes them, called where a row needs more than its most likely
    token: that one gives these, int32 [B], without logits. sampling: its `edits` are not looked at. steps: int32 [B], new tokens so far;
    with the seed they are the random key. past: called where a row needs it. vocab: entries of the whole vocabulary that are no padding.
    top: alternatives to report (static). live: bool [B], rows whose tokens are used (by default all); others ask for nothing. A row in
    which every token is forbidden gets token 0.
    """
    live = jnp.ones(steps.shape, bool) if live is None else live
    edited = sampling.edited | (steps < sampling.min_tokens)
    if likeliest is not None:
        rest: dict[str, Any] = {"vocab": vocab, "top": top, "processors": processors, "live": live}

        def simple() -> Choice:
            none = jnp.zeros((*steps.shape, top), jnp.float32)
            return Choice(
                token=likeliest(),
                logprob=jnp.zeros(steps.shape, jnp.float32),
                top_logprobs=none,
                top_ids=none.astype(jnp.int32),
            )

        more = edited | (sampling.temperature > 0) | sampling.wants_logprobs | (top > 0)
        return lax.cond(jnp.any(live & more), lambda: choose_tokens(logits(), sampling, steps, past, ctx, **rest), simple)
    with jax.named_scope("sample"):
        shards = vocab_shards(ctx, logits.shape[-1])

        def drawn():
            looked = past()
            mine = _where(jnp.any(edited), lambda z: edit_logits(z, sampling, looked, steps, shards), logits)
            # one gather of the logits is cheaper than a collective per step of the threshold search
            whole = apply_processors(ctx.gather_vocab(mine)[:, :vocab], looked, processors)
            return sample(
                whole,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seeds=sampling.seed,
                steps=steps,
                shards=WHOLE_VOCAB,
            )

        special = jnp.any(live & (edited | (sampling.temperature > 0)))
        token = lax.cond(special, drawn, lambda: argmax(logits, shards))
        logprob = lax.cond(
            jnp.any(live & sampling.wants_logprobs),
            lambda: log_probs(logits, token, shards),
            lambda: jnp.zeros(token.shape, jnp.float32),
        )
        if top:
            values, ids = top_log_probs(logits, top, shards)
        else:
            values, ids = jnp.zeros((*token.shape, 0), jnp.float32), jnp.zeros((*token.shape, 0), jnp.int32)
        return Choice(token=token, logprob=logprob, top_logprobs=values, top_ids=ids)
