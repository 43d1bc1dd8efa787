"""Which layers go to which stage of a pipeline: exact, by dynamic programming over contiguous runs.

A tick lasts as long as the longest stage, so that is minimised first; then the bytes of the largest stage, since every device has the
shapes of the largest; then the sum of squares of the loads, which makes the others alike; what is still equal goes to earlier stages.
`partition` takes a limit of memory for each stage by itself, `stage_plans` takes slots: every device has all of them.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

from sharding.errors import MeshError

_EQUAL = 1e-9  # relative: sums of floats in another order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """counts: layers of each stage, in order. loads: their cost over the stage's speed, ends included. nbytes: of each stage's layers."""

    counts: tuple[int, ...]
    loads: tuple[float, ...]
    nbytes: tuple[float, ...]

    @property
    def longest(self) -> float:
        return max(self.loads)

    @property
    def spread(self) -> float:
        """How much longer the longest stage is than the mean, 0.02 for two percent."""
        return self.longest * len(self.loads) / sum(self.loads) - 1


def partition(
    costs: Sequence[float],
    stages: int,
    *,
    nbytes: Sequence[float] | None = None,
    capacity: float | Sequence[float] | None = None,
    speeds: Sequence[float] | None = None,
    first: float = 0.0,
    last: float = 0.0,
    most: int | Mapping[Hashable, int] | None = None,
    kinds: Sequence[Hashable] | None = None,
) -> Partition:
    """The layers in order over the stages, at least one each, with the shortest longest stage.

    costs: of each layer. nbytes: likewise, 0 by default. capacity: bytes of layers that a stage may hold, one for all or one each. speeds:
    of each stage's devices, 1 by default; a cost is divided by it. first, last: cost of what only the first and the last stage do. most:
    layers of a stage, at most; or of those of a kind, where `kinds` says of which each layer is. Raises MeshError where no partition fits,
    ValueError for numbers that are none.

    stages * L^2 steps three times, for L layers.
    """
    L = len(costs)
    size = list(nbytes) if nbytes is not None else [0.0] * L
    speed = list(speeds) if speeds is not None else [1.0] * stages
    room = list(capacity) if isinstance(capacity, Sequence) else [math.inf if capacity is None else capacity] * stages
    if len(size) != L or len(speed) != stages or len(room) != stages:
        raise ValueError(
            f"{len(size)} sizes for {L} layers, {len(speed)} speeds and {len(room)} capacities for {stages} stages"
        )
    if any(not 0 <= c < math.inf for c in (*costs, *size, first, last)) or any(not 0 < v < math.inf for v in speed):
        raise ValueError("costs and bytes are finite and not negative, speeds are above 0")
    if not 1 <= stages <= L:
        raise MeshError(f"{stages} pipeline stages for {L} layers; use at most one stage a layer")
    cost_sums, size_sums = _sums(costs), _sums(size)
    limits = _limits(most, kinds, L)

    def load(s: int, i: int, j: int) -> float:
        ends = (first if s == 0 else 0.0) + (last if s == stages - 1 else 0.0)
        return (cost_sums[j] - cost_sums[i] + ends) / speed[s]

    def held(i: int, j: int) -> float:
        return size_sums[j] - size_sums[i]

    def fits(s: int, i: int, j: int) -> bool:
        for sums, limit in limits:  # most of what is asked goes no further
            if sums[j] - sums[i] > limit:
                return False
        return held(i, j) <= room[s] * (1 + _EQUAL)

    longest = _best(L, stages, lambda s, i, j: load(s, i, j) if fits(s, i, j) else math.inf, max)[0][0]
    if longest == math.inf:
        raise MeshError(
            f"{L} layers of {held(0, L):.4g} bytes do not fit on {stages} stages of at most {L if most is None else most} layers and "
            f"{max(room):.4g} bytes; use more stages, fewer bits, or a larger tensor axis"
        )
    short = longest * (1 + _EQUAL)
    within = lambda s, i, j: fits(s, i, j) and load(s, i, j) <= short
    largest = _best(L, stages, lambda s, i, j: held(i, j) if within(s, i, j) else math.inf, max)[0][0] * (1 + _EQUAL)
    square = lambda s, i, j: load(s, i, j) ** 2 if within(s, i, j) and held(i, j) <= largest else math.inf
    table = _best(L, stages, square, lambda a, b: a + b)
    counts, i = [], 0
    for s in range(stages):
        rest = lambda j, s=s, i=i: square(s, i, j) + (table[s + 1][j] if s + 1 < stages else (0.0 if j == L else math.inf))
        ends = range(L - (stages - 1 - s), i, -1)
        least = min(rest(j) for j in ends)
        j = next(j for j in ends if rest(j) <= least * (1 + _EQUAL))  # the longest first
        counts.append(j - i)
        i = j
    bounds = [0, *(sum(counts[: s + 1]) for s in range(stages))]
    pairs = list(itertools.pairwise(bounds))
    return Partition(
        counts=tuple(counts),
        loads=tuple(load(s, i, j) for s, (i, j) in enumerate(pairs)),
        nbytes=tuple(held(i, j) for i, j in pairs),
    )


def _sums(values: Sequence[float]) -> list[float]:
    out = [0.0]
    for value in values:
        out.append(out[-1] + value)
    return out


def _limits(
    most: int | Mapping[Hashable, int] | None, kinds: Sequence[Hashable] | None, L: int
) -> list[tuple[list[float], int]]:
    """Pairs of (how many layers before each one count, how many of a stage may count at most)."""
    if most is None:
        return []
    if not isinstance(most, Mapping):
        return [(_sums([1.0] * L), most)]
    if kinds is None or len(kinds) != L:
        raise ValueError(f"limits for kinds of layers, and {0 if kinds is None else len(kinds)} kinds for {L} layers")
    return [(_sums([float(own == kind) for own in kinds]), limit) for kind, limit in most.items()]


def _best(L: int, stages: int, price, join) -> list[list[float]]:
    """table[s][i]: the least joined price of the layers from i on over the stages from s on; inf where that cannot be."""
    table = [[math.inf] * (L + 1) for _ in range(stages)]
    for i in range(L):
        table[-1][i] = price(stages - 1, i, L)
    for s in range(stages - 2, -1, -1):
        left = stages - 1 - s  # stages after this one, which need a layer each
        for i in range(s, L - left):
            table[s][i] = min(join(price(s, i, j), table[s + 1][j]) for j in range(i + 1, L - left + 1))
    return table


# --- slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """The layer slots that every stage has: a common supersequence of the kinds of the stages' layers.

    slots: the kind of each. places: for each stage, the slot of each of its layers. proven: whether no cheaper list of slots exists for
    these stages.
    """

    slots: tuple[Hashable, ...]
    places: tuple[tuple[int, ...], ...]
    proven: bool

    @property
    def waste(self) -> float:
        """Share of all slots that hold no layer."""
        return 1 - sum(map(len, self.places)) / (len(self.slots) * len(self.places))


EXACT_STATES = 200_000  # positions in all stages at once that are looked at for the shortest list


def slot_plan(kinds: Sequence[Hashable], counts: Sequence[int]) -> SlotPlan:
    """The shortest list of slots in which the layers of every stage find slots of their kind, in order.

    kinds: of every layer; counts: layers of each stage. Exact (a search over the stages' positions) up to EXACT_STATES of them; beyond
    that, each next slot is of the kind that most stages wait for, which is exact where layers are of one kind, or of a second one after it.
    """
    runs, start = [], 0
    for count in counts:
        runs.append(tuple(kinds[start : start + count]))
        start += count
    if start != len(kinds):
        raise ValueError(f"counts {tuple(counts)} are {start} layers, there are {len(kinds)}")
    exact = math.prod(len(run) + 1 for run in set(runs)) <= EXACT_STATES
    slots = _shortest(sorted(set(runs), key=repr)) if exact else _majority(runs)
    places = []
    for run in runs:
        place, own = -1, []
        for kind in run:
            place = slots.index(kind, place + 1)
            own.append(place)
        places.append(tuple(own))
    proven = exact or len(slots) == max(map(len, runs))
    return SlotPlan(slots=slots, places=tuple(places), proven=proven)


def _step(runs: Sequence[tuple], at: tuple[int, ...], kind: Hashable) -> tuple[int, ...]:
    return tuple(i + (i < len(run) and run[i] == kind) for run, i in zip(runs, at, strict=True))


def _shortest(runs: Sequence[tuple]) -> tuple[Hashable, ...]:
    """Breadth first: from position 0 of every run to the end of all, a slot a step."""
    start, goal = (0,) * len(runs), tuple(map(len, runs))
    came: dict[tuple[int, ...], tuple[tuple[int, ...], Hashable] | None] = {start: None}
    border = [start]
    while goal not in came:
        following = []
        for at in border:
            for kind in dict.fromkeys(run[i] for run, i in zip(runs, at, strict=True) if i < len(run)):
                step = _step(runs, at, kind)
                if step not in came:
                    came[step] = at, kind
                    following.append(step)
        border = following
    out, at = [], goal
    while (before := came[at]) is not None:
        at, kind = before
        out.append(kind)
    return tuple(reversed(out))


def _majority(runs: Sequence[tuple]) -> tuple[Hashable, ...]:
    at, out = (0,) * len(runs), []
    while waiting := [(len(run) - i, run[i]) for run, i in zip(runs, at, strict=True) if i < len(run)]:
        votes: dict[Hashable, int] = {}
        for left, kind in waiting:
            votes[kind] = votes.get(kind, 0) + left
        kind = max(votes, key=votes.__getitem__)
        out.append(kind)
        at = _step(runs, at, kind)
    return tuple(out)


# --- stages that every device has the slots of


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """counts: layers of each stage. loads: their cost over the stage's speed. slots: see SlotPlan. nbytes: of all slots, which every device
    has, whichever stage it is of."""

    counts: tuple[int, ...]
    loads: tuple[float, ...]
    slots: SlotPlan
    nbytes: float

    @property
    def longest(self) -> float:
        return max(self.loads)


def stage_plans(
    costs: Sequence[float],
    kinds: Sequence[Hashable],
    nbytes: Mapping[Hashable, float],
    stages: int,
    *,
    speeds: Sequence[float] | None = None,
) -> Iterator[StagePlan]:
    """From the shortest longest stage to the fewest bytes: no plan is both shorter and smaller than another, each is made when it is asked
    for, and the first that fits into memory is the best one.

    costs, kinds: of each layer. nbytes: of a slot of each kind. speeds: as of `partition`. Every device has every slot, so that a stage's
    memory is that of all slots. Exact where each kind's layers are one run, such as dense ones before those with experts: then the slots
    are the most layers of each kind that a stage has. Where kinds alternate, slots are counted by `slot_plan`, and a plan that is not found
    may exist. Raises MeshError for more stages than layers.
    """
    found = _smallest(costs, kinds, nbytes, stages, speeds, math.inf)
    while found is not None:
        smaller = _smallest(costs, kinds, nbytes, stages, speeds, found.nbytes * (1 - _EQUAL) - _EQUAL)
        if smaller is None or smaller.longest > found.longest * (1 + _EQUAL):
            yield found
        found = smaller


def _smallest(costs, kinds, nbytes, stages: int, speeds, room: float) -> StagePlan | None:
    """The shortest longest stage among plans whose slots take `room` at most, None where there is none."""
    best: StagePlan | None = None
    totals = collections.Counter(kinds)
    (most_common, _), *others = totals.most_common()
    least = {kind: -(-count // stages) for kind, count in totals.items()}
    # with limits for all kinds but one the last one's follows; without a limit of memory none is needed
    unlimited = room == math.inf
    ranges = [range(least[kind], totals[kind] + 1) if not unlimited else (totals[kind],) for kind, _ in others]
    for limits in itertools.product(*ranges):
        most = dict(zip((kind for kind, _ in others), limits, strict=True))
        left = room - sum(nbytes[kind] * limit for kind, limit in most.items())
        size = nbytes[most_common]
        most[most_common] = totals[most_common] if unlimited or size == 0 else min(totals[most_common], math.floor(left / size))
        if left < 0 or most[most_common] < least[most_common]:
            continue
        # of equal stages the one with fewest bytes in its largest stage
        sizes = [nbytes[kind] for kind in kinds]
        try:
            cut = partition(costs, stages, nbytes=sizes, speeds=speeds, most=most, kinds=kinds)
        except MeshError:
            if stages > len(costs):
                raise
            continue
        slots = slot_plan(kinds, cut.counts)
        plan = StagePlan(counts=cut.counts, loads=cut.loads, slots=slots, nbytes=sum(nbytes[kind] for kind in slots.slots))
        if plan.nbytes > room:
            continue
        shorter = best is None or plan.longest < best.longest * (1 - _EQUAL)
        if shorter or (best is not None and plan.longest <= best.longest * (1 + _EQUAL) and plan.nbytes < best.nbytes):
            best = plan
    return best
