"""Greedy ids of small random Llama, GPT-2, Gemma 2 and Mixtral models on every mesh of up to eight devices, against one device.

Other tests have some of these meshes; here they are all, a few of them slow and the rest full.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from small_families import FAMILIES, greedy_ids

SIZES = [s for s in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2)) if 1 < s[0] * s[1] * s[2] <= 8]
# Sizes that test_meshes.py has not, one for each family but Llama, which that file has.
SLOW = {("gemma2", 1, 3, 2), ("gpt2", 3, 1, 2), ("mixtral", 2, 2, 2)}


@pytest.fixture(scope="module")
def alone() -> Callable[[str], list[list[int]]]:
    known: dict[str, list[list[int]]] = {}
    return lambda family: known.setdefault(family, known.get(family) or greedy_ids(family))


@pytest.mark.parametrize(
    ("family", "tensor", "stage", "data"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case in SLOW else pytest.mark.full)
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
