"""Rules from names of a checkpoint to paths of a model, as data, and the account of every name both ways."""

import abc
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
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
    """Rows start .. start + count: one part of a fused tensor such as qkv. axis: of the rows, 1 in a stack of matrices."""

    start: int
    count: int
    axis: int = 0

    def shape(self, source):
        if len(source) <= self.axis or self.start + self.count > source[self.axis]:
            raise ConversionError(f"rows {self.start}..{self.start + self.count} do not lie in the shape {source}")
        return (*source[: self.axis], self.count, *source[self.axis + 1 :])

    def units(self, target, source):
        rows = target[self.axis]
        if rows is None:
            size = math.gcd(self.start, self.count) or 1
            read = Units(size, tuple(range(self.start // size, (self.start + self.count) // size)))
        else:
            read = Units(1, tuple(np.where(rows.elements < 0, -1, rows.elements + self.start).tolist()))
        return (*target[: self.axis], read, *target[self.axis + 1 :])


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


class StackedTensor(LazyTensor):
    """Lazy tensors of one shape and form as one with a leading axis; only those are read that a shard holds.

    Raises ConversionError where they differ.
    """

    def __init__(self, name: str, parts: Sequence[LazyTensor]):
        first = parts[0]
        for part in parts:
            if (part.shape, part.dtype, part.packed) != (first.shape, first.dtype, first.packed):
                raise ConversionError(
                    f"{name} is a stack of tensors that are stored differently: {first.name} is {first.packed or first.dtype} "
                    f"{first.shape}, {part.name} is {part.packed or part.dtype} {part.shape}"
                )
        self.name, self.dtype, self.packed = name, first.dtype, first.packed
        self.shape = (len(parts), *first.shape)
        self._parts = tuple(parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that were stacked."""
        return tuple(part.name for part in self._parts)

    def read(self, units: Shard = None) -> np.ndarray | QTensor:
        lead, *own = self.shard(units)
        chosen = range(len(self._parts)) if lead is None else lead.elements.tolist()
        read = [self._parts[max(i, 0)].read(own) for i in chosen]  # of padding as much as there is of a real one
        blank = [jax.tree.map(np.zeros_like, a) if i < 0 else a for i, a in zip(chosen, read, strict=True)]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *blank)


class StackPart(LazyTensor):
    """One tensor of a stack, under a name of its own."""

    def __init__(self, name: str, stack: LazyTensor, number: int):
        self.name, self.dtype, self.packed = name, stack.dtype, stack.packed
        self.shape = stack.shape[1:]
        self._stack, self._number = stack, number

    def read(self, units: Shard = None) -> np.ndarray | QTensor:
        value = self._stack.read((Units(1, (self._number,)), *self.shard(units)))
        return jax.tree.map(lambda a: a[0], value)


def parts_of(stack: LazyTensor, names: Sequence[str]) -> dict[str, LazyTensor]:
    """The tensors of a stack by name, lazy as it is."""
    return {name: StackPart(name, stack, n) for n, name in enumerate(names)}


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
    fields, "blocks.{i}.mlp.up". Several rules may read one source (the parts of a fused tensor). stack: a field of the source alone,
    which counts the tensors that make the target's first axis: the experts of "model.layers.{i}.mlp.experts.{e}.up_proj.weight".
    """

    source: str
    target: str
    transforms: tuple[Transform, ...] = ()
    stack: str | None = None

    def __post_init__(self):
        of_source, of_target = (set(re.findall(r"{(\w+)}", text)) for text in (self.source, self.target))
        if of_source - {self.stack} != of_target or (self.stack is not None and self.stack not in of_source):
            raise ConversionError(
                f"rule {self.source} -> {self.target}: both sides must have the same fields, but for that of a stack"
            )


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
    stacks: dict[str, dict[int, LazyTensor]] = {}
    unused, shapes, twice = [], [], []

    def put(into: dict, key, target: str, shape: tuple[int, ...], name: str, transforms: Sequence[Transform]) -> None:
        tensor = tensors[name]
        if key in into:
            twice.append(f"{target} is set twice: by {into[key].name} and by {name}")
            return
        into[key] = tensor
        try:
            into[key] = transformed(tensor, transforms)
        except ConversionError as error:
            shapes.append(f"{error} (for {target})")
            return
        if into[key].shape != shape:
            shapes.append(f"{name} has shape {into[key].shape}, {target} needs {shape}")

    for name in tensors:
        targets = [t for rule in rules if (t := _target(rule, name)) and t.path in expected and t.fits(expected[t.path])]
        if not targets and not any(p.fullmatch(name) for p in ignored):
            unused.append(name)
        for t in targets:
            shape = tuple(expected[t.path])
            if t.number is None:
                put(bound, t.path, t.path, shape, name, t.transforms)
            else:
                put(stacks.setdefault(t.path, {}), t.number, f"{t.path}[{t.number}]", shape[1:], name, t.transforms)
    for path, parts in stacks.items():
        if path in bound:
            twice.append(f"{path} is set twice: by {bound[path].name} and by {next(iter(parts.values())).name}")
        elif len(parts) == expected[path][0] and not shapes:
            try:
                bound[path] = StackedTensor(path, [parts[n] for n in range(len(parts))])
            except ConversionError as error:
                shapes.append(str(error))
    missing = [path for path in expected if path not in bound]
    if missing or unused or shapes or twice:
        # of a stack the tensors that are not there, and nothing where all are, since something else is wrong with it then
        left = {path: [n for n in range(expected[path][0]) if n not in parts] for path, parts in stacks.items()}
        missing = [path for path in missing if left.get(path, [0])]
        absent = {path: _sources(rules, path, left.get(path, [0])) for path in missing}
        lost = [f"{p} is not set: {_absent_text(absent[p])}{_hint(absent[p], unused, n)}" for n, p in enumerate(missing)]
        wanted = [name for names in absent.values() for name in names]
        unknown = [f"{name} is unknown to the model{_hint([name], wanted, n)}" for n, name in enumerate(unused)]
        _raise(lost, [*unknown, *twice], shapes, where)
    return bound


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where a tensor goes: to a module path, or to a place of the stack there."""

    path: str
    transforms: tuple[Transform, ...]
    number: int | None = None

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape has such a place."""
        return self.number is None or self.number < shape[0]


def _target(rule: Rule, name: str) -> _Target | None:
    match = _pattern(rule.source).fullmatch(name)
    if match is None:
        return None
    # the digits are kept as written, so that "layers.01" cannot pass for "layers.1"
    fields = match.groupdict()
    number = None if rule.stack is None else fields.pop(rule.stack)
    if number is not None and str(int(number)) != number:
        return None
    return _Target(rule.target.format(**fields), rule.transforms, None if number is None else int(number))


def _sources(rules: Sequence[Rule], path: str, numbers: Sequence[int]) -> list[str]:
    """The names that would have set a module path; of a stack, those of its first missing tensor."""
    found = [(rule, m) for rule in rules if (m := _pattern(rule.target).fullmatch(path))]
    more = lambda rule: {} if rule.stack is None else {rule.stack: numbers[0]}
    return [rule.source.format(**m.groupdict(), **more(rule)) for rule, m in found]


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
