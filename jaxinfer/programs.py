"""The compiled programs of a placed model: prefill, insert, decode, free, score, each one jax.jit over one jax.shard_map.

Arguments are arrays; what makes another program is a shape, or a keyword here. Engines whose programs would be the same share them, so
that a second one neither traces nor compiles.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer import generation
from jaxinfer.generation import Prefix, State
from jaxinfer.placement import Placed, local_layers
from jaxinfer.sampling import NumberedProcessors
from pallas_kernels import registry
from pallas_kernels.precision import JAX_NAMES
from sharding.distributed import channel, spans_processes
from sharding.overlap import overlap_options
from sharding.rules import ROW_AXES, STAGE, TENSOR_AXES

# Prefix trees of partition specs. Sequences are split over data and expert shards. Rows of a cache are split over stages too, its heads
# over tensor shards; what waits at a stage's door is the stage's own.
ROWS, SLOTS = P(ROW_AXES), P(None, ROW_AXES)  # of arrays [B, ...] and [M, B, ...]
CACHE = P((STAGE, *ROW_AXES), TENSOR_AXES)
_OWN: dict[str, Any] = {"caches": CACHE, "hidden": P((STAGE, *ROW_AXES)), "valid": P((STAGE, *ROW_AXES)), "tick": P()}
STATE = State(**{name: _OWN.get(name, SLOTS) for name in State.__dataclass_fields__})
PREFIX = Prefix(**{name: _OWN.get(name, ROWS) for name in Prefix.__dataclass_fields__})


type Signature = tuple[tuple[tuple[int, ...], np.dtype], ...]  # shapes and dtypes of arguments


class Ready(Protocol):
    """An executable that was made before the first call, or is being made. result() waits for it; a concurrent Future is one.

    It may have `shapes`, a tree of ShapeDtypeStructs of what it gives, known before it is there.
    """

    def result(self) -> Callable: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A function of arrays, the partition specs of what it takes and gives (prefix trees), and which argument is donated."""

    function: Callable
    inputs: tuple
    outputs: Any
    donate: int | tuple[()] = ()


class Program:
    """A function over a mesh, compiled for the shapes that it meets: by jax.jit at their first call, or before it.

    name, static: which program of a model it is. weights: whether its first argument is the model's weights, whose shapes are always the
    same. precision: EngineConfig.matmul_precision; None leaves jax's setting as it is. kernels: see EngineConfig. ready: executables for
    some shapes of its arguments; others go through jax.jit, which has compiled for those of `met`. coming: work that is finding out what
    `ready` should have.
    """

    def __init__(
        self,
        name: str,
        static: Mapping[str, Any],
        recipe: Recipe,
        *,
        mesh: Mesh,
        weights: bool,
        precision: str | None = None,
        kernels: str = "auto",
        coming: Sequence[concurrent.futures.Future] = (),
    ):
        self.name, self.static, self.mesh, self.weights = name, dict(static), mesh, weights
        self.ready: dict[Signature, Ready] = {}
        self.met: set[Signature | None] = set()
        self.coming = coming
        self._begun: set[Signature] = set()
        # not for devices that are only described, to compile for
        self._with_others = spans_processes(mesh) and jax.process_count() > 1
        self._inputs = recipe.inputs
        function = _named(recipe.function, name, precision, without=("native", "pallas") if kernels == "xla" else ())
        sharded = jax.shard_map(function, mesh=mesh, in_specs=recipe.inputs, out_specs=recipe.outputs, check_vma=False)
        self._nested: Any = jax.jit(sharded, donate_argnums=recipe.donate)
        # collectives are in programs of weights; jax takes options in no function that another one is traced with
        options = overlap_options(mesh) if weights else {}
        self._jitted: Any = self._nested
        if options:
            self._jitted = jax.jit(sharded, donate_argnums=recipe.donate, compiler_options=options)

    def __call__(self, *arguments):
        if self._with_others or self.ready or self.coming or self._jitted is not self._nested:
            signature = self.signature(arguments)
            if signature is None:
                return self._nested(*arguments)
            if self._with_others:
                self._begin(signature, arguments)
            found = self._find(signature)
            if found is not None:
                return found.result()(*arguments)
        known = self._jitted._cache_size()
        result = self._jitted(*arguments)
        if self._jitted._cache_size() != known:
            self.met.add(self.signature(arguments))
        return result

    def _begin(self, signature: Signature, arguments: tuple) -> None:
        """Before the first run for some shapes: compile it, and wait for the processes that have not yet. Once one runs, Gloo waits half a
        minute for the others, and compiling takes longer where a cache is cold or a machine is busy."""
        if signature in self._begun:
            return
        found = self._find(signature)
        if found is None:
            made: concurrent.futures.Future = concurrent.futures.Future()
            made.set_result(self._jitted.lower(*arguments).compile())
            self.ready[signature] = found = made
        found.result()
        channel("first runs of programs").exchange()
        self._begun.add(signature)

    def _find(self, signature: Signature) -> Ready | None:
        if signature not in self.ready and signature not in self.met:
            concurrent.futures.wait(list(self.coming))
        return self.ready.get(signature)

    def signature(self, arguments: tuple) -> Signature | None:
        """What tells the executables of this program apart; None where jax is tracing."""
        leaves = jax.tree.leaves(arguments[1:] if self.weights else arguments)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return None
        return tuple((leaf.shape, leaf.dtype) for leaf in leaves)

    def abstract(self, *arguments) -> tuple:
        """The shapes and dtypes of arguments, sharded as the program takes them."""
        return tuple(_sharded(self.mesh, specs, tree) for specs, tree in zip(self._inputs, arguments, strict=True))

    def trace(self, *arguments) -> jax.stages.Traced:
        """As of jax.jit, for arrays or ShapeDtypeStructs."""
        return self._jitted.trace(*arguments)

    def lower(self, *arguments) -> jax.stages.Lowered:
        """As of jax.jit, for arrays or ShapeDtypeStructs."""
        return self._jitted.lower(*arguments)


def _named(function: Callable, name: str, precision: str | None, without: Sequence[str]) -> Callable:
    """The function under a name of its own, which compiled modules and profiles carry, with a precision and a choice of kernels."""

    def run(*arguments):
        precise = contextlib.nullcontext() if precision is None else jax.default_matmul_precision(JAX_NAMES[precision])
        with precise, registry.using(without=without):
            return function(*arguments)

    run.__name__ = run.__qualname__ = name
    return run


def _sharded(mesh: Mesh, specs, tree):
    """ShapeDtypeStructs of a tree under a prefix tree of partition specs."""
    abstract = lambda spec, a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(lambda spec, part: jax.tree.map(functools.partial(abstract, spec), part), specs, tree)


OWN_PROGRAMS = 64  # with users' functions, that an engine keeps
SHARED_SETS = 8  # of programs that are kept; what an engine uses lives as long as the engine


@dataclasses.dataclass(frozen=True)
class _Set:
    """Programs by name and keywords, and the work that makes some of them ready."""

    built: dict[tuple, Program] = dataclasses.field(default_factory=dict)
    coming: list[concurrent.futures.Future] = dataclasses.field(default_factory=list)


_shared: collections.OrderedDict[Hashable, _Set] = collections.OrderedDict()
_lock = threading.Lock()


def _programs_of(key: Hashable) -> _Set:
    """The programs that were built for a key, the same for all who ask while it is among the last few."""
    with _lock:
        found = _shared.setdefault(key, _Set())
        _shared.move_to_end(key)
        while len(_shared) > SHARED_SETS:
            _shared.popitem(last=False)
        return found


def _once(build: Callable[..., Recipe]) -> Callable[..., Program]:
    """A method that makes a program of its keywords, once for each of them."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def get(self: "Programs", *arguments, **keywords) -> Program:
        bound = signature.bind(self, *arguments, **keywords)
        bound.apply_defaults()
        static = {name: value for name, value in bound.arguments.items() if name != "self"}
        key = (build.__name__, *static.values())
        built = self._own if static.get("processors") else self.built
        found = built.get(key)
        if found is None:
            with _lock:
                if (found := built.get(key)) is None:
                    recipe = build(self, **static)
                    weights = bool(recipe.inputs) and recipe.inputs[0] is self.specs
                    found = built[key] = Program(
                        build.__name__,
                        static,
                        recipe,
                        mesh=self.mesh,
                        weights=weights,
                        precision=self.matmul_precision,
                        kernels=self.kernels,
                        coming=self.coming,
                    )
                    while len(self._own) > OWN_PROGRAMS:
                        del self._own[next(iter(self._own))]
        return found

    return get


def settings() -> dict[str, Any]:
    """The settings of jax that make another program."""
    return {name: getattr(jax.config, f"jax_{name}") for name in ("enable_x64", "default_matmul_precision")}


class Programs:
    """The programs of a model. placed may hold ShapeDtypeStructs.

    cache_dtype: of keys and values. matmul_precision: see EngineConfig, None leaves jax's setting as it is. kernels,
    prefill_chunk: see EngineConfig. shapes: of the weights, ShapeDtypeStructs with their shardings. built: those that were asked
    for so far, also by other engines; what holds a user's function is not among them. coming: work that makes some ready, which calls of
    others wait for.
    """

    def __init__(
        self,
        placed: Placed,
        *,
        cache_dtype,
        matmul_precision: str | None = None,
        kernels: str = "auto",
        prefill_chunk: int | None = None,
    ):
        self.mesh, self.plan, self.specs = placed.mesh, placed.plan, placed.specs
        self.cache_dtype, self.matmul_precision, self.kernels = np.dtype(cache_dtype), matmul_precision, kernels
        self.prefill_chunk = prefill_chunk
        self.shapes = _sharded(self.mesh, self.specs, placed.weights)
        leaves, tree = jax.tree.flatten(self.shapes)
        weights = tuple((a.shape, a.dtype, a.sharding.spec) for a in leaves)
        chosen = tuple(i for op in registry.operations() for i in registry.implementations(op))
        arithmetic = (self.plan, self.cache_dtype, matmul_precision, kernels, prefill_chunk, chosen, tuple(settings().items()))
        self._own: dict[tuple, Program] = {}
        shared = _programs_of((self.mesh, tree, weights, arithmetic))
        self.built, self.coming = shared.built, shared.coming

    def _model(self, function: Callable, **static):
        """A function of weights as the model sees them, without the stage axis."""
        return lambda weights, *arrays: function(local_layers(weights), *arrays, plan=self.plan, **static)

    @_once
    def prefill(self, top: int, prompt: int | None = None, processors: NumberedProcessors = (), shared: bool = False) -> Recipe:
        """(weights, tokens [B, T], lengths [B], sampling [B]) -> Prefix. shared: a further argument says which row each of N sequences
        continues, [N], counted within its data shard, and sampling is [N]."""
        static = {"cache_dtype": self.cache_dtype, "top": top, "prompt": prompt, "processors": processors}
        static |= {"chunk": self.prefill_chunk}
        run = self._model(generation.prefill, **static)
        return Recipe(function=run, inputs=(self.specs, ROWS, ROWS, ROWS, *([ROWS] if shared else [])), outputs=PREFIX)

    @_once
    def insert(self) -> Recipe:
        """(Prefix, State, slots [B], each counted within its data shard) -> State, donated."""
        return Recipe(
            function=functools.partial(generation.insert, plan=self.plan), inputs=(PREFIX, STATE, ROWS), outputs=STATE, donate=1
        )

    @_once
    def decode(self, top: int, processors: NumberedProcessors = ()) -> Recipe:
        """(weights, State, steps) -> (State, Emitted); the state is donated."""
        run = self._model(generation.decode, top=top, processors=processors)
        return Recipe(function=run, inputs=(self.specs, STATE, P()), outputs=(STATE, SLOTS), donate=1)

    @_once
    def free(self) -> Recipe:
        """(State, slots [1] of each data shard) -> State, donated."""
        return Recipe(
            function=functools.partial(generation.free, plan=self.plan), inputs=(STATE, ROWS), outputs=STATE, donate=0
        )

    @_once
    def state(self, batch: int, tokens: int) -> Recipe:
        """() -> an empty State of `batch` sequences per micro-batch and data shard, each of at most `tokens` tokens."""
        make = functools.partial(generation.empty_state, self.plan, batch=batch, tokens=tokens, cache_dtype=self.cache_dtype)
        return Recipe(function=make, inputs=(), outputs=STATE)

    @_once
    def grow(self, batch: int, tokens: int) -> Recipe:
        """State -> a State of `batch` sequences per micro-batch and data shard, of `tokens` tokens each, with the same sequences; both
        without caches, see `grow_cache`."""
        make = functools.partial(generation.grow, plan=self.plan, batch=batch, tokens=tokens, cache_dtype=self.cache_dtype)
        return Recipe(function=make, inputs=(STATE,), outputs=STATE)

    @_once
    def grow_cache(self, batch: int, tokens: int) -> Recipe:
        """The cache of a layer slot -> the one of a state that `grow` gives."""
        sizes = {"batch": batch, "tokens": tokens, "cache_dtype": self.cache_dtype}
        return Recipe(
            function=functools.partial(generation.grow_cache, plan=self.plan, **sizes), inputs=(CACHE,), outputs=CACHE
        )

    @_once
    def score(self) -> Recipe:
        """(weights, tokens [B, T], lengths [B]) -> Scores."""
        return Recipe(
            function=self._model(generation.score, chunk=self.prefill_chunk), inputs=(self.specs, ROWS, ROWS), outputs=ROWS
        )

    @_once
    def forward(self) -> Recipe:
        """(weights, tokens [B, T], lengths [B]) -> logits float32 [B, T, V]."""
        return Recipe(function=self._model(generation.forward), inputs=(self.specs, ROWS, ROWS), outputs=ROWS)
