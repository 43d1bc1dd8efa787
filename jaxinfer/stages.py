"""How a model's layers lie over the stages of its pipeline, and what each stage costs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxinfer.errors import ConfigError
from jaxinfer.models.decoder import DecoderWeights
from jaxinfer.placement import Plan, layer_shapes
from sharding.costs import Cost, total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """layers: their numbers. flops, moved: operations, and bytes of weights and cache, of one decode tick, over all of the stage's tensor
    shards. nbytes: of the layers' weights, likewise. seconds: of its layers, where they were measured."""

    layers: tuple[int, ...]
    flops: float
    moved: float
    nbytes: int
    seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageReport:
    """slots: layers that every stage has room for. held: bytes of the slots' weights on each stage, empty ones included. spread: how much
    longer the longest stage is than the mean, by its seconds or by what it moves."""

    stages: tuple[Stage, ...]
    slots: int
    held: int

    @property
    def waste(self) -> float:
        """Share of all slots that hold no layer."""
        return 1 - sum(len(stage.layers) for stage in self.stages) / (self.slots * len(self.stages))

    @property
    def spread(self) -> float:
        loads = [stage.moved if stage.seconds is None else stage.seconds for stage in self.stages]
        return max(loads) * len(loads) / sum(loads) - 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self) | {"waste": self.waste, "spread": self.spread}

    def __str__(self) -> str:
        """A table."""
        measured = self.stages[0].seconds is not None
        rows = [("stage", "layers", "GFLOP", "MB moved", "MB weights", *(("ms",) if measured else ()))]
        for number, stage in enumerate(self.stages):
            layers = f"{stage.layers[0]}-{stage.layers[-1]}"
            row = (str(number), layers, f"{stage.flops / 1e9:.4g}", f"{stage.moved / 1e6:.4g}", f"{stage.nbytes / 1e6:.4g}")
            rows.append((*row, f"{stage.seconds * 1e3:.4g}") if stage.seconds is not None else row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, f"spread {self.spread:.1%}, empty slots {self.waste:.1%}"])


def stage_report(
    plan: Plan, weights: DecoderWeights, *, batch: int, context: int, item: float, layer_seconds: Sequence[float] | None
) -> StageReport:
    """Of a decode tick of `batch` sequences with `context` cached tokens. item: bytes of a number in the cache. layer_seconds: measured, of
    every layer. Raises ConfigError for another number of them."""
    shapes, stages = layer_shapes(plan.config), len(plan.counts)
    if layer_seconds is not None and len(layer_seconds) != len(shapes):
        raise ConfigError(f"{len(layer_seconds)} measured times for {len(shapes)} layers; give one a layer")
    # an array of a slot has a leading stage axis: each stage has its share of the bytes
    slots = [sum(leaf.nbytes for leaf in jax.tree.leaves(layer)) // stages for layer in weights.layers]
    found, start = [], 0
    for count in plan.counts:
        layers, nbytes = range(start, start + count), sum(slots[:count])
        start += count
        per_weight = nbytes / sum(shapes[i].parameters for i in layers)
        costs = [shapes[i].decode(batch=batch, context=context, item=per_weight, cache_item=item) for i in layers]
        cost: Cost = total(costs)
        seconds = None if layer_seconds is None else sum(layer_seconds[i] for i in layers)
        found.append(Stage(layers=tuple(layers), flops=cost.flops, moved=cost.moved, nbytes=nbytes, seconds=seconds))
    return StageReport(stages=tuple(found), slots=plan.slots, held=sum(slots))
