"""How a model's layers lie over the stages of its pipeline, and what each stage costs."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.errors import ConfigError
from jaxinfer.generation import empty_state
from jaxinfer.layout import Plan, layer_shapes
from jaxinfer.memory import MemoryPlan
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import DecoderWeights, cached_layers
from pallas_kernels.registry import using
from sharding.context import ParallelContext
from sharding.costs import Cost, total
from sharding.mesh import row_shards
from sharding.rules import MESH_AXES, ROW_AXES, STAGE, TENSOR_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """layers: their numbers. flops, moved: operations, and bytes of weights and cache, of one decode tick, over all of the stage's tensor
    shards. nbytes: of the layers' weights, likewise. speed: of its devices, beside that of the fastest stage. seconds: of its layers, where
    they were measured."""

    layers: tuple[int, ...]
    flops: float
    moved: float
    nbytes: int
    speed: float = 1.0
    seconds: float | None = None

    @property
    def load(self) -> float:
        """How long a tick of it takes: its seconds, or the bytes that a device of the fastest stage would move in the time."""
        return self.moved / self.speed if self.seconds is None else self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageReport:
    """slots: layers that every stage has room for. held: bytes of the slots' weights on each stage, empty ones included. spread: how much
    longer the longest stage is than the mean, by its seconds or by what it moves at its speed. needed, allowed: bytes that each device is
    to hold of weights, cache and temporary arrays, and that it may; None where no memory was planned."""

    stages: tuple[Stage, ...]
    slots: int
    held: int
    needed: int | None = None
    allowed: int | None = None

    @property
    def waste(self) -> float:
        """Share of all slots that hold no layer."""
        return 1 - sum(len(stage.layers) for stage in self.stages) / (self.slots * len(self.stages))

    @property
    def spread(self) -> float:
        loads = [stage.load for stage in self.stages]
        return max(loads) * len(loads) / sum(loads) - 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self) | {"waste": self.waste, "spread": self.spread}

    def __str__(self) -> str:
        """A table."""
        measured, uneven = self.stages[0].seconds is not None, len({stage.speed for stage in self.stages}) > 1
        more = (*(("speed",) if uneven else ()), *(("ms",) if measured else ()))
        rows = [["stage", "layers", "GFLOP", "MB moved", "MB weights", *more]]
        for number, stage in enumerate(self.stages):
            layers = f"{stage.layers[0]}-{stage.layers[-1]}"
            row = [str(number), layers, f"{stage.flops / 1e9:.4g}", f"{stage.moved / 1e6:.4g}", f"{stage.nbytes / 1e6:.4g}"]
            row += [f"{stage.speed:.3g}"] if uneven else []
            row += [] if stage.seconds is None else [f"{stage.seconds * 1e3:.4g}"]
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        shares = f"spread {self.spread:.1%}, empty slots {self.waste:.1%}, {self.held / 1e6:.4g} MB of slots on each stage"
        if self.needed is not None and self.allowed is not None:
            shares += f"; each device needs {self.needed / 1e6:.4g} of {self.allowed / 1e6:.4g} MB"
        return "\n".join([*lines, shares])


def stage_report(
    plan: Plan,
    weights: DecoderWeights,
    *,
    batch: int,
    context: int,
    item: float,
    layer_seconds: Sequence[float] | None = None,
    seconds: Sequence[float] | None = None,
    memory: MemoryPlan | None = None,
) -> StageReport:
    """Of a decode tick of `batch` sequences with `context` cached tokens. item: bytes of a number in the cache. layer_seconds: measured, of
    every layer; seconds: of every stage instead, see `stage_seconds`. memory: of the engine. Raises ConfigError for another number of
    them."""
    shapes, stages = layer_shapes(plan.config), len(plan.counts)
    if layer_seconds is not None and len(layer_seconds) != len(shapes):
        raise ConfigError(f"{len(layer_seconds)} measured times for {len(shapes)} layers; give one a layer")
    # an array of a slot has a leading stage axis: each stage has its share of the bytes
    slots = [sum(leaf.nbytes for leaf in jax.tree.leaves(layer)) // stages for layer in weights.layers]
    found, start = [], 0
    for stage, (count, places) in enumerate(zip(plan.counts, plan.slot_plan.places, strict=True)):
        layers, nbytes = range(start, start + count), sum(slots[place] for place in places)
        start += count
        per_weight = nbytes / sum(shapes[i].parameters for i in layers)
        costs = [shapes[i].decode(batch=batch, context=context, item=per_weight, cache_item=item) for i in layers]
        cost: Cost = total(costs)
        taken = None if layer_seconds is None else sum(layer_seconds[i] for i in layers)
        taken = taken if seconds is None else seconds[stage]
        speed = plan.speeds[stage] if plan.speeds else 1.0
        found.append(Stage(layers=tuple(layers), flops=cost.flops, moved=cost.moved, nbytes=nbytes, speed=speed, seconds=taken))
    needed, allowed = (memory.needed, memory.allowed) if memory else (None, None)
    return StageReport(stages=tuple(found), slots=plan.slots, held=sum(slots), needed=needed, allowed=allowed)


def stage_seconds(plan: Plan, mesh: Mesh, weights: DecoderWeights, *, repetitions: int = 5, **sizes: Any) -> list[float]:
    """Median time of every stage's layers for a decode tick of `batch` sequences with `context` cached tokens, each stage by itself on its
    own devices, while the others rest. sizes: batch, context, cache_dtype, and kernels, see EngineConfig. Raises ConfigError on a mesh of
    several processes."""
    ends = list(itertools.accumulate(plan.counts))
    runs = [range(end - count, end) for count, end in zip(plan.counts, ends, strict=True)]
    return [statistics.median(_times(plan, mesh, weights, [run], repetitions=repetitions, **sizes)[0]) for run in runs]


def layer_seconds(plan: Plan, mesh: Mesh, weights: DecoderWeights, *, repetitions: int = 5, **sizes: Any) -> list[list[float]]:
    """Times of every layer for a decode tick, as many as `repetitions`, each layer by itself on its stage's devices; what a call of its own
    costs is in them. Arguments and errors as of `stage_seconds`."""
    runs = [range(layer, layer + 1) for layer in range(plan.config.layers)]
    return _times(plan, mesh, weights, runs, repetitions=repetitions, **sizes)


def _times(
    plan: Plan,
    mesh: Mesh,
    weights: DecoderWeights,
    runs: Sequence[range],
    *,
    batch: int,
    context: int,
    cache_dtype,
    kernels: str,
    repetitions: int,
) -> list[list[float]]:
    """Of each run of layers, which are of one stage, the times of its calls. The runs take turns, so that weights come from memory and not
    from a processor's cache, as in a model."""
    if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        raise ConfigError("stages are measured one by one, and other processes have some of them; measure on one process")
    without = ("native", "pallas") if kernels == "xla" else ()
    programs: dict[Any, tuple[Callable, Callable]] = {}
    times: list[list[float]] = [[] for _ in runs]
    with using(without=without):
        sizes: dict[str, Any] = {"batch": batch, "context": context, "cache_dtype": cache_dtype}
        calls = [_alone(plan, mesh, weights, run, programs, **sizes) for run in runs]
        for turn in range(repetitions + 1):
            for call, own in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                if turn:  # the first one compiles
                    own.append(time.perf_counter() - start)
    return times


def _part(config: ModelConfig, first: int, count: int) -> ModelConfig:
    """A model of some of the layers."""
    layers = range(first, first + count)
    moe = config.moe and tuple(i - first for i in config.moe.layers if i in layers)
    return dataclasses.replace(
        config,
        layers=count,
        windows=config.windows[first : first + count],
        moe=dataclasses.replace(config.moe, layers=moe) if config.moe and moe else None,
    )


def _alone(
    plan: Plan,
    mesh: Mesh,
    weights: DecoderWeights,
    run: range,
    programs: dict[Any, tuple[Callable, Callable]],
    *,
    batch: int,
    context: int,
    cache_dtype,
) -> Callable[[], None]:
    """A call that runs some layers of one stage for a tick, and waits for them. programs: what was made for runs that are alike."""
    stage = next(s for s, end in enumerate(itertools.accumulate(plan.counts)) if run.start < end)
    before = sum(plan.counts[:stage])
    devices = Mesh(mesh.devices[:, stage : stage + 1], MESH_AXES)
    config = _part(plan.config, run.start, len(run))
    own = dataclasses.replace(
        plan,
        config=config,
        counts=(config.layers,),
        speeds=(),
        context=ParallelContext.from_mesh(devices),
        experts=plan.experts,
    )

    def here(array: jax.Array) -> jax.Array:
        shards = {shard.device: shard.data for shard in array.addressable_shards}
        local = [shards[device] for device in devices.devices.flat]
        shape, sharding = (1, *array.shape[1:]), array.sharding
        assert isinstance(sharding, NamedSharding)
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(devices, sharding.spec), local)

    places = plan.slot_plan.places[stage][run.start - before : run.stop - before]
    layers = jax.tree.map(here, tuple(weights.layers[place] for place in places))
    specs = jax.tree.map(lambda a: a.sharding.spec, layers)
    rows, cached = PartitionSpec(ROW_AXES), PartitionSpec((STAGE, *ROW_AXES), TENSOR_AXES)
    sharded = functools.partial(jax.shard_map, mesh=devices, check_vma=False)
    fresh = lambda: empty_state(own, batch=batch, tokens=context, cache_dtype=cache_dtype).caches

    def tick(layers, x, caches, positions):
        order = None if len(plan.counts) == 1 else jnp.arange(x.shape[0], dtype=jnp.int32)
        local = jax.tree.map(lambda a: a[0], layers)
        return cached_layers(local, x, caches, positions, config, own.layer_spec, own.context, rows=order)

    key = own, stage, tuple(jax.tree.leaves(specs)), jax.tree.structure(specs)
    if key not in programs:
        programs[key] = (
            jax.jit(sharded(fresh, in_specs=(), out_specs=cached)),
            jax.jit(sharded(tick, in_specs=(specs, rows, cached, rows), out_specs=(rows, cached)), donate_argnums=2),
        )
    empty, program = programs[key]
    kept = [empty()]
    count = batch * row_shards(devices)
    place = lambda a: jax.device_put(a, NamedSharding(devices, rows))
    x = place(np.random.default_rng(0).standard_normal((count, 1, config.embed), np.float32))
    positions = place(np.full((count, 1), context - 1, np.int32))

    def call() -> None:
        y, kept[0] = program(layers, x, kept[0], positions)
        jax.block_until_ready(y)

    return call
