"""The engine: compiled programs, slots, buckets; the four calls prefill / insert / decode / free, and generation on top of them.

Shapes are few, so that programs are: prompts are padded to a power of two tokens, batches to a power of two rows, and one decode
program serves every number of steps.
"""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError, EngineStateError, PromptError, SamplingParamsError, TokenLimitError
from jaxinfer.generation import Emitted, Prefix, Scores, State
from jaxinfer.models.decoder import DecoderWeights
from jaxinfer.placement import Placed
from jaxinfer.programs import Programs
from jaxinfer.requests import Delta, GenerationResult, Request, ScoreResult, TokenLogprob
from jaxinfer.sampling import MAX_STOP_TOKENS, SamplingArrays
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text import Tokenizer
from pallas_kernels.layer_cache import cache_dtype

SMALLEST_BUCKET = 16  # tokens of a prompt
SMALLEST_CACHE = 128  # tokens of a cache row
STOP_CHECK_STEPS = 16  # tokens between looks at stop strings and at waiting requests
SCORE_ROWS = 4

_CLOSED = "the engine is closed; make a new one with jaxinfer.init_inference"

Prompt = str | Sequence[int]
Progress = Callable[[int, int, str], None]


def bucket(size: int, smallest: int, largest: int) -> int:
    """The power of two times `smallest` that holds `size`, at most `largest`."""
    out = smallest
    while out < size:
        out *= 2
    return min(out, largest)


def _as_list(prompt) -> Sequence[Any]:
    """Text as it is; arrays and sequences as lists. Raises PromptError for anything else."""
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(prompt, list | tuple | str):
        raise PromptError(f"got {prompt!r} as a prompt; a prompt is text or a list of token ids")
    return prompt


def _is_token(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


class Engine:
    """A placed model that generates. Made by `jaxinfer.init_inference`.

    params: the weights, DecoderWeights of device arrays: the first argument of the pure calls. tokenizer may be None: prompts are
    token ids then. eos_ids: tokens that end a text, besides the tokenizer's.
    """

    def __init__(
        self, placed: Placed, config: EngineConfig, tokenizer: Tokenizer | None = None, *, eos_ids: Sequence[int] = ()
    ):
        self.config, self.tokenizer, self.plan, self.mesh = config, tokenizer, placed.plan, placed.mesh
        self._params: DecoderWeights | None = placed.weights
        dtype = cache_dtype(config.kv_cache.dtype or config.dtype or "float32")
        self.eos_ids = tuple(dict.fromkeys((*eos_ids, *(tokenizer.eos_ids if tokenizer else ()))))
        self._programs: Programs | None = Programs(placed, cache_dtype=dtype)
        self._resting: tuple[tuple[int, int], State] | None = None  # a state that no request uses, and its sizes
        self._lock = threading.Lock()

    @property
    def params(self) -> DecoderWeights:
        if self._params is None:
            raise EngineStateError(_CLOSED)
        return self._params

    @property
    def stages(self) -> int:
        return self.plan.context.stages

    def close(self) -> None:
        """Give weights, caches and programs back. Later calls raise EngineStateError."""
        self._params, self._programs, self._resting = None, None, None

    def _running(self) -> Programs:
        if self._programs is None:
            raise EngineStateError(_CLOSED)
        return self._programs

    # --- the four calls

    def prefill(self, params: DecoderWeights, tokens, lengths, sampling: SamplingArrays, *, top: int = 0) -> Prefix:
        """Read prompts and choose their first tokens.

        tokens: int32 [rows, T], padded on the right, T at most inference_max_tokens. lengths: int32 [rows]. sampling: arrays [rows].
        top: alternatives to report (static). One program per (rows, T).
        """
        return self._running().prefill(top)(params, tokens, lengths, sampling)

    def insert(self, prefix: Prefix, state: State, slots) -> State:
        """Put the rows of a prefix into slots, int32 [rows]; -1 leaves a row out. `state` is donated."""
        return self._running().insert()(prefix, state, slots)

    def decode(self, params: DecoderWeights, state: State, steps, *, top: int = 0) -> tuple[State, Emitted]:
        """Up to `steps` tokens (an array: one program for any number) for every active slot. `state` is donated."""
        return self._running().decode(top)(params, state, np.int32(steps))

    def free(self, state: State, slot: int) -> State:
        """Stop the sequence in a slot. `state` is donated."""
        return self._running().free()(state, np.int32(slot))

    def init_state(self, batch: int, tokens: int | None = None) -> State:
        """A state of `batch` sequences per micro-batch, so batch * stages slots, all free, each with room for `tokens` tokens.

        tokens: inference_max_tokens by default. Fewer are faster: attention reads a whole row and masks what is not there yet.
        """
        most = self.config.inference_max_tokens
        tokens = most if tokens is None else tokens
        if not 1 <= batch <= self.config.micro_batch_size:
            raise EngineStateError(f"batch {batch}: micro_batch_size allows 1 to {self.config.micro_batch_size}")
        if not 1 <= tokens <= most:
            raise EngineStateError(f"room for {tokens} tokens: inference_max_tokens allows 1 to {most}")
        return self._running().state(batch, tokens)()

    # --- generation

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[GenerationResult] | GenerationResult:
        """Generate for one prompt or a list; strings or token ids. A list gives a list of results in its order.

        params: one for all, or one each. Raises PromptError, TokenLimitError, SamplingParamsError before anything is compiled.
        """
        single, requests = self._requests(prompts, params)
        for _ in self._run(requests, every=None):
            pass
        results = [request.result() for request in requests]
        return results[0] if single else results

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, every: int = 1) -> Iterator[Delta]:
        """Generate for one prompt and give text as it becomes final: whole characters, nothing that a stop string would cut.

        every: tokens decoded between two pieces.
        """
        if every < 1:
            raise ConfigError(f"every is {every}; give at least 1 token")
        _, requests = self._requests([prompt], params)
        return (delta for _, delta in self._run(requests, every=every))

    def score(self, prompts: Prompt | Sequence[Prompt]) -> list[ScoreResult] | ScoreResult:
        """Log-probability of every token of the prompts given those before it."""
        single, ids = self._prompt_ids(prompts)
        results = []
        run = self._running().score()
        for start in range(0, len(ids), SCORE_ROWS):
            part = ids[start : start + SCORE_ROWS]
            tokens, lengths = self._padded(part, bucket(len(part), 1, SCORE_ROWS), smallest=2)
            scores: Scores = jax.device_get(run(self.params, tokens, lengths))
            for row, prompt in enumerate(part):
                n = len(prompt)
                logprobs, greedy = scores.logprobs[row, 1:n].tolist(), scores.greedy[row, 1:n].tolist()
                results.append(ScoreResult(token_ids=prompt, logprobs=[None, *logprobs], greedy_token_ids=[None, *greedy]))
        return results[0] if single else results

    def warmup(
        self,
        *,
        prompt_tokens: Sequence[int] = (SMALLEST_BUCKET,),
        batches: Sequence[int] = (1,),
        progress: Progress | None = None,
    ):
        """Compile, and run once, what requests of these prompt lengths and batch sizes need."""
        work = [(n, b) for b in batches for n in prompt_tokens]
        for done, (tokens, batch) in enumerate(work):
            if progress:
                progress(done, len(work), f"{batch} x {tokens} tokens")
            most = self.config.inference_max_tokens
            prompt = [0] * min(tokens, most - 1)
            self.generate([prompt] * batch, SamplingParams(max_tokens=min(2, most - len(prompt)), ignore_eos=True))
        if progress:
            progress(len(work), len(work), "ready")

    def _prompt_ids(self, prompts) -> tuple[bool, list[list[int]]]:
        self._running()
        prompts = _as_list(prompts)
        single = isinstance(prompts, str) or not prompts or _is_token(prompts[0])
        return single, [self._ids(i, prompt) for i, prompt in enumerate([prompts] if single else prompts)]

    def _ids(self, index: int, prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError(f"prompt {index} is text, and the checkpoint has no tokenizer; give token ids")
            prompt = self.tokenizer.encode(prompt) if prompt else []
        ids = _as_list(prompt)
        wrong = [t for t in ids if not _is_token(t)]
        if wrong:
            raise PromptError(f"prompt {index} holds {wrong[0]!r}; a prompt is text or a list of token ids")
        if not ids:
            raise PromptError(f"prompt {index} is empty; give at least one token")
        vocab, limit = self.plan.config.vocab, self.config.inference_max_tokens
        outside = [t for t in ids if not 0 <= t < vocab]
        if outside:
            raise PromptError(f"prompt {index} holds token {outside[0]}; the vocabulary has 0 to {vocab - 1}")
        if len(ids) > limit:
            raise TokenLimitError(
                f"prompt {index} has {len(ids)} tokens, inference_max_tokens is {limit}; "
                "shorten it or raise the limit in the configuration"
            )
        return [int(t) for t in ids]

    def _requests(self, prompts, params) -> tuple[bool, list[Request]]:
        single, ids = self._prompt_ids(prompts)
        each = list(params) if isinstance(params, list | tuple) else [SamplingParams() if params is None else params] * len(ids)
        if len(each) != len(ids):
            raise SamplingParamsError(f"{len(each)} SamplingParams for {len(ids)} prompts; give one for all, or one each")
        if strange := [p for p in each if not isinstance(p, SamplingParams)]:
            raise SamplingParamsError(f"parameters are SamplingParams, got {type(strange[0]).__name__}")
        return single, [self._request(i, p, s) for i, (p, s) in enumerate(zip(ids, each, strict=True))]

    def _request(self, index: int, prompt: list[int], params: SamplingParams) -> Request:
        room = self.config.inference_max_tokens - len(prompt)
        limit = room if params.max_tokens is None else params.max_tokens
        if limit > room or room < 1:
            raise TokenLimitError(
                f"prompt {index} has {len(prompt)} tokens and asks for {max(limit, 1)} new ones, inference_max_tokens is "
                f"{self.config.inference_max_tokens}; lower max_tokens to {max(room, 0)}, or raise the limit in the configuration"
            )
        if params.logprobs is not None and params.logprobs > self.config.max_logprobs:
            raise SamplingParamsError(
                f"logprobs is {params.logprobs}, the engine's max_logprobs is {self.config.max_logprobs}; ask for fewer, or raise it "
                "in the configuration"
            )
        if params.stop and self.tokenizer is None:
            raise SamplingParamsError("stop strings need a tokenizer; use stop_token_ids")
        outside = [t for t in params.stop_token_ids if t >= self.plan.config.vocab]
        if outside:
            raise SamplingParamsError(
                f"stop token {outside[0]} never comes; the vocabulary has 0 to {self.plan.config.vocab - 1}"
            )
        stops = (() if params.ignore_eos else self.eos_ids) + params.stop_token_ids
        if len(stops) > MAX_STOP_TOKENS:
            raise SamplingParamsError(
                f"{len(stops)} stop tokens, the model's own included; at most {MAX_STOP_TOKENS} are possible"
            )
        return Request(prompt, params, limit=limit, stop_tokens=stops, tokenizer=self.tokenizer)

    def _padded(self, prompts: Sequence[list[int]], rows: int, smallest: int = SMALLEST_BUCKET):
        longest = max(len(p) for p in prompts)
        width = bucket(longest, max(SMALLEST_BUCKET, smallest), max(self.config.inference_max_tokens, smallest))
        tokens = np.zeros((rows, width), np.int32)
        lengths = np.ones((rows,), np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = prompt
            lengths[i] = len(prompt)
        return tokens, lengths

    @contextlib.contextmanager
    def _state(self, batch: int, tokens: int):
        """A state to work with: the resting one where it fits. One that an exception leaves behind is not used again."""
        with self._lock:
            resting, self._resting = self._resting, None
        if resting is None or resting[0] != (batch, tokens):
            del resting  # before the new one is made
            resting = (batch, tokens), self.init_state(batch, tokens)
        holder = [resting[1]]
        yield holder
        with self._lock:
            self._resting = (batch, tokens), holder[0]

    def _run(self, requests: Sequence[Request], *, every: int | None) -> Iterator[tuple[Request, Delta]]:
        """All requests to their ends, in as many slots as there are. every: tokens between looks, None for as many as possible."""
        waiting = collections.deque(requests)
        if not waiting:
            return
        top = max(r.params.logprobs or 0 for r in requests) and self.config.max_logprobs
        batch = bucket(-(-len(waiting) // self.stages), 1, self.config.micro_batch_size)
        # attention reads as much of a row as its cache can hold
        tokens = bucket(max(len(r.prompt) + r.limit for r in requests), SMALLEST_CACHE, self.config.inference_max_tokens)
        slots: dict[int, Request] = {}
        with self._state(batch, tokens) as holder:
            while waiting or slots:
                free = [s for s in range(batch * self.stages) if s not in slots]
                if waiting and free:
                    entered, events = self._enter(waiting, free, holder, top)
                    slots |= entered
                    yield from events
                if not slots:
                    continue
                steps = every or max(r.limit - len(r.token_ids) for r in slots.values())
                if not every and (waiting or any(r.params.stop for r in slots.values())):
                    steps = min(steps, STOP_CHECK_STEPS)
                holder[0], emitted = self.decode(self.params, holder[0], steps, top=top)
                emitted = jax.device_get(emitted)
                for slot, request in list(slots.items()):
                    m, b = divmod(slot, batch)
                    count = int(emitted.counts[m, b])
                    if not count:
                        continue
                    choices = jax.tree.map(lambda a, m=m, b=b, n=count: a[m, b, :n], emitted.choices)
                    delta = request.push(choices.token.tolist(), _logprobs(choices, request))
                    if request.finish_reason:
                        if not emitted.done[m, b]:  # a stop string: the device does not know
                            holder[0] = self.free(holder[0], slot)
                        del slots[slot]
                    yield request, delta

    def _enter(self, waiting, free, holder, top):
        """Prefill as many waiting requests as there are free slots, and put them there."""
        start = time.perf_counter()
        group = [waiting.popleft() for _ in range(min(len(waiting), len(free)))]
        rows = bucket(len(group), 1, 1 << 30)
        tokens, lengths = self._padded([r.prompt for r in group], rows)
        stops = [r.stop_tokens for r in group]
        sampling = SamplingArrays.of([r.params for r in group], [r.limit for r in group], stops, rows)
        prefix = self.prefill(self.params, tokens, lengths, sampling, top=top)
        first = jax.device_get(prefix.first)
        slots = np.full((rows,), -1, np.int32)
        entered, events = {}, []
        for i, request in enumerate(group):
            request.prefill_seconds = time.perf_counter() - start
            choice = jax.tree.map(lambda a, i=i: a[i : i + 1], first)
            events.append((request, request.push(choice.token.tolist(), _logprobs(choice, request))))
            if not request.finish_reason:
                slots[i] = free.pop(0)
                entered[int(slots[i])] = request
        if entered:
            holder[0] = self.insert(prefix, holder[0], slots)
        return entered, events


def _logprobs(choices, request: Request) -> list[TokenLogprob]:
    """What a request reports of its choices, arrays [n] and [n, top]."""
    wanted = request.params.logprobs
    if wanted is None:
        return []
    return [
        TokenLogprob(
            token_id=int(token),
            logprob=float(choices.logprob[i]),
            top={int(t): float(p) for t, p in zip(choices.top_ids[i, :wanted], choices.top_logprobs[i, :wanted], strict=True)},
        )
        for i, token in enumerate(choices.token)
    ]
