"""The compiled programs of a placed model: prefill, insert, decode, free, score, each one jax.jit over one jax.shard_map.

Arguments are arrays; what makes another program is a shape, or a keyword here.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxinfer import generation
from jaxinfer.generation import Prefix, State
from jaxinfer.placement import Placed, local_layers
from sharding.rules import DATA, STAGE, TENSOR_AXES

# Prefix trees of partition specs. Sequences are split over data shards. Rows of a cache are split over stages too, its heads over tensor
# shards; what waits at a stage's door is the stage's own.
ROWS, SLOTS = P(DATA), P(None, DATA)  # of arrays [B, ...] and [M, B, ...]
CACHE = P((STAGE, DATA), TENSOR_AXES)
_OWN: dict[str, Any] = {"caches": CACHE, "hidden": P((STAGE, DATA)), "valid": P((STAGE, DATA)), "tick": P()}
STATE = State(**{name: _OWN.get(name, SLOTS) for name in State.__dataclass_fields__})
PREFIX = Prefix(**{name: _OWN.get(name, ROWS) for name in Prefix.__dataclass_fields__})


def _once(build: Callable) -> Callable:
    """A method that builds a program, run once per instance and arguments."""

    @functools.wraps(build)
    def get(self, *static):
        key = (build.__name__, *static)
        if key not in self.built:
            self.built[key] = build(self, *static)
        return self.built[key]

    return get


class Programs:
    """cache_dtype: of keys and values."""

    def __init__(self, placed: Placed, *, cache_dtype):
        self.mesh, self.plan, self.weights = placed.mesh, placed.plan, placed.specs
        self.cache_dtype = cache_dtype
        self.built: dict[tuple, Callable] = {}

    def _jit(self, function: Callable, in_specs, out_specs, donate=()):
        sharded = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(sharded, donate_argnums=donate)

    def _model(self, function: Callable, **static):
        """A function of weights as the model sees them, without the stage axis."""
        return lambda weights, *arrays: function(local_layers(weights), *arrays, plan=self.plan, **static)

    @_once
    def prefill(self, top: int):
        """(weights, tokens [B, T], lengths [B], sampling) -> Prefix."""
        run = self._model(generation.prefill, cache_dtype=self.cache_dtype, top=top)
        return self._jit(run, (self.weights, ROWS, ROWS, ROWS), PREFIX)

    @_once
    def insert(self):
        """(Prefix, State, slots [B], each counted within its data shard) -> State, donated."""
        return self._jit(functools.partial(generation.insert, plan=self.plan), (PREFIX, STATE, ROWS), STATE, donate=1)

    @_once
    def decode(self, top: int):
        """(weights, State, steps) -> (State, Emitted); the state is donated."""
        run = self._model(generation.decode, top=top)
        return self._jit(run, (self.weights, STATE, P()), (STATE, SLOTS), donate=1)

    @_once
    def free(self):
        """(State, slots [1] of each data shard) -> State, donated."""
        return self._jit(functools.partial(generation.free, plan=self.plan), (STATE, ROWS), STATE, donate=0)

    @_once
    def state(self, batch: int, tokens: int):
        """() -> an empty State of `batch` sequences per micro-batch and data shard, each of at most `tokens` tokens."""
        make = functools.partial(generation.empty_state, self.plan, batch=batch, tokens=tokens, cache_dtype=self.cache_dtype)
        return self._jit(make, (), STATE)

    @_once
    def grow(self, batch: int, tokens: int):
        """State -> a State of `batch` sequences per micro-batch and data shard, of `tokens` tokens each, with the same sequences."""
        make = functools.partial(generation.grow, plan=self.plan, batch=batch, tokens=tokens, cache_dtype=self.cache_dtype)
        return self._jit(make, (STATE,), STATE)

    @_once
    def score(self):
        """(weights, tokens [B, T], lengths [B]) -> Scores."""
        return self._jit(self._model(generation.score), (self.weights, ROWS, ROWS), ROWS)
