"""Traces of compiled programs, and where their time goes by the names that the model gives its parts (jax.named_scope).

A trace tells which instructions of a program ran when; the compiled program's text tells which part of the model each instruction is of.
Every instant belongs to the instructions that run at it, in equal shares; what is left is between instructions, or outside of programs.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

LAYERS = "layers"  # the scopes of all layers together
OTHER = "other"  # instructions of no named part

_CONTAINERS = ("while", "conditional", "call", "async-start", "async-done")  # what they hold has instructions of its own
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LAYER = re.compile(r"layer_(\d+)")
_PART = re.compile(r"[a-z][a-z0-9_]*")
# parts of an op_name that jax's transformations make
_MADE = re.compile(
    r"while|body|cond|scan|shard_map|checkpoint|closed_call|remat|branch_\d+_fun|custom_vjp_call|custom_jvp_call"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """A part of the model: its path, such as "layers/attention_block/norm", and which layer it is in, or None."""

    path: str
    layer: int | None = None


def scope_of(op_name: str) -> Scope | None:
    """The part that an op_name of compiled code is of; None where it is of none that has a name."""
    parts = [p for p in op_name.split(";")[0].split("/")[:-1] if _PART.fullmatch(p) and not _MADE.fullmatch(p)]
    layer = None
    if parts and (found := _LAYER.fullmatch(parts[0])):
        layer, parts[0] = int(found[1]), LAYERS
    elif parts and parts[0].endswith("_block"):  # of no one layer: instructions that are alike in all of them are kept once
        parts = [LAYERS, *parts]
    return Scope(path="/".join(parts), layer=layer) if parts else None


def _common(scopes: Iterable[Scope]) -> Scope | None:
    """The part that holds all of these, or None."""
    paths = [scope.path.split("/") for scope in scopes]
    layers = {scope.layer for scope in scopes}
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    return Scope(path="/".join(shared), layer=layers.pop() if len(layers) == 1 else None) if shared else None


@dataclasses.dataclass
class _Instruction:
    """A line of a program's text: what it is of by its own name, what it uses, and the computation that it calls."""

    name: str
    scope: Scope | None
    operands: list[str]
    called: str | None


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its name, the scope of each of its instructions, and those that only hold others."""

    name: str
    scopes: Mapping[str, Scope]
    containers: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> "Module":
        """From the text of a compiled program (jax.stages.Compiled.as_text).

        What fuses others is of the part of its result. Instructions that lost their names while they were optimised are of what they call;
        else of the part that holds both what they use and what uses them.
        """
        name = text.split(None, 2)[1].rstrip(",")
        computations: dict[str, list[_Instruction]] = {"": []}
        containers, computation = set(), ""
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                computation = header[1]
                computations[computation] = []
            elif found := _INSTRUCTION.match(line):
                opcode, op_name, called = (pattern.search(found[2]) for pattern in (_OPCODE, _OP_NAME, _CALLED))
                if opcode and opcode[1] in _CONTAINERS:
                    containers.add(found[1])
                operands = _OPERAND.findall(found[2][opcode.end() :].partition(")")[0]) if opcode else []
                scope = scope_of(op_name[1]) if op_name else None
                computations[computation].append(_Instruction(found[1], scope, operands, called[1] if called else None))
        scopes: dict[str, Scope] = {}
        for instructions in computations.values():
            for i in instructions:
                if i.scope is None and i.called in computations:
                    inner = [x.scope for x in computations[i.called] if x.scope]
                    i.scope = collections.Counter(inner).most_common(1)[0][0] if inner else None
            scopes |= _with_neighbours(instructions)
        return cls(name, scopes, frozenset(containers))


def _with_neighbours(instructions: Sequence[_Instruction]) -> dict[str, Scope]:
    """The scopes of a computation's instructions, which come in the order in which they may run."""
    used: dict[str, Scope | None] = {}
    for i in instructions:
        used[i.name] = i.scope or _common([s for o in i.operands if (s := used.get(o))])
    using: dict[str, list[Scope]] = collections.defaultdict(list)
    out = {}
    for i in reversed(instructions):
        after = _common(using[i.name])
        for operand in i.operands:
            if scope := i.scope or after:
                using[operand].append(scope)
        around = [s for s in (used[i.name], after) if s]
        out[i.name] = i.scope or _common(around) or (around[0] if around else Scope(path=OTHER))
    return out


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """An instruction that ran: in which program, from when to when in nanoseconds."""

    name: str
    module: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """operations: of all devices. windows: by name of the annotation, from when to when in nanoseconds."""

    operations: Sequence[Operation]
    windows: Mapping[str, Sequence[tuple[float, float]]]


@contextlib.contextmanager
def tracing(folder: Path) -> Iterator[None]:
    """Write a trace of what runs inside into a folder, which Perfetto and XProf read."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it takes time of its own
    jax.profiler.start_trace(str(folder), profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def read_trace(folder: Path, windows: Iterable[str]) -> Trace:
    """The newest trace in a folder. windows: names of the TraceAnnotations that are wanted."""
    newest = max(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in windows}
    operations: dict[bool, list[Operation]] = {True: [], False: []}  # by whether a device other than the host tells them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the types that jaxlib's reader makes
        for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
            device = plane.name.startswith("/device:")
            for line in plane.lines:
                for event in line.events:
                    start, end = event.start_ns, event.start_ns + event.duration_ns
                    if event.name in found:
                        found[event.name].append((start, end))
                        continue
                    facts = _facts(event)
                    if "hlo_op" in facts:
                        module = facts.get("hlo_module", "")
                        operations[device].append(Operation(facts["hlo_op"], module, start, end))
    return Trace(operations=operations[True] or operations[False], windows=found)


def _facts(event: Any) -> dict[str, str]:
    """Of an event, those that name an instruction; "end: x" is no work of x but the note that it has ended."""
    if event.name.startswith("end: "):
        return {}
    return {name: str(value) for name, value in event.stats if name in ("hlo_op", "hlo_module")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attribution:
    """Where the wall time of windows went, in nanoseconds.

    scopes: by path of the model's parts. layers: by number, of what is of one layer. between: while a program ran, but none of its
    instructions. outside: before, between and after programs: the host's.
    """

    wall: float
    scopes: dict[str, float]
    layers: dict[int, float]
    between: float
    outside: float

    @property
    def accounted(self) -> float:
        """Share of the wall time that instructions took."""
        return sum(self.scopes.values()) / self.wall if self.wall else 0.0


def attribute(trace: Trace, window: str, modules: Iterable[Module]) -> Attribution:
    """The time of all windows of a name by parts of the model. modules: the programs that ran; another one is a part by its name."""
    known = {module.name: module for module in modules}
    total = Attribution(wall=0, scopes={}, layers={}, between=0, outside=0)
    for start, end in trace.windows[window]:
        inside = [o for o in trace.operations if o.end > start and o.start < end]
        total = _added(total, _attribute(inside, start, end, known))
    return total


def _attribute(operations: Sequence[Operation], start: float, end: float, known: Mapping[str, Module]) -> Attribution:
    scope = functools.cache(lambda module, name: _scope(known, module, name))
    edges: list[tuple[float, int, Scope]] = []
    first, last = end, start
    for operation in operations:
        first, last = min(first, operation.start), max(last, operation.end)
        found = scope(operation.module, operation.name)
        if found is not None and operation.end > operation.start:
            edges.append((max(operation.start, start), 1, found))
            edges.append((min(operation.end, end), -1, found))
    edges.sort(key=lambda edge: edge[:2])
    scopes: dict[str, float] = collections.defaultdict(float)
    layers: dict[int, float] = collections.defaultdict(float)
    running: collections.Counter[Scope] = collections.Counter()
    count, before = 0, start
    for at, change, which in edges:
        if count and at > before:
            for active, times in running.items():
                share = (at - before) * times / count
                scopes[active.path] += share
                if active.layer is not None:
                    layers[active.layer] += share
        count, before = count + change, at
        running[which] += change
        if not running[which]:
            del running[which]
    programs = max(0.0, min(last, end) - max(first, start))
    return Attribution(
        wall=end - start,
        scopes=dict(scopes),
        layers=dict(layers),
        between=max(0.0, programs - sum(scopes.values())),
        outside=end - start - programs,
    )


def _scope(known: Mapping[str, Module], module: str, name: str) -> Scope | None:
    """Of an instruction in a trace, None for one that only holds others."""
    program = known.get(module)
    if program is None:
        return Scope(path=f"program {module.removeprefix('jit_') or '?'}")
    return None if name in program.containers else program.scopes.get(name, Scope(path=OTHER))


def _added(a: Attribution, b: Attribution) -> Attribution:
    joined = lambda x, y: {key: x.get(key, 0.0) + y.get(key, 0.0) for key in x.keys() | y.keys()}
    return Attribution(
        wall=a.wall + b.wall,
        scopes=joined(a.scopes, b.scopes),
        layers=joined(a.layers, b.layers),
        between=a.between + b.between,
        outside=a.outside + b.outside,
    )
