"""Which programs an engine will need, found by sending requests through its slots without running anything; and compiling them early.

What is sent through are shapes: programs are traced, and zeros in the shapes of their results go on in their place. So the rules by
which an engine chooses programs are written once, in its slots.
"""

import concurrent.futures
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer.programs import Program, Programs, Signature
from jaxinfer.requests import Request
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.slots import Slot, Slots, bucket, cache_bucket
from pallas_kernels.cpu import library
from sharding.mesh import row_shards

WORKERS = 2  # programs that are compiled at the same time, at most; XLA uses several cores for one already


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """A program, and the shapes of its arguments, for which it will be called."""

    program: Program
    arguments: tuple

    @functools.cached_property
    def traced(self) -> jax.stages.Traced:
        return self.program.trace(*self.arguments)

    @property
    def shapes(self) -> Any:
        """Of the result, a tree of ShapeDtypeStructs; traced for where no executable tells them."""
        known = getattr(self.program.ready.get(self.signature), "shapes", None)
        return self.traced.out_info if known is None else known

    @property
    def signature(self) -> Signature:
        signature = self.program.signature(self.arguments)
        assert signature is not None  # of ShapeDtypeStructs
        return signature

    def compile(self) -> jax.stages.Compiled:
        return self.traced.lower().compile()


class _Recorder:
    """In place of Programs: what it is asked for is noted, and answers with zeros that take no memory."""

    def __init__(self, programs: Programs, found: Callable[[Need], None]):
        self._programs, self._found = programs, found
        self._results: dict[tuple, Any] = {}

    def __getattr__(self, name: str) -> Callable:
        def get(*static) -> Callable:
            program = getattr(self._programs, name)(*static)
            return lambda *arguments: self._call(program, arguments)

        return get

    def _call(self, program: Program, arguments: tuple):
        abstract = program.abstract(*arguments)
        key = program, program.signature(abstract)
        if key not in self._results:
            need = Need(program=program, arguments=abstract)
            self._results[key] = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), need.shapes)
            self._found(need)
        return self._results[key]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What an engine will be asked.

    prompt_tokens: lengths of prompts; all that are padded to the same bucket are meant. new_tokens: limits of requests. batches: sequences
    that run at a time. logprobs: whether alternatives are reported. scores: whether `score` is called.
    """

    prompt_tokens: tuple[int, ...] = (16,)
    new_tokens: tuple[int, ...] = (128,)
    batches: tuple[int, ...] = (1,)
    logprobs: bool = False
    scores: bool = True


class Walk:
    """Goes through what the slots of an engine do, and gives every program that they need to `found`, each once. The slots stay as they
    are."""

    def __init__(self, slots: Slots, found: Callable[[Need], None]):
        self._engine, self._programs, self.config = slots, slots.programs, slots.config
        self._recorder = _Recorder(slots.programs, found)

    def _slots(self) -> Slots:
        slots = copy.copy(self._engine)
        slots.programs = self._recorder  # type: ignore[assignment]
        slots.runs_collectives = False  # nothing is run: no turn to wait for, which a call has that waits for this walk
        slots.drop()
        return slots

    def requests(self, requests: Sequence[Request]) -> None:
        """Of requests that come at once to an engine at rest, as far as it has slots for them."""
        slots, waiting = self._slots(), list(requests)
        waiting = waiting[: slots.capacity]
        slots.fit([], waiting)
        places, running = slots.free_slots([]), dict[Slot, Request]()
        while waiting:
            count = slots.group(waiting, places)
            entering = dict(zip(places[:count], waiting[:count], strict=True))
            slots.enter(entering)
            running |= entering
            places, waiting = places[count:], waiting[count:]
        if any(request.limit > 1 for request in running.values()):
            slots.decode(running, 1)

    def traffic(self, traffic: Traffic, *, score_rows: int) -> None:
        """Of all that this traffic may bring: where several sequences run, each of them may come alone while others run.

        score_rows: prompts that an engine scores at a time, per data shard.
        """
        kinds = list(self._kinds(traffic))
        sizes: dict[tuple[int, int], None] = {}
        for kind in kinds:
            for batch in traffic.batches:
                self._serve(functools.partial(_fit, entering=[kind] * batch), kinds, traffic, sizes)
        if max(traffic.batches) > 1:
            for batch, tokens in list(sizes):
                self._grow(batch, tokens, kinds, traffic, sizes)
        if traffic.scores:
            self._score(traffic, score_rows)

    def _kinds(self, traffic: Traffic) -> Iterator[Request]:
        """One request of every padded prompt, cache and way of reporting that occur."""
        slots, longest, known = self._slots(), self.config.inference_max_tokens, set()
        for wanted in traffic.prompt_tokens:
            width = slots.prompt_bucket(min(wanted, longest))
            for new in traffic.new_tokens:
                for tokens in (
                    n for n in range(max(1, width // 2), min(width + 1, longest)) if slots.prompt_bucket(n) == width
                ):
                    limit = min(new, longest - tokens)
                    key = width, cache_bucket(tokens + limit, longest)
                    if key not in known:
                        known.add(key)
                        for top in (None, self.config.max_logprobs) if traffic.logprobs else (None,):
                            yield request_of([0] * tokens, limit, logprobs=top)

    def _serve(self, fit: Callable[[Slots], None], kinds: Sequence[Request], traffic: Traffic, sizes: dict) -> None:
        """In a state that `fit` makes: every kind enters in every number, all decode, one is stopped."""
        slots = self._slots()
        fit(slots)
        if (slots.batch, slots.tokens) in sizes:
            return
        sizes[slots.batch, slots.tokens] = None
        places = slots.free_slots([])
        most = min(max(traffic.batches), len(places))
        for kind in kinds:
            if len(kind.prompt) + kind.limit > slots.tokens:
                continue
            for rows in {bucket(n, 1, most) for n in range(1, most + 1)}:
                entering = [kind] * rows
                slots.enter(dict(zip(places, entering[: slots.group(entering, places)], strict=False)))
            if kind.limit > 1:
                slots.decode({places[0]: kind}, 1)
        slots.free(places[0])

    def _grow(self, batch: int, tokens: int, kinds: Sequence[Request], traffic: Traffic, sizes: dict) -> None:
        """From a state of this size, when more come while some run, and so on from there."""
        before = next(k for k in kinds if len(k.prompt) + k.limit <= tokens)
        for kind in kinds:
            for more in {1, max(traffic.batches) - 1}:
                grown: list[Slots] = []

                def fit(slots: Slots, kind=kind, more=more, grown=grown) -> None:
                    slots.state = slots.programs.state(batch, tokens)()
                    slots.batch, slots.tokens = batch, tokens
                    slots.fit([before], [kind] * more)
                    grown.append(slots)

                known = len(sizes)
                self._serve(fit, kinds, traffic, sizes)
                if len(sizes) > known:
                    self._grow(grown[0].batch, grown[0].tokens, kinds, traffic, sizes)

    def _score(self, traffic: Traffic, rows: int) -> None:
        slots, longest, data = self._slots(), self.config.inference_max_tokens, row_shards(self._programs.mesh)
        for tokens in traffic.prompt_tokens:
            width = max(2, slots.prompt_bucket(min(tokens, longest)))
            for count in {bucket(n, 1, rows) * data for n in range(1, rows + 1)}:
                prompts = np.zeros((count, width), np.int32), np.ones((count,), np.int32)
                self._recorder.score()(self._programs.shapes, *prompts)


def _fit(slots: Slots, entering: Sequence[Request]) -> None:
    slots.fit([], entering)


def request_of(prompt: list[int], limit: int, *, logprobs: int | None = None) -> Request:
    """A request for `limit` tokens, as an engine makes it."""
    params = SamplingParams(max_tokens=limit, logprobs=logprobs)
    return Request(prompt, params, limit=limit, stop_tokens=(), tokenizer=None)


def workers() -> int:
    """Threads that make programs ready: one fewer than cores, so that what comes first does not wait for what comes later."""
    return min(WORKERS, max(1, library.cores() - 1))


def prepare(slots: Slots, requests: Sequence[Request]) -> concurrent.futures.Future[None]:
    """Compile, or load, in other threads what these requests will need, the first need first; a call meanwhile waits for what it needs.

    The result is there once all of it is under way.
    """
    pool = concurrent.futures.ThreadPoolExecutor(workers(), thread_name_prefix="compile")

    def found(need: Need) -> None:
        if ready := need.program.ready.get(need.signature):
            pool.submit(ready.result)
        elif need.signature not in need.program.met:
            need.program.ready[need.signature] = pool.submit(need.compile)

    def walk() -> None:
        try:
            Walk(slots, found).requests(requests)
        finally:
            pool.shutdown(wait=False)

    tracing, coming = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="trace"), slots.programs.coming
    started = tracing.submit(walk)
    coming.append(started)
    started.add_done_callback(coming.remove)
    tracing.shutdown(wait=False)
    return started
