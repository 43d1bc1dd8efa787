"""Who runs when: one thread per engine that gives waiting requests free slots, lets the device decode, and hands out what is final.

Host only, without jax: what a slot is, and what happens in it, is behind `Device`. Requests come from any thread and may be cancelled
from any; the thread lives while there is work, so an engine that is idle holds none.
"""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxinfer.errors import EngineStateError
from jaxinfer.requests import Delta, Request, TokenLogprob

# Tokens between two looks at the queue: as many as take TURN_SECONDS, which is short to wait for and long beside the 2 ms that a turn
# costs the host; STEPS as long as nobody knows how long a token takes, and where several processes must take the same turns.
STEPS, FEWEST_STEPS, MOST_STEPS = 32, 8, 128
TURN_SECONDS = 0.15
STOP_STEPS = 16  # where stop strings, which the device does not know, may end a text any time

Slot = Any  # hashable, and the same for as long as a sequence runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emission:
    """New tokens of one slot, with their log-probabilities where asked for. ended: the device runs it no further."""

    tokens: list[int]
    logprobs: list[TokenLogprob]
    ended: bool


class Device(Protocol):
    """The slots of an engine: what runs on its devices."""

    @property
    def capacity(self) -> int:
        """Sequences that it could hold at most."""
        ...

    def fit(self, running: Sequence[Request], entering: Sequence[Request]) -> None:
        """Make room for all of them; slots of running sequences keep their names. `running` empty: nothing there is needed any more."""
        ...

    def free_slots(self, taken: Sequence[Slot]) -> list[Slot]: ...

    def group(self, waiting: Sequence[Request], slots: Sequence[Slot]) -> int:
        """How many of the first waiting requests are best read together, at least 1; there are as many slots or more."""
        ...

    def enter(self, requests: Mapping[Slot, Request]) -> Mapping[Slot, Emission]:
        """Read prompts into slots and choose their first tokens."""
        ...

    def decode(self, running: Mapping[Slot, Request], steps: int) -> Mapping[Slot, Emission]:
        """Up to `steps` tokens for each."""
        ...

    def free(self, slot: Slot) -> None:
        """Stop the sequence in a slot."""
        ...

    def drop(self) -> None:
        """Forget all sequences: something went wrong, and what they hold is not to be trusted."""
        ...


@dataclasses.dataclass(eq=False, kw_only=True)
class Ticket:
    """A request on its way. deliver(Delta or exception): called in the scheduler's thread. every: tokens between two pieces, at most;
    None: only the last piece, with the result, is delivered."""

    request: Request
    deliver: Callable[[Delta | BaseException], None]
    every: int | None = None
    cancelled: bool = False
    number: int = -1  # among all that were submitted

    def give(self, item: Delta | BaseException) -> None:
        """Deliver; a receiver that has gone away cancels its request."""
        try:
            self.deliver(item)
        except Exception:
            self.cancelled = True


class Scheduler:
    """First come, first served, in as many slots as the device has.

    agree: where several processes run one device together, each with a scheduler that gets the same requests in the same order: what
    process 0 says, given what each says. The device's turns are the same everywhere then: a request takes part once it has come on
    process 0, and is cancelled when it is there.
    """

    def __init__(self, device: Device, *, name: str = "jaxinfer", agree: Callable[[Any], Any] | None = None):
        self._device, self._name, self._agree = device, name, agree
        self._submitted = 0
        self._known, self._gone = (
            0,
            frozenset[int](),
        )  # of the turn, where it is agreed on: tickets that have come, and that are cancelled
        self._queue: collections.deque[Ticket] = collections.deque()
        self._running: dict[Slot, Ticket] = {}
        self._lock = threading.Lock()  # of what is below; never held while the device works
        self._resumed = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._turn = threading.Lock()  # held while the device works
        self._pauses = 0  # who waits for the turn from outside; a lock alone would go back to the thread that just let it go
        self._step_seconds: float | None = None  # of the last turn
        self._thread: threading.Thread | None = None
        self._closed: str | None = None

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue requests. Raises EngineStateError after `close`."""
        with self._lock:
            if self._closed is not None:
                raise EngineStateError(self._closed)
            for ticket in tickets:
                ticket.number, self._submitted = self._submitted, self._submitted + 1
            self._queue.extend(tickets)
            self._resumed.notify_all()
            if self._thread is None and self._queue:
                self._thread = threading.Thread(target=self._work, name=self._name)
                self._thread.start()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Stop requests as soon as the device comes back; nothing more is delivered for them."""
        for ticket in tickets:
            ticket.cancelled = True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While inside, the device does nothing for requests; they go on afterwards. With others: once all that have come are done."""
        with self._lock:
            if self._agree is not None:
                self._idle.wait_for(lambda: not self._queue and not self._running)
            self._pauses += 1
        try:
            with self._turn:
                yield
        finally:
            with self._lock:
                self._pauses -= 1
                self._resumed.notify_all()

    def close(self, reason: str) -> None:
        """Fail what is queued or runs with an EngineStateError of this reason, and wait until the device is at rest."""
        with self._lock:
            self._closed = reason
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that wait, and that run."""
        return len(self._queue), len(self._running)

    # --- the thread

    def _work(self) -> None:
        while True:
            with self._lock:
                self._resumed.wait_for(lambda: not self._pauses)
                if not self._queue and not self._running:
                    self._thread = None
                    self._idle.notify_all()
                    return
                closed = self._closed
            if closed is None and not threading.main_thread().is_alive():
                closed = "the program is ending"
            with self._turn:
                if closed is not None:
                    self._fail([*self._running.values(), *self._take(len(self._waiting()))], EngineStateError(closed))
                    self._forget()
                else:
                    self._step()

    def _step(self) -> None:
        """One turn of the device: who was cancelled leaves, who waits enters, all decode."""
        try:
            self._agree_on_turn()
            for slot in [s for s, ticket in self._running.items() if self._left(ticket)]:
                self._leave(slot)
            self._admit()
            if self._running:
                self._decode()
        except BaseException as error:
            # the device's arrays were given away and did not come back: nobody there can go on
            self._fail(list(self._running.values()), error)
            self._forget()

    def _admit(self) -> None:
        while waiting := self._waiting()[: self._device.capacity - len(self._running)]:
            taken: list[Ticket] = []
            try:
                self._device.fit([t.request for t in self._running.values()], [t.request for t in waiting])
                slots = self._device.free_slots(list(self._running))
                taken = self._take(self._device.group([t.request for t in waiting], slots))
                entering = dict(zip(slots, taken, strict=False))
                start = time.perf_counter()
                emitted = self._device.enter({slot: ticket.request for slot, ticket in entering.items()})
                for ticket in taken:
                    ticket.request.prefill_seconds = time.perf_counter() - start
            except BaseException as error:
                self._fail(taken or self._take(1), error)
                raise
            self._running |= entering
            self._push(emitted)

    def _agree_on_turn(self) -> None:
        """Find out which tickets take part, and wait until they have come here too."""
        if self._agree is None:
            return
        with self._lock:
            mine = self._submitted, [t.number for t in (*self._queue, *self._running.values()) if t.cancelled]
        self._known, gone = self._agree(mine)
        self._gone = frozenset(gone)
        with self._lock:
            self._resumed.wait_for(lambda: self._submitted >= self._known)

    def _left(self, ticket: Ticket) -> bool:
        """Whether a ticket is cancelled as far as the device goes."""
        return ticket.cancelled if self._agree is None else ticket.number in self._gone

    def _waiting(self) -> list[Ticket]:
        with self._lock:
            self._queue = collections.deque(t for t in self._queue if not self._left(t))
            return [t for t in self._queue if self._agree is None or t.number < self._known]

    def _take(self, count: int) -> list[Ticket]:
        with self._lock:
            return [self._queue.popleft() for _ in range(count)]

    def _decode(self) -> None:
        tickets = self._running.values()
        steps = max(t.request.limit - len(t.request.token_ids) for t in tickets)
        stops = any(t.request.params.stop for t in tickets)
        steps = min([steps, self._steps(), *([STOP_STEPS] if stops else []), *(t.every for t in tickets if t.every)])
        start = time.perf_counter()
        emitted = self._device.decode({slot: t.request for slot, t in self._running.items()}, steps)
        taken = max(len(emission.tokens) for emission in emitted.values())
        if taken:
            self._step_seconds = (time.perf_counter() - start) / taken
        self._push(emitted)

    def _steps(self) -> int:
        if self._agree is not None or self._step_seconds is None:
            return STEPS
        return max(FEWEST_STEPS, min(MOST_STEPS, round(TURN_SECONDS / max(self._step_seconds, 1e-9))))

    def _push(self, emitted: Mapping[Slot, Emission]) -> None:
        for slot, emission in emitted.items():
            ticket = self._running[slot]
            if self._left(ticket):  # cancelled meanwhile
                self._leave(slot, ended=emission.ended)
                continue
            if not emission.tokens:
                continue
            try:
                delta = ticket.request.push(emission.tokens, emission.logprobs)
            except Exception as error:  # of this text alone
                ticket.give(error)
                self._leave(slot, ended=emission.ended)
                continue
            if delta.result is not None:
                self._leave(
                    slot, ended=emission.ended
                )  # it has not where a stop string, which the device does not know, was found
            if delta.result is not None or ticket.every is not None:
                ticket.give(delta)

    def _leave(self, slot: Slot, *, ended: bool = False) -> None:
        """ended: the device has let go of the slot already."""
        del self._running[slot]
        if not ended:
            self._device.free(slot)

    def _fail(self, tickets: Sequence[Ticket], error: BaseException) -> None:
        for ticket in tickets:
            if not ticket.cancelled:
                ticket.give(error)
                ticket.cancelled = True

    def _forget(self) -> None:
        self._running.clear()
        self._device.drop()
