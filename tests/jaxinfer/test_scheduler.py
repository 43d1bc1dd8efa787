"""The scheduler on a device that counts: no model, so order, slots, cancelling and failures can be forced."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import pytest

from jaxinfer import scheduler as scheduler_module
from jaxinfer.errors import EngineStateError
from jaxinfer.requests import Delta, Request
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduler import FEWEST_STEPS, MOST_STEPS, STEPS, Emission, Scheduler, Ticket


class Counter:
    """Every sequence counts up from its prompt's first token. Slots are letters; whatever breaks the contract fails a test."""

    def __init__(self, capacity: int = 3):
        self.capacity = capacity
        self.held: dict[str, tuple[Request, int]] = {}
        self.steps: list[int] = []
        self.groups: list[int] = []
        self.fails: Callable[[str], None] = lambda call: None
        self.busy = threading.Lock()

    def fit(self, running: Sequence[Request], entering: Sequence[Request]) -> None:
        assert len(running) + len(entering) <= self.capacity and entering
        self.fails("fit")

    def free_slots(self, taken: Sequence[str]) -> list[str]:
        assert set(self.held) == set(taken)
        return [c for c in "abcdefgh"[: self.capacity] if c not in taken]

    def group(self, waiting: Sequence[Request], slots: Sequence[str]) -> int:
        assert len(waiting) <= len(slots)
        return min(2, len(waiting))

    def enter(self, requests: Mapping[str, Request]) -> Mapping[str, Emission]:
        self.groups.append(len(requests))
        self.fails("enter")
        out = {}
        for slot, request in requests.items():
            assert slot not in self.held
            ended = request.limit == 1
            if not ended:
                self.held[slot] = (request, 1)
            out[slot] = Emission(tokens=[request.prompt[0]], logprobs=[], ended=ended)
        return out

    def decode(self, running: Mapping[str, Request], steps: int) -> Mapping[str, Emission]:
        assert self.busy.acquire(blocking=False), "two turns at once"
        self.steps.append(steps)
        self.fails("decode")
        out = {}
        for slot, request in running.items():
            known, done = self.held[slot]
            assert known is request
            count = min(steps, request.limit - done)
            tokens = [request.prompt[0] + done + i for i in range(count)]
            ended = done + count == request.limit
            if ended:
                del self.held[slot]
            else:
                self.held[slot] = (request, done + count)
            out[slot] = Emission(tokens=tokens, logprobs=[], ended=ended)
        self.busy.release()
        return out

    def free(self, slot: str) -> None:
        del self.held[slot]

    def drop(self) -> None:
        self.held.clear()
        if self.busy.locked():
            self.busy.release()


def ask(first: int, tokens: int, every: int | None = None) -> tuple[Ticket, queue.SimpleQueue]:
    box: queue.SimpleQueue[Delta | BaseException] = queue.SimpleQueue()
    request = Request([first], SamplingParams(max_tokens=tokens), limit=tokens, stop_tokens=(), tokenizer=None)
    return Ticket(request=request, deliver=box.put, every=every), box


def at_rest(scheduler: Scheduler) -> bool:
    """Waits for the thread to end; whether nothing is left."""
    deadline = time.monotonic() + 5
    while scheduler._thread is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    return scheduler._thread is None and scheduler.load == (0, 0)


def test_all_are_served_in_order() -> None:
    device = Counter()
    scheduler = Scheduler(device)
    asked = [ask(10 * i, 1 + 17 * i % 40) for i in range(9)]
    scheduler.submit([ticket for ticket, _ in asked])
    for i, (ticket, box) in enumerate(asked):
        result = box.get(timeout=5).result
        assert result.token_ids == [10 * i + n for n in range(ticket.request.limit)]
        assert box.empty()
    assert at_rest(scheduler) and not device.held
    assert max(device.steps) <= MOST_STEPS and max(device.groups) == 2


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.0, MOST_STEPS), (0.002, 75), (0.01, 15), (1.0, FEWEST_STEPS)], ids=lambda value: str(value)
)
def test_a_turn_is_as_long_as_its_tokens_allow(monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int) -> None:
    """The more a token takes, the fewer come between two looks at the queue; processes that must take the same turns do not measure."""
    now = 0.0

    class Slow(Counter):
        def decode(self, running: Mapping[str, Request], steps: int) -> Mapping[str, Emission]:
            nonlocal now
            out = super().decode(running, steps)
            now += seconds * max(len(emission.tokens) for emission in out.values())
            return out

    monkeypatch.setattr(scheduler_module.time, "perf_counter", lambda: now)
    for agree, others in ((None, steps), (lambda mine: mine, STEPS)):
        device = Slow()
        scheduler = Scheduler(device, agree=agree)
        ticket, box = ask(0, 400)
        scheduler.submit([ticket])
        assert len(box.get(timeout=5).result.token_ids) == 400
        assert device.steps[0] == STEPS and set(device.steps[1:-1]) == {others}
    assert at_rest(scheduler)


def test_pieces() -> None:
    """A stream gets its pieces as they come; who wants the end alone gets one delivery."""
    scheduler = Scheduler(Counter())
    (stream, pieces), (whole, box) = ask(0, 7, every=2), ask(50, 20)
    scheduler.submit([whole, stream])
    assert len(box.get(timeout=5).result.token_ids) == 20
    got = []
    while not got or got[-1].result is None:
        got.append(pieces.get(timeout=5))
    assert [delta.token_ids for delta in got] == [[0], [1, 2], [3, 4], [5, 6]]


def test_cancelled_requests_leave_their_slots() -> None:
    device = Counter()
    scheduler = Scheduler(device)
    reached, go = threading.Event(), threading.Event()

    def hold(call: str) -> None:
        if call == "decode":
            reached.set()
            assert go.wait(5)

    device.fails = hold
    asked = [ask(i, 1000) for i in range(4)] + [ask(70, 3)]  # the fourth waits
    scheduler.submit([ticket for ticket, _ in asked])
    assert reached.wait(5)
    scheduler.cancel([ticket for ticket, _ in asked[:4]])
    go.set()
    assert asked[4][1].get(timeout=5).result.token_ids == [70, 71, 72]
    assert at_rest(scheduler) and not device.held
    assert all(box.empty() for _, box in asked[:4])


@pytest.mark.parametrize("tokens", [1, 5])
def test_cancelled_in_the_turn_that_ends_it(tokens: int) -> None:
    """The device has let go of the slot already: it is not freed again, and nobody else is disturbed."""
    device = Counter(2)
    scheduler = Scheduler(device)
    ending, box = ask(0, tokens)
    device.fails = lambda call: scheduler.cancel([ending]) if call == ("enter" if tokens == 1 else "decode") else None
    other, rest = ask(50, 90)
    scheduler.submit([ending, other])
    assert rest.get(timeout=5).result.token_ids == [*range(50, 140)]
    assert at_rest(scheduler) and not device.held and box.empty()


@pytest.mark.parametrize("call", ["fit", "enter", "decode"])
def test_failures_reach_those_who_wait(call: str) -> None:
    device = Counter()
    scheduler = Scheduler(device)
    left = [1]

    def once(which: str) -> None:
        if which == call and left:
            left.pop()
            raise RuntimeError("broken")

    device.fails = once
    asked = [ask(10 * i, 50) for i in range(5)]
    scheduler.submit([ticket for ticket, _ in asked])
    answers = [box.get(timeout=5) for _, box in asked]
    broken = [str(a) == "broken" for a in answers if isinstance(a, RuntimeError)]
    assert broken and all(broken) and len(broken) < 5  # those in it, and not those behind
    assert at_rest(scheduler) and not device.held


def test_a_receiver_that_is_gone_is_cancelled() -> None:
    device = Counter(1)
    scheduler = Scheduler(device)
    gone, _ = ask(0, 1000, every=1)

    def deliver(_: object) -> None:
        raise RuntimeError("the event loop is closed")

    gone.deliver = deliver
    after, box = ask(5, 2)
    scheduler.submit([gone, after])
    assert box.get(timeout=5).result.token_ids == [5, 6]
    assert at_rest(scheduler) and len(device.steps) < 10


def test_pause_and_close() -> None:
    device = Counter()
    scheduler = Scheduler(device)
    asked = [ask(i, 10_000) for i in range(2)]
    device.fails = lambda call: time.sleep(0.001)
    scheduler.submit([ticket for ticket, _ in asked])
    for _ in range(3):
        with scheduler.paused():
            before = len(device.steps)
            time.sleep(0.01)
            assert len(device.steps) == before
    scheduler.close("closed for the night")
    for _, box in asked:
        with pytest.raises(EngineStateError, match="closed for the night"):
            raise box.get(timeout=5)
    with pytest.raises(EngineStateError, match="closed for the night"):
        scheduler.submit([ask(0, 1)[0]])
    assert at_rest(scheduler) and not device.held


def test_many_threads() -> None:
    """Requests from eight threads, some cancelled at odd moments: who was not gets all of its tokens."""
    device = Counter(4)
    scheduler = Scheduler(device)
    wrong: list[object] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            first, count = rng.randrange(1000), rng.randint(1, 90)
            ticket, box = ask(first, count, every=rng.choice([None, 1, 5]))
            scheduler.submit([ticket])
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.002)
                scheduler.cancel([ticket])
                continue
            item = box.get(timeout=10)
            while isinstance(item, Delta) and item.result is None:
                item = box.get(timeout=10)
            if not isinstance(item, Delta) or item.result.token_ids != [*range(first, first + count)]:  # type: ignore[union-attr]
                wrong.append(item)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert at_rest(scheduler) and not device.held
