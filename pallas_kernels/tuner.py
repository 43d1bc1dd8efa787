"""Looking for better tiles: which kernels a program calls, what tiles they could take, which of those are legal, and which is fastest.

The calls are found by tracing any function that uses operations; each is then run alone, on arrays in the shapes that were traced. A tile
is legal where the kernel compiles for the GPU without spilled registers, within its shared memory, and gives what the default tile gives.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import registry, tuning
from pallas_kernels.deviceless import Compiled, Kernel, inspect, is_ours, lower_for
from pallas_kernels.errors import BackendError
from pallas_kernels.gpus import describe
from pallas_kernels.layer_cache import LayerCache

ROUNDS = 4  # of moves to a better neighbour
GAIN = 0.98  # of the time: what is less is noise
AGREEMENT = 2e-2  # of the largest value: as much as two bfloat16 roundings
STRIDE = {"warps": (1, 32), "stages": (1, 8)}  # least and most; other fields are any powers of two
REPEATS, RUNS = 50, 5


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an implementation as it was traced. leaves: of its arguments, arrays as jax.ShapeDtypeStruct."""

    implementation: registry.Implementation
    tree: jax.tree_util.PyTreeDef
    leaves: tuple[Any, ...]
    paths: tuple[str, ...]

    @classmethod
    def of(cls, implementation: registry.Implementation, args: tuple, kwargs: dict[str, Any]) -> "Call":
        found, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
        abstract = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if isinstance(a, jax.Array | np.ndarray) else a
        paths = tuple(jax.tree_util.keystr(path) for path, _ in found)
        return cls(implementation, tree, tuple(abstract(leaf) for _, leaf in found), paths)

    @property
    def operands(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, jax.ShapeDtypeStruct))

    def __call__(self, *arrays):
        """The implementation's results for these operands."""
        rest = iter(arrays)
        leaves = [next(rest) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in self.leaves]
        args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return self.implementation.function(*args, **kwargs)

    def arrays(self, rng: np.random.Generator) -> tuple[jax.Array, ...]:
        """Operands as in use: a full cache, rows spread over all experts, random numbers."""
        named = list(zip(self.paths, self.leaves, strict=True))
        keys = [leaf.shape[2] for path, leaf in named if path.endswith(".k") and len(getattr(leaf, "shape", ())) == 4]
        if self.implementation.op == "latent_attention":
            keys = [leaf.shape[1] for path, leaf in named if path == "[0][1]"]
        return tuple(
            _filled(path, leaf, keys[0] if keys else 1, self, rng)
            for path, leaf in named
            if isinstance(leaf, jax.ShapeDtypeStruct)
        )


def _filled(path: str, a: jax.ShapeDtypeStruct, keys: int, call: Call, rng: np.random.Generator) -> jax.Array:
    dtype = np.dtype(a.dtype)
    if dtype.kind == "b":
        return jnp.ones(a.shape, bool)
    if path.endswith("['positions']"):
        first = max(0, keys - a.shape[-1])
        return jnp.broadcast_to(first + jnp.arange(a.shape[-1], dtype=dtype), a.shape)
    if path.endswith("['rows']"):
        return jnp.arange(a.size, dtype=dtype).reshape(a.shape)
    if path.endswith("['window']"):
        return jnp.full(a.shape, np.iinfo(np.int32).max, dtype)
    if call.implementation.op == "grouped_matmul" and path in ("[0][2]", "[0][4]"):  # rows of each expert, and which they are
        given = dict(zip(call.paths, call.leaves, strict=True))
        rows = given.get("[0][4]", given["[0][0]"]).shape[0]
        if path == "[0][4]":
            return jnp.arange(rows, dtype=dtype) % given["[0][0]"].shape[0]
        return jnp.asarray(rows // a.size + (np.arange(a.size) < rows % a.size), dtype)
    if call.implementation.op == "sort_tokens":
        count = next(leaf for leaf in call.leaves if isinstance(leaf, int))
        return jnp.asarray(rng.integers(0, count, a.shape, dtype))
    if jnp.issubdtype(dtype, jnp.floating):
        scale = 0.01 if "scale" in path else 1.0
        return jnp.asarray(scale * rng.standard_normal(a.shape, np.float32)).astype(dtype)
    if dtype in (np.int8, np.uint8):
        return jnp.asarray(rng.integers(np.iinfo(dtype).min + 1, np.iinfo(dtype).max, a.shape, dtype))
    return jnp.zeros(a.shape, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A tile to look for. op: whose tile it is. key: what tells it apart. default: what the heuristic takes. call: what runs with it."""

    op: str
    key: Mapping[str, Any]
    default: Any
    call: Call


class _Recorder:
    def __init__(self) -> None:
        self.tasks: dict[tuple, Task] = {}
        self._calls: list[Call] = []

    @contextlib.contextmanager
    def call(self, implementation: registry.Implementation, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        self._calls.append(Call.of(implementation, args, kwargs))
        try:
            yield
        finally:
            self._calls.pop()

    def tile(self, op: str, key: Mapping[str, Any], tile: Any) -> None:
        if self._calls:
            known = op, tuple(sorted(key.items()))
            self.tasks.setdefault(known, Task(op=op, key=dict(key), default=tile, call=self._calls[-1]))


def record(trace: Callable[[], Any]) -> list[Task]:
    """The tiles that kernels ask for while `trace` traces programs, each once, in the order in which they come."""
    recorder = _Recorder()
    with registry.observing(recorder), tuning.watching(recorder):
        trace()
    return list(recorder.tasks.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A tile that was looked at. refusal: why it is not legal, or None. seconds: of a call, None where nothing was run."""

    tile: Any
    kernels: tuple[Kernel, ...] = ()
    refusal: str | None = None
    seconds: float | None = None


def neighbours(tile: Any) -> list[Any]:
    """Tiles that differ from this one by one step in one field: a factor of two, in stages one."""
    found = []
    for field in dataclasses.fields(tile):
        value = getattr(tile, field.name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        least, most = STRIDE.get(field.name, (1, 1 << 20))
        steps = (value - 1, value + 1) if field.name == "stages" else (value // 2, value * 2)
        found += [dataclasses.replace(tile, **{field.name: n}) for n in steps if least <= n <= most]
    return found


def candidates(task: Task, gpu: str) -> list[Candidate]:
    """The default tile and its neighbours, compiled for a GPU that need not be here. gpu: one of `gpus.KNOWN`."""

    def judged(tile) -> Candidate:
        return _judged(task, tile, lambda: inspect(lower_for(gpu, task.call, *task.call.operands)))[0]

    return [judged(tile) for tile in (task.default, *neighbours(task.default))]


def _judged(task: Task, tile: Any, make: Callable[[], Compiled]) -> tuple[Candidate, Compiled | None]:
    """make: compiles the task's call, or a program around it."""
    fields = {f.name: getattr(tile, f.name) for f in dataclasses.fields(tile)}
    try:
        with tuning.tiles({task.op: fields}, key=task.key):
            compiled = make()
    except Exception as error:  # whatever Pallas, Triton, XLA or ptxas has against it
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Candidate(tile=tile, refusal=lines[0][:300]), None
    kernels = tuple(kernel for kernel in compiled.kernels if is_ours(kernel))
    spilled = max((kernel.spilled for kernel in kernels), default=0)
    refusal = f"{spilled} bytes of registers are spilled" if spilled else None
    return Candidate(tile=tile, kernels=kernels, refusal=refusal), compiled


type Timer = Callable[[jax.stages.Compiled, Sequence[Any]], float]


def clock(executable: jax.stages.Compiled, arguments: Sequence[Any]) -> float:
    """Seconds that the executable takes: the median of some runs after a first one."""
    jax.block_until_ready(executable(*arguments))
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        jax.block_until_ready(executable(*arguments))
        times.append(time.perf_counter() - start)
    return sorted(times)[RUNS // 2]


def updates(results: Any, args: Any) -> dict[int, int]:
    """For each array of results that takes the place of one of args, the number of the one and of the other: those of a cache."""

    def of_caches(tree) -> list[tuple[int, Any]]:
        found, number = [], 0
        for node in jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, LayerCache)):
            arrays = [a for a in jax.tree.leaves(node) if hasattr(a, "dtype")]
            if isinstance(node, LayerCache):
                found += [(number + i, (a.shape, a.dtype)) for i, a in enumerate(arrays)]
            number += len(arrays)
        return found

    made, given = of_caches(results), of_caches(args)
    alike = [shape for _, shape in made] == [shape for _, shape in given]
    return {i: j for (i, _), (j, _) in zip(made, given, strict=True)} if alike else {}


def repeated(
    call: Callable[..., Any], sets: int, repeats: int = REPEATS, places: Mapping[int, int] = MappingProxyType({})
) -> Callable[..., Any]:
    """A program that makes a call `repeats` times for each of `sets` sets of operands, one after the other, and gives the results of the
    last time. places: see `updates`; such a result is the operand of the next time, as in a decode loop: what is written in place is not
    copied before."""

    def run(*operands):
        each = len(operands) // sets
        leaves, tree = jax.tree.flatten(jax.eval_shape(call, *operands[:each]))

        def body(_, carry):
            # what went before is made to matter, or XLA would take a call that is always the same out of the loop
            args, before = jax.lax.optimization_barrier(carry)
            args, found = list(args), []
            for first in range(0, len(args), each):
                made = jax.tree.leaves(call(*args[first : first + each]))
                for number, operand in places.items():
                    args[first + operand] = made[number]
                found += [a for i, a in enumerate(made) if i not in places]
            return tuple(args), _mixed(found, before)

        others = [jnp.zeros(a.shape, a.dtype) for i, a in enumerate(leaves) if i not in places]
        args, found = jax.lax.fori_loop(0, repeats, body, (operands, others * sets))
        rest = iter(found)
        whole = lambda first: [args[first + places[i]] if i in places else next(rest) for i in range(len(leaves))]
        return [jax.tree.unflatten(tree, whole(first)) for first in range(0, len(args), each)]

    return run


def _mixed(new, before):
    return jax.lax.optimization_barrier((new, before))[0]


def best(task: Task, *, timer: Timer = clock, repeats: int = REPEATS) -> list[Candidate]:
    """Measure the default tile, and go from neighbour to better neighbour: all that was tried, the fastest legal one first.

    Runs on the default device. Operands are so many that they do not stay in its second-level cache, as those of a model do not.
    repeats: of a call within what the timer is given. Raises BackendError where the default tile is not legal.
    """
    device = jax.local_devices()[0]
    call, rng = task.call, np.random.default_rng(0)
    size = sum(a.size * np.dtype(a.dtype).itemsize for a in call.operands)
    sets = min(8, max(1, -(-2 * describe(device.device_kind).l2 // max(1, size))))
    operands = tuple(itertools.chain.from_iterable(call.arrays(rng) for _ in range(sets)))
    arguments = jax.tree.unflatten(call.tree, call.leaves)
    places = updates(jax.eval_shape(lambda *a: call(*a), *call.operands), arguments)
    wanted: list[Any] = []
    tried: dict[Any, Candidate] = {}

    def judge(tile) -> None:
        # functions of their own, since jax's caches do not know the tile of a function that was traced
        program = jax.jit(repeated(lambda *a: call(*a), sets, repeats, places))
        found, compiled = _judged(task, tile, lambda: inspect(program.lower(*operands)))
        if compiled is not None and found.refusal is None:
            results = [np.asarray(a) for a in jax.tree.leaves(compiled.executable(*operands))]
            if not wanted:
                wanted.extend(results)
            if _agree(results, wanted):
                seconds = timer(compiled.executable, operands) / (repeats * sets)
                found = dataclasses.replace(found, seconds=seconds)
            else:
                found = dataclasses.replace(found, refusal="its results are not those of the default tile")
        tried[tile] = found

    judge(task.default)
    if (reason := tried[task.default].refusal) is not None:
        raise BackendError(f"{task.op}: its own tile {task.default} is not legal here: {reason}")
    fastest = lambda: min((c for c in tried.values() if c.seconds is not None), key=lambda c: c.seconds or 0.0)
    for _ in range(ROUNDS):
        before = fastest()
        for tile in neighbours(before.tile):
            if tile not in tried:
                judge(tile)
        if (fastest().seconds or 0.0) > GAIN * (before.seconds or 0.0):
            break
    return sorted(tried.values(), key=lambda c: (c.seconds is None, c.seconds or 0.0))


def entry(task: Task, measured: Sequence[Candidate]) -> tuning.Entry:
    """What to store of a search."""
    default = next(c.seconds for c in measured if c.tile == task.default)
    chosen = measured[0]
    if default is None or chosen.seconds is None:
        raise BackendError(f"{task.op}: nothing was measured")
    # within the noise the heuristic stays
    if chosen.seconds > GAIN * default:
        chosen = dataclasses.replace(chosen, tile=task.default, seconds=default)
    fields = {f.name: getattr(chosen.tile, f.name) for f in dataclasses.fields(chosen.tile)}
    return tuning.Entry(key=task.key, tile=fields, seconds=chosen.seconds or default, default_seconds=default)


def _agree(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> bool:
    """Whether floats are those that are wanted; whole numbers may follow from them, so they are not compared."""
    for f, w in zip(found, wanted, strict=True):
        if not jnp.issubdtype(w.dtype, jnp.floating):
            continue
        f, w = f.astype(np.float64), w.astype(np.float64)
        finite = np.isfinite(w)
        if not np.array_equal(finite, np.isfinite(f)):
            return False
        if np.abs(np.where(finite, f - w, 0)).max(initial=0) > AGREEMENT * np.abs(np.where(finite, w, 0)).max(initial=0):
            return False
    return True
