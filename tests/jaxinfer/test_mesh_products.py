"""Greedy ids of small random Llama, GPT-2, Gemma 2 and Mixtral models on every mesh of up to eight devices, against one device.

Here they are all: a few quick ones; slow ones that, with these and the Llama of test_meshes.py, have every pair of family and size and of
two sizes; the rest full.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from small_families import FAMILIES, greedy_ids

SIZES = [s for s in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2)) if 1 < s[0] * s[1] * s[2] <= 8]
# family, tensor, stage, data
QUICK = {("llama", 8, 1, 1), ("gpt2", 2, 2, 2), ("gemma2", 1, 4, 2), ("gemma2", 3, 2, 1), ("mixtral", 2, 2, 2)}
SLOW = {
    ("llama", 1, 4, 1),
    *(("gpt2", *sizes) for sizes in [(1, 3, 2), (2, 4, 1), (3, 1, 1), (4, 1, 1), (8, 1, 1)]),
    *(("gemma2", *sizes) for sizes in [(2, 3, 1), (4, 1, 2), (8, 1, 1)]),
    *(("mixtral", *sizes) for sizes in [(1, 2, 1), (1, 3, 1), (1, 4, 1), (3, 1, 2), (4, 1, 1), (8, 1, 1)]),
}
# the Llama of test_meshes.py
ELSEWHERE = {("llama", *sizes, 1) for sizes in [(3, 1), (2, 2), (2, 1), (1, 2), (4, 1), (1, 3), (3, 2), (2, 3), (4, 2)]}
ELSEWHERE |= {("llama", *sizes, 2) for sizes in [(1, 1), (2, 1), (2, 2)]}


def pairs(case: tuple) -> set[tuple]:
    return set(itertools.combinations(enumerate(case), 2))


def test_every_pair_is_tested():
    every = [(family, *sizes) for family in FAMILIES for sizes in SIZES]
    assert set(every) >= QUICK | SLOW
    assert set().union(*map(pairs, every)) == set().union(*map(pairs, QUICK | SLOW | ELSEWHERE))


@pytest.fixture(scope="module")
def alone() -> Callable[[str], list[list[int]]]:
    known: dict[str, list[list[int]]] = {}
    return lambda family: known.setdefault(family, known.get(family) or greedy_ids(family))


@pytest.mark.parametrize(
    ("family", "tensor", "stage", "data"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow if case in SLOW else pytest.mark.full)
        for case in ((family, *sizes) for family in FAMILIES for sizes in SIZES)
    ],
)
def test_greedy_ids_are_those_of_one_device(alone, family: str, tensor: int, stage: int, data: int) -> None:
    assert greedy_ids(family, tensor=tensor, stage=stage, data=data) == alone(family)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        pytest.param(
            family, sizes, marks=pytest.mark.slow if family in ("gpt2", "gemma2") and "stage" in sizes else pytest.mark.full
        )
        for family in FAMILIES
        for sizes in ({"tensor": 2}, {"tensor": 4, "stage": 2}, {"tensor": 2, "tensor_hosts": 2}, {"tensor": 2, "expert": 2})
        if family == "mixtral" or "expert" not in sizes
    ],
)
def test_greedy_ids_with_tokens_split_between_half_layers(alone, family: str, sizes: dict[str, int]) -> None:
    assert greedy_ids(family, split_tokens=True, **sizes) == alone(family)
