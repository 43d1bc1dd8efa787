"""An engine's programs called by hand, with every slot in use, for benchmarks and profiles: what runs is what `generate` runs."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.ahead import Need
from jaxinfer.bandwidth import read_bandwidth
from jaxinfer.engine import Engine
from jaxinfer.generation import Prefix, State
from jaxinfer.models.decoder import attention_half, mlp_half, slot_window
from jaxinfer.models.positions import rope_angles
from jaxinfer.placement import local_layers
from jaxinfer.programs import CACHE, ROWS, Program
from jaxinfer.sampling import SamplingArrays
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.slots import bucket
from pallas_kernels.cpu import library
from pallas_kernels.layer_cache import token_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median=statistics.median(values), least=min(values), most=max(values), count=len(values))

    def each(self, change: Callable[[float], float]) -> "Spread":
        """The same of another quantity, which grows or falls with this one."""
        ends = change(self.least), change(self.most)
        return Spread(median=change(self.median), least=min(ends), most=max(ends), count=self.count)

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": self.least, "max": self.most, "count": self.count}


def timed(run: Callable[[], Any], repetitions: int) -> Spread:
    """Seconds of calls until their results are there, after one that is not counted and may compile."""
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return Spread.of(seconds[1:])


@dataclasses.dataclass(kw_only=True)
class Runner:
    """Calls the programs of an engine at rest on made-up prompts, all slots of a state at the same time.

    compiled: the programs that were called, by name and shapes, once `prefill` and `decode` were.
    """

    engine: Engine
    compiled: dict[tuple, jax.stages.Compiled] = dataclasses.field(default_factory=dict)

    def batch(self, sequences: int) -> int:
        """Sequences per micro-batch and data shard of the least state that holds so many."""
        return bucket(-(-sequences // self._shards), 1, self.engine.config.micro_batch_size)

    @property
    def _shards(self) -> int:
        return self.engine.stages * self.engine.data_shards

    def sequences(self, batch: int) -> int:
        """That a state of this batch holds."""
        return batch * self._shards

    def prefill(self, rows: int, tokens: int) -> Prefix:
        """Read prompts of `tokens` tokens."""
        ids = np.tile(np.arange(tokens, dtype=np.int32) * 37 % (self.engine.plan.config.vocab - 1) + 1, (rows, 1))
        params = SamplingParams(ignore_eos=True)
        # so many that none ends while it is measured
        sampling = SamplingArrays.of([params] * rows, [np.iinfo(np.int32).max] * rows, [()] * rows, rows)
        lengths = np.full((rows,), tokens, np.int32)
        return self._call(self.engine.programs.prefill(0), self.engine.params, ids, lengths, sampling)

    def state(self, prefix: Prefix, tokens: int) -> State:
        """A state whose slots are all taken by these prompts, with room for `tokens` tokens each."""
        rows = prefix.lengths.shape[0]
        batch = rows // self._shards
        slots = np.tile(np.arange(rows // self.engine.data_shards, dtype=np.int32), self.engine.data_shards)
        empty = self._call(self.engine.programs.state(batch, tokens))
        return self._call(self.engine.programs.insert(), prefix, empty, slots)

    def decode(self, state: State, steps: int) -> State:
        """So many tokens for each sequence; the state is donated."""
        return self._call(self.engine.programs.decode(0), self.engine.params, state, np.int32(steps))[0]

    def _call(self, program: Program, *arguments):
        need = Need(program=program, arguments=program.abstract(*arguments))
        key = program.name, need.signature
        if key not in self.compiled:
            self.compiled[key] = need.compile()
        return self.compiled[key](*arguments)

    def weight_bytes(self, sequences: int) -> int:
        """Of weights that a decode step of so many sequences reads on all devices together, see DecoderWeights.step_bytes: each micro-batch
        and each copy of the model reads them."""
        return self.engine.params.step_bytes(self.batch(sequences)) * self._shards

    @property
    def cache_bytes_per_token(self) -> int:
        """Of keys and values of one sequence in the whole model."""
        config = self.engine.plan.config
        return (
            config.layers * config.attention.kv_heads * token_bytes(self.engine.programs.cache_dtype, config.attention.head_dim)
        )


class Halves:
    """The half layers of an engine alone: all attentions of the model one after the other, or all MLPs. What runs in each is what runs in
    the programs; the time of one is a slot's share."""

    def __init__(self, engine: Engine):
        self.engine, self._plan, self._programs = engine, engine.plan, engine.programs

    def attention_decode(self, batch: int, context: int, tokens: int) -> Callable[[], Any]:
        """A token for each sequence of a micro-batch, after `context` others, in a cache of `tokens`."""
        caches = self._programs.state(batch, tokens)().caches
        positions = np.full((batch * self.engine.data_shards, 1), context, np.int32)
        run, kept = self._jit(self._cached, (ROWS, CACHE, ROWS), (ROWS, CACHE), donate=2), [caches]

        def call():
            out, kept[0] = run(self.engine.params, self._inputs(batch, 1), kept[0], positions)
            return out

        return call

    def attention_prefill(self, rows: int, tokens: int) -> Callable[[], Any]:
        positions = np.tile(np.arange(tokens, dtype=np.int32), (rows * self.engine.data_shards, 1))
        run = self._jit(self._fresh, (ROWS, ROWS), ROWS)
        return lambda: run(self.engine.params, self._inputs(rows, tokens), positions)

    def mlp(self, rows: int, tokens: int) -> Callable[[], Any]:
        run = self._jit(self._mlp, (ROWS,), ROWS)
        return lambda: run(self.engine.params, self._inputs(rows, tokens))

    def bytes(self, half: str) -> int:
        """Of the weights of a layer's half, "attention" or "mlp", on average."""
        layers = self.engine.params.layers
        total = sum(leaf.nbytes for layer in layers for leaf in jax.tree.leaves(getattr(layer, half)))
        return total // len(layers)

    def _inputs(self, rows: int, tokens: int) -> np.ndarray:
        rng = np.random.default_rng(0)
        return rng.standard_normal((rows * self.engine.data_shards, tokens, self._plan.config.embed), np.float32)

    def _jit(self, function: Callable, inputs: tuple, outputs, donate=()):
        specs = (self._programs.specs, *inputs)
        sharded = jax.shard_map(function, mesh=self.engine.mesh, in_specs=specs, out_specs=outputs, check_vma=False)
        return jax.jit(sharded, donate_argnums=donate)

    def _slots(self, weights):
        """(weights, keywords of `attention_half`) of every layer slot."""
        # each half by itself reads and gives whole rows, whatever the model does between them
        spec, ctx = self._plan.layer_spec, dataclasses.replace(self._plan.context, split_tokens=False)
        for slot, layer in enumerate(local_layers(weights).layers):
            yield layer, {"window": slot_window(spec, slot, ctx), "spec": spec, "ctx": ctx}

    def _angles(self, positions):
        rope = self._plan.config.attention.rope
        return rope and rope_angles(rope, positions, positions[:, -1] + 1)

    def _cached(self, weights, x, caches, positions):
        rows = None if self.engine.stages == 1 else jnp.arange(x.shape[0], dtype=jnp.int32)
        angles, new = self._angles(positions), []
        for (layer, keywords), cache in zip(self._slots(weights), caches, strict=True):
            x, cache = attention_half(layer, x, cache, angles, positions, rows, **keywords)
            new.append(cache)
        return x, tuple(new)

    def _fresh(self, weights, x, positions):
        for layer, keywords in self._slots(weights):
            x, _ = attention_half(layer, x, None, self._angles(positions), positions, None, **keywords)
        return x

    def _mlp(self, weights, x):
        for layer, keywords in self._slots(weights):
            x = mlp_half(layer, x, spec=keywords["spec"], ctx=keywords["ctx"])
        return x


def device_bandwidth(engine: Engine, repetitions: int = 10) -> float:
    """Bytes a second that the engine's devices can read from their memory together; CPU devices share that of the host."""
    devices = list(engine.mesh.devices.flat)
    if devices[0].platform == "cpu":
        return read_bandwidth(library.cores(), repetitions=repetitions) * 1e9
    array = jax.device_put(np.ones((1 << 28,), np.float32), devices[0])
    largest = jax.jit(jnp.max)
    return len(devices) * array.nbytes / timed(lambda: largest(array), repetitions).least
