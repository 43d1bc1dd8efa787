"""How a model lies on a mesh: which layers each stage has, and which heads, experts and columns each shard."""

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import LayerSpec, layer_spec
from pallas_kernels import gpus
from sharding.balance import SlotPlan, partition, slot_plan, stage_plans
from sharding.context import ParallelContext
from sharding.costs import LayerShape
from sharding.errors import MeshError
from sharding.mesh import check_mesh
from sharding.partition import HeadSplit, split_experts, split_heads
from sharding.rules import EXPERT, MESH_AXES, STAGE, TENSOR_AXES

BALANCED_FOR = (8, 8192)  # sequences and cached tokens of the decode step for which stages are made alike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model lies on a mesh: hashable, so that compiled programs can be keyed by it.

    counts: layers per stage. heads: which heads each tensor shard holds. context: how the program reaches its collectives. experts: those
    that each expert shard holds, see MoESpec. speeds: of each stage's devices beside the others', () where they are alike.
    """

    config: ModelConfig
    counts: tuple[int, ...]
    heads: HeadSplit
    context: ParallelContext
    experts: tuple[tuple[int, ...], ...] = ()
    speeds: tuple[float, ...] = ()

    @functools.cached_property
    def slot_plan(self) -> SlotPlan:
        """Which slots every stage has, and where its layers lie among them."""
        return slot_plan([self.config.kind(i) for i in range(self.config.layers)], self.counts)

    @property
    def slots(self) -> int:
        return len(self.slot_plan.slots)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of each slot, see ModelConfig.kind."""
        return tuple(map(str, self.slot_plan.slots))

    @property
    def used(self) -> tuple[tuple[bool, ...], ...]:
        """For each stage, which slots hold a layer."""
        return tuple(tuple(slot in places for slot in range(self.slots)) for places in self.slot_plan.places)

    @property
    def jumped(self) -> tuple[bool, ...]:
        """For each slot, whether stages jump over it where they have no layer in it. () for none: a stage that has a layer in every slot
        and devices as fast as any sets the pace, and a conditional costs more than running an empty slot beside it."""
        if not self.speeds and max(self.counts) == self.slots:
            return ()
        return tuple(not all(used) for used in zip(*self.used, strict=True))

    @property
    def layer_spec(self) -> LayerSpec:
        stages = range(len(self.counts))
        slots = [[self.layer(s, i) or 0 for s in stages] for i in range(self.slots)]  # an empty slot's result is not used
        return layer_spec(self.config, self.heads, slots, self.experts, self.jumped)

    @property
    def cache_heads(self) -> int:
        """kv heads of a cache over all tensor shards, padding and replicas included."""
        return len(self.heads.kv) * len(self.heads.kv[0])

    def layer(self, stage: int, slot: int) -> int | None:
        """The layer in a slot of a stage, or None where the slot is empty."""
        places = self.slot_plan.places[stage]
        return sum(self.counts[:stage]) + places.index(slot) if slot in places else None

    def sample(self, slot: int) -> int:
        """A layer that lies in a slot: the first stage's that has one there."""
        return next(layer for stage in range(len(self.counts)) if (layer := self.layer(stage, slot)) is not None)


def layer_shapes(config: ModelConfig) -> list[LayerShape]:
    """What every layer costs is counted from these."""
    a, m, windows = config.attention, config.moe, config.windows or (None,) * config.layers
    dense = LayerShape(
        embed=config.embed,
        heads=a.heads,
        kv_heads=a.kv_heads,
        head_dim=a.head_dim,
        width=config.mlp.width,
        gated=config.mlp.gated,
    )
    moe = m and dataclasses.replace(dense, width=m.width, experts=m.experts, used=m.used)
    shapes = {"dense": dense, "moe": moe or dense}
    return [dataclasses.replace(shapes[config.kind(i)], window=window) for i, window in enumerate(windows)]


def stage_speeds(mesh: Mesh) -> tuple[float, ...]:
    """Of each stage's slowest device, by the memory bandwidth on its data sheet, relative to the fastest stage; () where all are of one
    kind, and for devices that have no data sheet, such as CPUs."""
    stages = np.moveaxis(mesh.devices, MESH_AXES.index(STAGE), 0).reshape(mesh.shape[STAGE], -1)
    known = {gpu.device_kind: gpu.bandwidth for gpu in gpus.KNOWN.values()}
    found = {device.device_kind for device in mesh.devices.flat}
    if len(found) == 1 or not found <= known.keys():
        return ()
    slowest = [min(known[device.device_kind] for device in stage) for stage in stages]
    return tuple(speed / max(slowest) for speed in slowest) if len(set(slowest)) > 1 else ()


def plans(
    config: ModelConfig, mesh: Mesh, *, speeds: Sequence[float] | None = None, costs: Sequence[float] | None = None
) -> Iterator[Plan]:
    """Ways to lay a model on a mesh, from the fastest to the one that takes least memory, each made when it is asked for; arguments and
    errors as of `make_plan`."""
    check_mesh(mesh)
    stages, expert = mesh.shape[STAGE], mesh.shape[EXPERT]
    if expert > 1 and config.moe is None:
        raise MeshError(f"an expert axis of {expert} for a model without experts; use a data axis instead")
    if stages > config.layers:
        raise MeshError(f"{stages} pipeline stages for {config.layers} layers; use at most one stage a layer")
    own = stage_speeds(mesh) if speeds is None else _relative(speeds, stages)
    batch, context = BALANCED_FOR
    shapes, context = layer_shapes(config), min(context, config.max_positions)
    if costs is None:
        costs = [shape.decode(batch=batch, context=context).moved for shape in shapes]
    elif len(costs) != config.layers or not all(0 < cost < math.inf for cost in costs):
        raise MeshError(
            f"costs are {list(costs)} for {config.layers} layers; give each a number above 0, such as its measured time"
        )
    kinds = [config.kind(i) for i in range(config.layers)]
    sizes: dict[Hashable, float] = {kind: float(shapes[kinds.index(kind)].parameters) for kind in dict.fromkeys(kinds)}
    tensor = math.prod(mesh.shape[a] for a in TENSOR_AXES)
    a = config.attention
    plan = functools.partial(
        Plan,
        config=config,
        heads=split_heads(a.heads, a.kv_heads, tensor),
        context=ParallelContext.from_mesh(mesh),
        experts=split_experts(config.moe.experts, expert) if config.moe and expert > 1 else (),
        speeds=own,
    )
    if not own and len(sizes) == 1:  # an empty slot costs what a layer costs, so that the fewest slots are also the fastest
        yield plan(counts=partition(costs, stages, most=-(-config.layers // stages)).counts)
        return
    for found in stage_plans(costs, kinds, sizes, stages, speeds=own or None):
        yield plan(counts=found.counts)


def _relative(speeds: Sequence[float], stages: int) -> tuple[float, ...]:
    if len(speeds) != stages or not all(0 < speed < math.inf for speed in speeds):
        raise MeshError(f"speeds are {list(speeds)} for {stages} pipeline stages; give each a number above 0")
    return tuple(float(speed) / max(speeds) for speed in speeds) if len(set(speeds)) > 1 else ()


def make_plan(
    config: ModelConfig, mesh: Mesh, *, speeds: Sequence[float] | None = None, costs: Sequence[float] | None = None
) -> Plan:
    """Layers in order over the stages, for the shortest longest stage by the costs of its layers over the speed of its devices, and of such
    plans the one with the fewest layer slots, which every device has; what is equal goes to earlier stages.

    speeds: of each stage's devices, in any unit; by default what their data sheets say. costs: of each layer, in any unit, such as times
    that `jaxinfer bench --per-layer` measured; by default the bytes that a decode step moves. Raises MeshError for a mesh with other axes,
    for more stages than layers, another number of speeds or costs, and an expert axis over a model without experts.
    """
    return next(plans(config, mesh, speeds=speeds, costs=costs))
