"""Rules from names of a checkpoint to paths of a model, as data, and the account of every name both ways."""

import abc
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from convert.errors import (
    CheckpointMismatchError,
    ConversionError,
    MissingTensorError,
    TensorShapeError,
    UnexpectedTensorError,
)
from convert.readers.base import LazyTensor, Shard
from pallas_kernels.qtensor import QTensor
from sharding.partition import Units

HINTED = 20  # problems of one kind that get a nearest name; finding one compares with every name


class Transform(abc.ABC):
    """A change of layout that keeps slices lazy: it says which units of the source to read, then finishes the array."""

    @abc.abstractmethod
    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The target's shape. Raises ConversionError where the source does not fit."""

    @abc.abstractmethod
    def units(self, target: Sequence[Units | None], source: tuple[int, ...]) -> tuple[Units | None, ...]:
        """What to read of a source of shape `source` for a shard of the target."""

    def finish(self, array: np.ndarray | QTensor) -> np.ndarray | QTensor:
        """The shard of the target out of what was read."""
        return array


@dataclasses.dataclass(frozen=True)
class Transpose(Transform):
    """Swap the two axes of a matrix, as of a checkpoint that stores [in, out]. Packed tensors cannot be transposed."""

    def shape(self, source):
        if len(source) != 2:
            raise ConversionError(f"only a matrix can be transposed, not the shape {source}")
        return source[::-1]

    def units(self, target, source):
        return tuple(target[::-1])

    def finish(self, array):
        return np.ascontiguousarray(array.T)


@dataclasses.dataclass(frozen=True)
class Rows(Transform):
    """Rows start .. start + count of the first axis: one part of a fused tensor such as qkv."""

    start: int
    count: int

    def shape(self, source):
        if not source or self.start + self.count > source[0]:
            raise ConversionError(f"rows {self.start}..{self.start + self.count} do not lie in the shape {source}")
        return (self.count, *source[1:])

    def units(self, target, source):
        rows = target[0]
        if rows is None:
            size = math.gcd(self.start, self.count) or 1
            return (Units(size, tuple(range(self.start // size, (self.start + self.count) // size))), *target[1:])
        moved = np.where(rows.elements < 0, -1, rows.elements + self.start)
        return (Units(1, tuple(moved.tolist())), *target[1:])


@dataclasses.dataclass(frozen=True)
class PermuteRows(Transform):
    """Reorder the first axis: row r of the target is row order[r] of the source.

    order: the indices, or a function from the number of rows to them.
    """

    order: Sequence[int] | Callable[[int], np.ndarray]

    def indices(self, rows: int) -> np.ndarray:
        return np.asarray(self.order(rows) if callable(self.order) else self.order)

    def shape(self, source):
        if not source or sorted(self.indices(source[0]).tolist()) != list(range(source[0])):
            raise ConversionError(f"the order is not a permutation of the rows of the shape {source}")
        return source

    def units(self, target, source):
        order, rows = self.indices(source[0]), target[0]
        if rows is None:
            return (Units(1, tuple(order.tolist())), *target[1:])
        moved = np.where(rows.elements < 0, -1, order[np.maximum(rows.elements, 0)])
        return (Units(1, tuple(moved.tolist())), *target[1:])


class TransformedTensor(LazyTensor):
    """A lazy tensor seen through transforms, the first one applied first."""

    def __init__(self, source: LazyTensor, transforms: Sequence[Transform]):
        self.name, self.dtype, self.packed = source.name, source.dtype, source.packed
        self._source, self._transforms = source, tuple(transforms)
        self._shapes = [source.shape]
        for transform in self._transforms:
            if self.packed and isinstance(transform, Transpose):
                raise ConversionError(f"{self.name} is packed as {self.packed.format} and cannot be transposed")
            self._shapes.append(transform.shape(self._shapes[-1]))
        self.shape = self._shapes[-1]

    def read(self, units: Shard = None) -> np.ndarray | QTensor:
        wanted = self.shard(units)
        for transform, shape in zip(reversed(self._transforms), reversed(self._shapes[:-1]), strict=True):
            wanted = transform.units(wanted, shape)
        array = self._source.read(wanted)
        for transform in self._transforms:
            array = transform.finish(array)
        return array


def transformed(source: LazyTensor, transforms: Sequence[Transform]) -> LazyTensor:
    """`source` through transforms. Raises ConversionError, naming the tensor, where they do not fit its shape."""
    if not transforms:
        return source
    try:
        return TransformedTensor(source, transforms)
    except ConversionError as error:
        raise ConversionError(f"{source.name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a weight table.

    source: a canonical name with integer fields, "model.layers.{i}.mlp.up_proj.weight". target: a module path with the same
    fields, "blocks.{i}.mlp.up". Several rules may read one source (the parts of a fused tensor).
    """

    source: str
    target: str
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self):
        if set(re.findall(r"{(\w+)}", self.source)) != set(re.findall(r"{(\w+)}", self.target)):
            raise ConversionError(f"rule {self.source} -> {self.target}: both sides must have the same fields")


@functools.cache
def _pattern(text: str) -> re.Pattern:
    """A compiled name: {field} is an integer; * is anything (used in `ignore`)."""
    parts = re.split(r"({\w+}|\*)", text)
    regex = "".join(".*" if p == "*" else rf"(?P<{p[1:-1]}>\d+)" if p.startswith("{") else re.escape(p) for p in parts)
    return re.compile(regex)


def bind(
    rules: Iterable[Rule],
    tensors: Mapping[str, LazyTensor],
    expected: Mapping[str, tuple[int, ...]],
    ignore: Sequence[str] = (),
    where: str = "the checkpoint",
) -> dict[str, LazyTensor]:
    """Give every module path its tensor.

    rules: the family's table. tensors: of a Checkpoint. expected: shape of each module path. ignore: names, with {i} or *, that
    may be present without a use (a buffer, lm_head of a tied model); a name that a rule gives to an expected path is used.

    Raises MissingTensorError, UnexpectedTensorError (unknown, or set twice) or TensorShapeError, or CheckpointMismatchError
    where there are several kinds; each lists every problem of the checkpoint, with the nearest name.
    """
    rules = tuple(rules)
    ignored = [_pattern(text) for text in ignore]
    bound: dict[str, LazyTensor] = {}
    unused, shapes, twice = [], [], []
    for name, tensor in tensors.items():
        targets = [t for rule in rules if (t := _target(rule, name)) and t[0] in expected]
        if not targets and not any(p.fullmatch(name) for p in ignored):
            unused.append(name)
        for target, transforms in targets:
            if target in bound:
                twice.append(f"{target} is set twice: by {bound[target].name} and by {name}")
                continue
            try:
                bound[target] = transformed(tensor, transforms)
            except ConversionError as error:
                bound[target] = tensor
                shapes.append(f"{error} (for {target})")
                continue
            if bound[target].shape != tuple(expected[target]):
                shapes.append(f"{name} has shape {bound[target].shape}, {target} needs {tuple(expected[target])}")
    missing = [path for path in expected if path not in bound]
    if missing or unused or shapes or twice:
        absent = {path: _sources(rules, path) for path in missing}
        lost = [f"{p} is not set: {_absent_text(absent[p])}{_hint(absent[p], unused, n)}" for n, p in enumerate(missing)]
        wanted = [name for names in absent.values() for name in names]
        unknown = [f"{name} is unknown to the model{_hint([name], wanted, n)}" for n, name in enumerate(unused)]
        _raise(lost, [*unknown, *twice], shapes, where)
    return bound


def _target(rule: Rule, name: str) -> tuple[str, tuple[Transform, ...]] | None:
    match = _pattern(rule.source).fullmatch(name)
    # the digits are kept as written, so that "layers.01" cannot pass for "layers.1"
    return match and (rule.target.format(**match.groupdict()), rule.transforms)


def _sources(rules: Sequence[Rule], path: str) -> list[str]:
    """The names that would have set a module path."""
    return [rule.source.format(**m.groupdict()) for rule in rules if (m := _pattern(rule.target).fullmatch(path))]


def _absent_text(sources: list[str]) -> str:
    return f"the checkpoint has no {' or '.join(sources)}" if sources else "no rule of the family sets it"


def _hint(names: Sequence[str], candidates: Sequence[str], number: int) -> str:
    if number >= HINTED or not names:
        return ""
    close = difflib.get_close_matches(names[0], candidates, n=1, cutoff=0.88)
    return f"; the nearest is {close[0]}" if close else ""


def _raise(lost: list[str], unknown: list[str], shapes: list[str], where: str):
    kinds = [(MissingTensorError, lost), (UnexpectedTensorError, unknown), (TensorShapeError, shapes)]
    present = [(kind, problems) for kind, problems in kinds if problems]
    kind = present[0][0] if len(present) == 1 else CheckpointMismatchError
    raise kind([p for _, problems in present for p in problems], where)
