"""The slots of an engine: the state on the devices, and how requests get into it and tokens out of it.

Shapes are few, so that programs are: prompts are padded to a power of two tokens, batches to a power of two rows, caches to a power of
two tokens or one and a half of it, and one decode program serves every number of steps.
"""

import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.generation import State
from jaxinfer.layout import Plan
from jaxinfer.memory import MemoryPlan, explained
from jaxinfer.models.decoder import DecoderWeights
from jaxinfer.programs import Programs
from jaxinfer.requests import Request, token_logprobs
from jaxinfer.sampling import NumberedProcessors, Processors, SamplingArrays
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduler import Emission
from sharding.distributed import fetch

SMALLEST_BUCKET = 16  # tokens of a prompt
SMALLEST_CACHE = 128  # tokens of a cache row

# Two programs with collectives, started by two threads on the same devices, could wait for each other for ever.
COLLECTIVES = threading.Lock()


def bucket(size: int, smallest: int, largest: int) -> int:
    """The power of two times `smallest` that holds `size`, at most `largest`."""
    out = smallest
    while out < size:
        out *= 2
    return min(out, largest)


def cache_bucket(size: int, largest: int) -> int:
    """Like `bucket` with steps half as wide: attention reads as much of a row as its cache can hold."""
    out = bucket(size, SMALLEST_CACHE, largest)
    between = out // 4 * 3
    return between if size <= between and out > SMALLEST_CACHE else out


class Slot(NamedTuple):
    """A place for a sequence: its micro-batch, its data shard, its row there. It stays the same when the state grows."""

    micro_batch: int
    shard: int
    row: int


class Slots:
    """One state, made for the requests at hand, and made larger when more come while some run.

    params: the weights at the time of a call. data: shards of the batch. memory: how many prompts are read together, and what is said when
    it runs out. processors: the users' functions that requests brought.
    """

    def __init__(
        self,
        programs: Programs,
        plan: Plan,
        config: EngineConfig,
        params: Callable[[], DecoderWeights],
        *,
        data: int,
        memory: MemoryPlan | None = None,
    ):
        self.programs, self.plan, self.config, self._params, self._data = programs, plan, config, params, data
        self.memory = memory
        self.processors = Processors(plan.config.vocab)
        self.state: State | None = None
        self.batch, self.tokens = 0, 0  # sequences per micro-batch and data shard; tokens of each
        self.runs_collectives = data * plan.context.stages > 1 or bool(plan.context.tensor)

    @property
    def capacity(self) -> int:
        return self.config.micro_batch_size * self.plan.context.stages * self._data

    def fit(self, running: Sequence[Request], entering: Sequence[Request]) -> None:
        most, longest = self.config.micro_batch_size, self.config.inference_max_tokens
        requests = [*running, *entering]
        tokens = cache_bucket(max(len(r.prompt) + r.limit for r in requests), longest)
        batch = bucket(-(-len(requests) // (self.plan.context.stages * self._data)), 1, most)
        if self.config.batch_invariant:
            batch, tokens = most, longest  # the shapes of a sequence's arithmetic do not depend on others
        if not running:
            if self.state is None or (batch, tokens) != (self.batch, self.tokens):
                self.drop()  # before the new one is made
                self.state = self._run(self.programs.state(batch, tokens))
                self.batch, self.tokens = batch, tokens
        elif batch > self.batch or tokens > self.tokens:
            # to the whole width at once: who comes while others run is seldom the last one, and every size is a program
            batch, tokens = most if batch > self.batch else self.batch, max(tokens, self.tokens)
            self._grow(batch, tokens)

    def _grow(self, batch: int, tokens: int) -> None:
        """Each layer's old cache goes before the next one's new cache comes: the plan has room for one of them beside the state."""
        assert self.state is not None  # something runs
        caches, rest = list(self.state.caches), dataclasses.replace(self.state, caches=())
        self.state = None
        grow = self.programs.grow_cache(batch, tokens)
        for i in range(len(caches)):
            caches[i] = jax.block_until_ready(self._run(grow, caches[i]))
        rest = self._run(self.programs.grow(batch, tokens), rest)
        self.state = dataclasses.replace(rest, caches=tuple(caches))
        self.batch, self.tokens = batch, tokens

    def free_slots(self, taken: Sequence[Slot]) -> list[Slot]:
        M, used = self.plan.context.stages, set(taken)
        every = (Slot(m, d, row) for row in range(self.batch) for m in range(M) for d in range(self._data))
        return [slot for slot in every if slot not in used]

    def group(self, waiting: Sequence[Request], slots: Sequence[Slot]) -> int:
        """Neighbours in the queue whose prompts are padded to the same size, as many as memory holds, where samples of one request are read
        once; or one at a time where the batch must not matter."""
        if self.config.batch_invariant:
            return 1
        widths = [self.prompt_bucket(len(r.prompt)) for r in waiting[: len(slots)]]
        alike = next((i for i, width in enumerate(widths) if width != widths[0]), len(widths))
        most = self._data * self.memory.prefill_rows(widths[0]) if self.memory else alike
        read = [i if request.source is None else request.source for i, request in enumerate(waiting[:alike])]
        return next((i for i in range(most, alike) if len(set(read[: i + 1])) > most), alike)

    def prompt_bucket(self, tokens: int) -> int:
        return bucket(tokens, SMALLEST_BUCKET, self.config.inference_max_tokens)

    def enter(self, requests: Mapping[Slot, Request]) -> Mapping[Slot, Emission]:
        return self._read(requests, {slot: request.prompt for slot, request in requests.items()})

    def _read(self, requests: Mapping[Slot, Request], ids: Mapping[Slot, Sequence[int]]) -> dict[Slot, Emission]:
        """Read prompts, with the text that they have so far, into slots and choose a token for each."""
        place, rows = self._rows({slot: slot for slot in requests})
        row, width = self._rows({slot: request.source or slot for slot, request in requests.items()})
        shared = width < rows
        row, width = (row, width) if shared else (place, rows)
        tokens, lengths = padded({row[slot]: ids[slot] for slot in requests}, width * self._data, self.prompt_bucket)
        numbers, continues = np.full((rows * self._data,), -1, np.int32), np.zeros((rows * self._data,), np.int32)
        by_row: list[tuple[Request, int] | None] = [None] * (rows * self._data)
        for slot, request in requests.items():
            numbers[place[slot]], continues[place[slot]] = self._number(slot), row[slot] % width
            by_row[place[slot]] = request, len(ids[slot]) - len(request.prompt)
        sampling = SamplingArrays.of(
            [r[0].params if r else SamplingParams() for r in by_row],
            [self._limit(*r) if r else 0 for r in by_row],
            [r[0].stop_tokens if r else () for r in by_row],
            len(by_row),
            self.processors,
            said=[r[1] if r else 0 for r in by_row],
        )
        prompts = self._alternatives(r.params.prompt_logprobs for r in requests.values() if not r.token_ids)
        read = self.programs.prefill(self._top(requests.values()), prompts, self._used(requests.values()), shared)
        prefix = self._run(read, self._params(), tokens, lengths, sampling, *([continues] if shared else []))
        self.state = self._run(self.programs.insert(), dataclasses.replace(prefix, prompt=None), self.state, numbers)
        first, prompt = self._get((prefix.first, prefix.prompt))
        out = {}
        for slot, request in requests.items():
            at = place[slot]
            choice = jax.tree.map(lambda a, at=at: a[at : at + 1], first)
            said = len(ids[slot]) - len(request.prompt) + 1
            ended = request.limit <= said or int(choice.token[0]) in request.stop_tokens
            logprobs = token_logprobs(choice, request.params.logprobs)
            out[slot] = Emission(tokens=choice.token.tolist(), logprobs=logprobs, ended=ended)
            if request.params.prompt_logprobs is not None and said == 1:
                own = jax.tree.map(lambda a, at=row[slot]: a[at], prompt)
                reported = token_logprobs(own, request.params.prompt_logprobs)
                request.prompt_logprobs = [None, *reported[1 : len(request.prompt)]]
        return out

    def _rows(self, key_of: Mapping[Slot, Hashable]) -> tuple[dict[Slot, int], int]:
        """(the row of each slot in arrays [data shards * rows], rows): one for each key in the slot's data shard."""
        by_shard = [dict[Hashable, int]() for _ in range(self._data)]
        local = {slot: by_shard[slot.shard].setdefault(key, len(by_shard[slot.shard])) for slot, key in key_of.items()}
        rows = bucket(max(map(len, by_shard)), 1, 1 << 30)
        return {slot: slot.shard * rows + row for slot, row in local.items()}, rows

    def _limit(self, request: Request, said: int) -> int:
        """Tokens of its text after which a sequence with `said` of them is over, or must be read again."""
        rope = self.plan.config.attention.rope
        if rope is None or not rope.read_again:
            return request.limit
        crossing = rope.original_positions + 1 - len(request.prompt)
        return min(request.limit, crossing) if said < crossing else request.limit

    def decode(self, running: Mapping[Slot, Request], steps: int) -> Mapping[Slot, Emission]:
        run = self.programs.decode(self._top(running.values()), self._used(running.values()))
        self.state, emitted = self._run(run, self._params(), self.state, np.int32(steps))
        emitted = self._get(emitted)
        out = {}
        for slot, request in running.items():
            m, b = slot.micro_batch, slot.shard * self.batch + slot.row
            choices = jax.tree.map(lambda a, m=m, b=b: a[m, b, : emitted.counts[m, b]], emitted.choices)
            tokens, logprobs = choices.token.tolist(), token_logprobs(choices, request.params.logprobs)
            out[slot] = Emission(tokens=tokens, logprobs=logprobs, ended=bool(emitted.done[m, b]))
            text = request.token_ids + tokens
            if out[slot].ended and text[-1] not in request.stop_tokens and len(text) < request.limit:
                more = self._read({slot: request}, {slot: request.prompt + text})[slot]
                out[slot] = Emission(tokens=tokens + more.tokens, logprobs=logprobs + more.logprobs, ended=more.ended)
        return out

    def free(self, slot: Slot) -> None:
        numbers = np.full((self._data,), -1, np.int32)
        numbers[slot.shard] = self._number(slot)
        self.state = self._run(self.programs.free(), self.state, numbers)

    def drop(self) -> None:
        self.state, self.batch, self.tokens = None, 0, 0

    def _number(self, slot: Slot) -> int:
        """Of a slot among those of its data shard, as the programs count them."""
        return slot.micro_batch * self.batch + slot.row

    def _top(self, requests: Iterable[Request]) -> int:
        return self._alternatives(r.params.logprobs for r in requests) or 0

    def _alternatives(self, wanted: Iterable[int | None]) -> int | None:
        """What the program reports of each token: nothing, its log-probability, or as many alternatives as any request may ask for."""
        numbers = [n for n in wanted if n is not None]
        return self.config.max_logprobs if any(numbers) else 0 if numbers else None

    def _used(self, requests: Iterable[Request]) -> NumberedProcessors:
        return self.processors.used(r.params.logits_processor for r in requests)

    def _run(self, program: Callable, *arguments):
        with explained(self.memory):
            if not self.runs_collectives:
                return program(*arguments)
            with COLLECTIVES:
                return jax.block_until_ready(program(*arguments))

    def _get(self, tree):
        """What a program gave, on the host."""
        with explained(self.memory):
            return fetch(tree)


def padded(prompts: Mapping[int, Sequence[int]], rows: int, width: Callable[[int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts by row -> ids int32 [rows, width of the longest], padded on the right, and lengths int32 [rows], 1 for an unused row."""
    tokens = np.zeros((rows, width(max(map(len, prompts.values())))), np.int32)
    lengths = np.ones((rows,), np.int32)
    for row, prompt in prompts.items():
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths
