"""The partitioner against all partitions of small instances, and on the shapes of large models."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from sharding.balance import partition, slot_plan, stage_plans
from sharding.costs import H100, Cost, Device, Latent, LayerShape, head, total
from sharding.errors import MeshError


def every_partition(layers: int, stages: int):
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        bounds = (0, *cuts, layers)
        yield [range(i, j) for i, j in itertools.pairwise(bounds)]


def brute_force(costs, stages, *, nbytes, room, speeds, first, last, most):
    """(longest, largest, squares) of the best partition by these, in this order, or None."""
    best = None
    for runs in every_partition(len(costs), stages):
        loads = [sum(costs[i] for i in run) for run in runs]
        loads[0] += first
        loads[-1] += last
        loads = [load / speed for load, speed in zip(loads, speeds, strict=True)]
        sizes = [sum(nbytes[i] for i in run) for run in runs]
        if any(size > limit for size, limit in zip(sizes, room, strict=True)) or max(map(len, runs)) > most:
            continue
        found = max(loads), max(sizes), sum(load**2 for load in loads)
        best = found if best is None else min(best, found)
    return best


def test_against_brute_force():
    """500 random instances: whole numbers, so that ties occur; some of them impossible."""
    rng, impossible = np.random.default_rng(8), 0
    for _ in range(500):
        layers = int(rng.integers(1, 11))
        stages = int(rng.integers(1, min(layers, 5) + 1))
        costs, nbytes = rng.integers(0, 9, layers).tolist(), rng.integers(0, 9, layers).tolist()
        room = rng.integers(5, 40, stages).tolist() if rng.random() < 0.5 else [math.inf] * stages
        speeds = rng.choice([1, 2, 4], stages).tolist()
        first, last, most = int(rng.integers(0, 4)), int(rng.integers(0, 9)), int(rng.integers(2, layers + 2))
        keywords = {"nbytes": nbytes, "speeds": speeds, "first": first, "last": last, "most": most}
        expected = brute_force(costs, stages, room=room, **keywords)
        if expected is None:
            impossible += 1
            with pytest.raises(MeshError, match="do not fit"):
                partition(costs, stages, capacity=room, **keywords)
            continue
        found = partition(costs, stages, capacity=room, **keywords)
        assert sum(found.counts) == layers and min(found.counts) >= 1 and max(found.counts) <= most
        assert (found.longest, max(found.nbytes), sum(load**2 for load in found.loads)) == pytest.approx(expected)
    assert 20 < impossible < 250


def test_equal_layers_are_spread_evenly_and_the_longer_stages_come_first():
    for layers, stages in itertools.product(range(1, 14), range(1, 6)):
        if stages <= layers:
            base, extra = divmod(layers, stages)
            assert partition([0.1] * layers, stages).counts == tuple(base + (s < extra) for s in range(stages))


def test_what_is_refused():
    with pytest.raises(MeshError, match="3 pipeline stages for 2 layers"):
        partition([1, 1], 3)
    with pytest.raises(ValueError, match="finite"):
        partition([1, math.nan], 1)
    with pytest.raises(ValueError, match="1 speeds"):
        partition([1, 1], 2, speeds=[1])


# --- slots


def shortest_length(runs, kinds) -> int:
    for length in itertools.count(max(map(len, runs))):
        for slots in itertools.product(kinds, repeat=length):
            if all(is_in(run, slots) for run in runs):
                return length
    raise AssertionError


def is_in(run, slots) -> bool:
    rest = iter(slots)
    return all(kind in rest for kind in run)


def test_slots_against_brute_force():
    rng = np.random.default_rng(9)
    for _ in range(60):
        counts = rng.integers(1, 4, int(rng.integers(1, 4))).tolist()
        kinds = rng.choice(list("ab"), sum(counts)).tolist()
        plan, start, runs = slot_plan(kinds, counts), 0, []
        for count, places in zip(counts, plan.places, strict=True):
            run = kinds[start : start + count]
            assert [plan.slots[place] for place in places] == run and list(places) == sorted(set(places))
            runs.append(run)
            start += count
        assert plan.proven and len(plan.slots) == shortest_length(runs, "ab")
        assert plan.waste == pytest.approx(1 - sum(counts) / (len(plan.slots) * len(counts)))


def test_slots_of_many_stages():
    """Dense layers before MoE layers, on more stages than can be searched through."""
    kinds = ["dense"] * 3 + ["moe"] * 58
    counts = [5, *[4] * 14]
    plan = slot_plan(kinds, counts)
    assert plan.slots == ("dense",) * 3 + ("moe",) * 4 and plan.waste == pytest.approx(1 - 61 / (7 * 15))
    assert slot_plan(["a"] * 64, [4] * 16).waste == 0 and slot_plan(["a"] * 64, [4] * 16).proven


# --- stages that every device has the slots of


def every_stage_plan(costs, kinds, nbytes, stages, speeds):
    """(longest stage, bytes of the slots) of every partition."""
    for runs in every_partition(len(costs), stages):
        longest = max(sum(costs[i] for i in run) / speed for run, speed in zip(runs, speeds, strict=True))
        slots = slot_plan(kinds, list(map(len, runs))).slots
        yield longest, sum(nbytes[kind] for kind in slots)


def test_stages_for_a_memory_and_speeds_against_brute_force():
    """500 random instances with up to two kinds of layers: for every limit of memory the first plan that fits is the shortest of all that
    do, of these the smallest, and where none is given none exists."""
    rng, fronts, alternating = np.random.default_rng(10), 0, 0
    for case in range(500):
        layers = int(rng.integers(1, 10))
        stages = int(rng.integers(1, min(layers, 4) + 1))
        dense = int(rng.integers(0, layers + 1))
        kinds, blocks = ["dense"] * dense + ["moe"] * (layers - dense), case % 5 > 0
        if not blocks:
            rng.shuffle(kinds)
        nbytes = {"dense": int(rng.integers(1, 5)), "moe": int(rng.integers(1, 9))}
        costs = rng.integers(1, 9, layers).tolist()
        speeds = rng.choice([1, 2, 4], stages).tolist()
        every = list(every_stage_plan(costs, kinds, nbytes, stages, speeds))
        front = list(stage_plans(costs, kinds, nbytes, stages, speeds=speeds))
        assert [plan.nbytes for plan in front] == sorted({plan.nbytes for plan in front}, reverse=True)
        assert all(sum(plan.counts) == layers and (plan.longest, plan.nbytes) in every for plan in front)
        fronts += len(front) > 1
        for room in {nbytes for _, nbytes in every}:
            best = min((longest, size) for longest, size in every if size <= room)
            found = next((plan for plan in front if plan.nbytes <= room), None)
            if blocks:
                assert found is not None and (found.longest, found.nbytes) == pytest.approx(best)
            elif found is None or (found.longest, found.nbytes) != pytest.approx(best):
                alternating += 1  # what is given fits, if it is not the best
        if blocks:
            assert front[-1].nbytes == min(size for _, size in every)
    assert fronts > 100 and alternating < 100


def test_stages_of_large_models_for_devices_of_two_speeds():
    """Half of the stages on H100s, half on A100s with less bandwidth: the longest stage is within 2 % of the mean of what the layers
    allow, or none is shorter; and what fits into less memory takes longer."""
    for layers in (BLOOM, LLAMA, MIXTRAL, DEEPSEEK):
        costs = [layer.decode(batch=8, context=4096).moved for layer in layers]
        kinds = [layer.kind for layer in layers]
        nbytes = {layer.kind: 2.0 * layer.parameters for layer in layers}
        speeds = [1.0] * 4 + [2.039 / 3.352] * 4
        fastest, *smaller = itertools.islice(stage_plans(costs, kinds, nbytes, 8, speeds=speeds), 2)
        lower = max(sum(costs) / sum(speeds), max(costs))
        assert fastest.longest <= 1.02 * lower or no_shorter_at(costs, speeds, fastest.longest)
        assert fastest.counts[0] > fastest.counts[-1]
        assert all(plan.nbytes < fastest.nbytes and plan.longest > fastest.longest for plan in smaller)


def no_shorter_at(costs, speeds, longest) -> bool:
    """Whether stages of these speeds, filled in order as far as they go below this length, leave layers over: a proof."""
    rest = list(costs)
    for speed in speeds:
        room = longest * (1 - 1e-6) * speed
        while rest and rest[0] <= room:
            room -= rest.pop(0)
    return bool(rest)


# --- models

BLOOM = [LayerShape(embed=14336, heads=112, kv_heads=112, head_dim=128, width=57344, gated=False)] * 70
LLAMA = [LayerShape(embed=8192, heads=64, kv_heads=8, head_dim=128, width=28672)] * 80
MIXTRAL = [LayerShape(embed=4096, heads=32, kv_heads=8, head_dim=128, width=14336, experts=8, used=2)] * 32
_LATENT = Latent(query_rank=1536, kv_rank=512, plain=128, rotated=64, value=128)
_DEEP = LayerShape(embed=7168, heads=128, kv_heads=128, head_dim=128, width=18432, latent=_LATENT)
DEEPSEEK = [_DEEP] * 3 + [dataclasses.replace(_DEEP, width=2048, experts=256, used=8, shared=2048)] * 58


@pytest.mark.parametrize(
    ("layers", "vocab", "billions"),
    [(BLOOM, 250880, 176.2), (LLAMA, 128256, 70.5), (MIXTRAL, 32000, 46.7), (DEEPSEEK, 129280, 671.0)],
    ids=["BLOOM-176B", "Llama-3.1-70B", "Mixtral-8x7B", "DeepSeek-V3"],
)
def test_large_models(layers, vocab, billions):
    """Parameters as published; and the longest stage within 2 % of the mean, or one that no other partition beats."""
    tied = vocab == 250880
    parameters = sum(layer.parameters for layer in layers) + (1 if tied else 2) * vocab * layers[0].embed
    assert parameters / 1e9 == pytest.approx(billions, rel=0.003)
    for batch, context in ((1, 512), (64, 4096)):
        costs = [layer.decode(batch=batch, context=context).seconds(H100) for layer in layers]
        nbytes = [layer.parameters * 2.0 for layer in layers]
        ends = head(batch=batch, embed=layers[0].embed, vocab=vocab).seconds(H100)
        for stages in (2, 4, 8, 16):
            for last in (0.0, ends):
                found = partition(costs, stages, nbytes=nbytes, last=last)
                assert found.spread <= 0.02 or no_shorter(costs, stages, found.longest, last)


def no_shorter(costs, stages, longest, last) -> bool:
    """Whether stages that are filled from the end as far as they go, below this length, are not enough: a proof, for runs of layers."""
    limit, needed, load = longest * (1 - 1e-6), 1, last
    for cost in reversed(costs):
        if load + cost > limit:
            needed, load = needed + 1, 0.0
        load += cost
        if cost > limit:
            return True
    return needed > stages


def test_formulas():
    """Counted by hand for a small layer: D 4, N 2, K 1, H 2, F 8."""
    shape = LayerShape(embed=4, heads=2, kv_heads=1, head_dim=2, width=8)
    assert shape.parameters == 4 * (4 + 2 + 2) + 4 * 4 + 3 * 4 * 8
    cost = shape.decode(batch=3, context=10, item=1, cache_item=4)
    assert cost.flops == 3 * (2 * shape.parameters + 4 * 4 * 10) and cost.moved == shape.parameters + 3 * 10 * 4 * 4
    windowed = dataclasses.replace(shape, window=4)
    assert windowed.decode(batch=1, context=10).flops == 2 * shape.parameters + 4 * 4 * 4
    pairs = sum(min(t, 4) for t in range(1, 11))
    assert windowed.prefill(batch=2, tokens=10).flops == 2 * (2 * shape.parameters * 10 + 4 * 4 * pairs)
    moe = dataclasses.replace(shape, experts=4, used=1)
    assert moe.active_parameters == shape.parameters + 4 * 4 and moe.parameters == shape.parameters + 3 * 96 + 16
    assert moe.touched_parameters(1) == pytest.approx(moe.active_parameters)
    assert moe.touched_parameters(1000) == pytest.approx(moe.parameters)
    device = Device(flops=10, bandwidth=5, memory=1)
    assert Cost(flops=20, moved=5).seconds(device) == 2 and Cost(flops=20, moved=50).seconds(device) == 10
    assert total([Cost(flops=1, moved=2, kept=3)] * 2) == Cost(flops=2, moved=4, kept=6)
