"""Greedy ids of small random Llama, GPT-2, Gemma 2 and Mixtral models on every mesh of up to eight devices, against one device.

Here they are all: quick ones that have every pair of family and size, and of two sizes; the rest slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from small_families import FAMILIES, greedy_ids

pytestmark = pytest.mark.usefixtures("rough_programs")

SIZES = [s for s in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2)) if 1 < s[0] * s[1] * s[2] <= 8]
CASES = [(family, *sizes) for family in FAMILIES for sizes in SIZES]  # family, tensor, stage, data


def pairwise(cases: list[tuple]) -> set[tuple]:
    """Few of these that have every pair of values that any has: one by one, each time the case that has most of what is left."""
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    left, chosen = set().union(*pairs.values()), set()
    while left:
        case = max(cases, key=lambda case: len(pairs[case] & left))
        chosen.add(case)
        left -= pairs[case]
    return chosen


QUICK = pairwise(CASES)


@pytest.fixture(scope="module")
def alone() -> Callable[[str], list[list[int]]]:
    known: dict[str, list[list[int]]] = {}
    return lambda family: known.setdefault(family, known.get(family) or greedy_ids(family))


@pytest.mark.parametrize(
    ("family", "tensor", "stage", "data"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_greedy_ids_are_those_of_one_device(alone, family: str, tensor: int, stage: int, data: int) -> None:
    assert greedy_ids(family, tensor=tensor, stage=stage, data=data) == alone(family)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        (family, sizes)
        for family in FAMILIES
        for sizes in ({"tensor": 2}, {"tensor": 4, "stage": 2}, {"tensor": 2, "tensor_hosts": 2}, {"tensor": 2, "expert": 2})
        if family == "mixtral" or "expert" not in sizes
    ],
)
def test_greedy_ids_with_tokens_split_between_half_layers(alone, family: str, sizes: dict[str, int]) -> None:
    assert greedy_ids(family, split_tokens=True, **sizes) == alone(family)
