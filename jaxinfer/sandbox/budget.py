"""What one rendering of a template may take."""

import collections.abc
import itertools
import threading
from collections.abc import Iterable
from typing import Any

import jinja2
import jinja2.utils
from jinja2.runtime import LoopContext

WORK, WORK_PER_UNIT = 1 << 26, 1 << 7  # a character costs 1: about a second of Python, and far more than any template takes
LARGEST, LARGEST_PER_UNIT = 1 << 20, 8
STEP, CONTAINER, ITEM = 64, 256, 32  # what an operation costs, a container that is made, and each part of it
MAX_BITS = 1 << 14  # of a whole number

# What a template gets for an iterator: read once, and true even if empty, as those of Jinja's filters are.
Drained: type = type(iter([]))
CONTAINERS = (list, tuple, dict, set)
_SCALARS = (int, float, type(None))
_ENDLESS = (Drained, LoopContext, jinja2.utils.Cycler)  # iterators that are left as they are


class BudgetError(jinja2.TemplateError):
    """A template that asks for more than its budget."""


class Budget:
    """What one rendering may take. given: the data of the caller, JSON values; `largest` and the work grow with it.

    largest: characters and parts of any value.
    """

    def __init__(self, given: Any):
        self._weights: dict[int, tuple[Any, int]] = {}  # of containers, which are kept so that no other gets their id
        weight = self.weight(given)
        self.largest = LARGEST + LARGEST_PER_UNIT * weight
        self._left = WORK + WORK_PER_UNIT * weight

    def pay(self, cost: int) -> None:
        self._left -= STEP + cost
        if self._left < 0:
            raise BudgetError("it works without end, or much longer than any template does for a conversation of this size")

    def room(self, size: int) -> None:
        """Refuse what would be made larger than anything may be."""
        if size > self.largest:
            raise BudgetError(
                f"it makes a value of {size:,} characters and parts; {self.largest:,} are possible in a conversation of this size"
            )

    def weight(self, value: Any) -> int:
        """Characters that writing or comparing a value goes through, and a little for each part. Values do not change once made."""
        if isinstance(value, str):
            return len(value) + ITEM
        if isinstance(value, _SCALARS):
            return ITEM + (value.bit_length() >> 3 if isinstance(value, int) else 0)
        if known := self._weights.get(id(value)):
            return known[1]
        if isinstance(value, CONTAINERS):
            parts = itertools.chain(value, value.values()) if isinstance(value, dict) else value
            return self.weighs(value, ITEM + sum(map(self.weight, parts)))
        if isinstance(value, collections.abc.MappingView):
            parts = itertools.chain(value.mapping, value.mapping.values())  # type: ignore[attr-defined]
            return ITEM + sum(map(self.weight, parts))
        return ITEM

    def weighs(self, value: Any, weight: int) -> int:
        """Say what a container or iterator weighs, at most."""
        self._weights[id(value)] = value, weight
        return weight

    def made(self, value: Any) -> Any:
        """The value, paid for, after a check of its size. Iterators give what they have at once, so that it can be measured."""
        if isinstance(value, str):
            self.room(len(value))
            self.pay(len(value))
        elif isinstance(value, CONTAINERS):
            self.pay(CONTAINER + ITEM * len(value))
            self.room(self.weight(value))
        elif isinstance(value, collections.abc.Iterator) and not isinstance(value, _ENDLESS):
            weight, items = ITEM, []
            for item in value:
                weight += self.weight(item)
                self.room(weight)
                items.append(item)
            self.pay(CONTAINER + ITEM * len(items))
            value = iter(items)
            self.weighs(value, weight)
        else:
            self.pay(0)
            few_bits(value.bit_length() if isinstance(value, int) else 0)
        return value

    def joined(self, pieces: Iterable[str]) -> str:
        """The pieces as one text, paid for; pieces are not asked for once it is too long."""
        size, kept = 0, []
        for piece in pieces:
            size += len(piece)
            self.room(size)
            kept.append(piece)
        self.pay(size)
        return "".join(kept)


def few_bits(count: int) -> None:
    """Refuse a whole number of so many bits."""
    if count > MAX_BITS:
        raise BudgetError(f"it makes a number of {count:,} bits; {MAX_BITS:,} are possible")


current = threading.local()  # .budget: of the rendering that this thread is in


def budget() -> Budget:
    return current.budget
