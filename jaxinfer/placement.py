"""place(): the canonical module, or a checkpoint, -> what the engine runs: device arrays, one per layer slot and weight.

Every array of a layer slot has a leading `stage` axis (size 1 without a pipeline) and holds, for each stage, the weights of that
stage's layer of the slot's kind. Weights are never stacked over slots: a stack costs a weight-sized copy per
layer and call. Heads, mlp and vocabulary are cut into whole units, padded and replicated where they do not divide
(sharding.partition). q/k/v and gate/up are joined along their outputs, shard by shard, where they are stored alike. Quantised matrices
that native kernels multiply are brought into the order in which these read them, shard by shard: see qtensor.repack.
Each process reads and places the slices of its own devices only.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.readers.base import LazyTensor, shard_shape
from jaxinfer.layout import Plan, make_plan
from jaxinfer.models.blocks import Attention
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import (
    ENDS,
    MLP_BLOCKS,
    POST_NORMS,
    Decoder,
    DecoderWeights,
    LayerWeights,
    ParameterInfo,
    parameters,
)
from pallas_kernels import qtensor
from pallas_kernels.cpu import library, operands
from pallas_kernels.cpu.pages import LargePages
from pallas_kernels.head_argmax import HeadSketch, make_sketch, sketch_refusal, sketch_shapes
from pallas_kernels.qtensor import QTensor
from sharding.errors import MeshError
from sharding.partition import Units, gather, split_even
from sharding.rules import EXPERT, STAGE, TENSOR_AXES, spec


class Readable(Protocol):
    """A tensor that can be read in pieces: a file's, or a module's parameter."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, units: Sequence[Units | None] | None = None) -> np.ndarray | QTensor: ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A parameter that is in memory already, as a Readable."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read(self, units: Sequence[Units | None] | None = None) -> np.ndarray | QTensor:
        value = jax.tree.map(np.asarray, self.value)
        units = units or (None,) * len(self.shape)
        if not isinstance(value, QTensor):
            return gather(value, units)
        if len(units) > 2 and units[0] is not None:
            lead = (units[0], None, None)
            value = jax.tree.map(lambda a: gather(a, lead), value)
        for axis, unit in zip((-2, -1), units[-2:], strict=True):
            if unit is not None:
                value = qtensor.take(value, axis=axis, unit=unit.size, indices=unit.indices)
        return value


def module_tensors(model: Decoder) -> dict[str, InMemory]:
    """Every parameter of a module by its path."""
    return {".".join(map(str, path)): InMemory(p.get_value()) for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}


INPUT_SCALE = (jax.tree_util.GetAttrKey("input_scale"),)  # the place in a QTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """A model on a mesh. weights: DecoderWeights of device arrays; specs: the same tree of partition specs."""

    mesh: Mesh
    plan: Plan
    weights: DecoderWeights
    specs: DecoderWeights

    @property
    def nbytes(self) -> int:
        """Bytes over all devices, replicas and padding included."""
        return sum(
            math.prod(s.data.shape) * a.dtype.itemsize for a in jax.tree.leaves(self.weights) for s in a.addressable_shards
        )

    def with_int8_hosts(self) -> "Placed":
        """The same with partial sums that cross hosts as INT8. Raises MeshError where none does so in layers."""
        if len(self.plan.context.tensor) < 2:
            raise MeshError(
                f"sums cross hosts as INT8 where tensor shards lie on several hosts with several each; the mesh is {dict(self.mesh.shape)}"
            )
        return self._in_context(int8_hosts=True)

    def with_split_tokens(self) -> "Placed":
        """The same with prompts whose tokens are split over tensor shards between half layers. Raises MeshError without tensor shards."""
        if not self.plan.context.tensor:
            raise MeshError(
                "engine.sequence_parallel splits tokens over tensor shards, and there is one; "
                f"raise tensor_parallel_size, or leave it out; the mesh is {dict(self.mesh.shape)}"
            )
        return self._in_context(split_tokens=True)

    def _in_context(self, **changes: Any) -> "Placed":
        context = dataclasses.replace(self.plan.context, **changes)
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, context=context))


def local_layers(weights: DecoderWeights) -> DecoderWeights:
    """Inside shard_map: the stage axis of the local layer arrays, of size 1, taken off."""
    return dataclasses.replace(weights, layers=jax.tree.map(lambda a: a[0], weights.layers))


def place(
    source: Decoder | Mapping[str, Readable],
    mesh: Mesh,
    *,
    config: ModelConfig | None = None,
    plan: Plan | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    kernels: str = "auto",
    head_sketch: bool = False,
) -> Placed:
    """Put a model on a mesh.

    source: a Decoder, or a mapping of every module path to a tensor that can be read in pieces, with its config. plan: of `make_plan` for
    this model and mesh, by default what it gives. progress(done, total, name): called per tensor that was read, counting tensors. kernels:
    of the engine that will run it, see EngineConfig: for "xla" no weight is brought into the order of native kernels. head_sketch: with a
    sketch of the head, where one helps. Raises MeshError for a mesh that does not fit.
    """
    if isinstance(source, Decoder):
        tensors: Mapping[str, Readable] = module_tensors(source)
        config = source.config
    else:
        tensors = source
    if config is None:
        raise TypeError("place() needs the config of a mapping of tensors")
    return Placer(tensors, mesh, plan or make_plan(config, mesh), progress, kernels, head_sketch).run()


def placed_shapes(
    tensors: Mapping[str, Readable],
    mesh: Mesh,
    *,
    config: ModelConfig,
    plan: Plan | None = None,
    kernels: str = "auto",
    head_sketch: bool = False,
) -> Placed:
    """What `place` will give, with a ShapeDtypeStruct in place of every array: known before a weight is read."""
    return _Shapes(tensors, mesh, plan or make_plan(config, mesh), None, kernels, head_sketch).run()


class Form(TypedDict):
    """What the arrays of weights are for, as arguments of `place`."""

    kernels: str
    head_sketch: bool


def form_of(weights: DecoderWeights) -> Form:
    """With what `place` gives other weights the arrays that these have."""
    leaves = jax.tree.leaves(weights, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    blocks = any(isinstance(leaf, QTensor) and leaf.layout == BLOCKS for leaf in leaves)
    sketched = weights.sketch is not None
    return Form(kernels="auto" if blocks or sketched else "xla", head_sketch=sketched)


BLOCKS = "cpu32"  # the layout that native kernels read


class Placer:
    """`place` at work, a layer slot at a time. units: for every logical axis that is split, what each of its shards holds."""

    def __init__(
        self, source: Mapping[str, Readable], mesh: Mesh, plan: Plan, progress, kernels: str = "auto", head_sketch: bool = False
    ):
        self.source, self.mesh, self.plan, self.progress = source, mesh, plan, progress
        self.pages = LargePages()
        self.native = kernels != "xla" and library.refusal(mesh.devices.flat[0].platform) is None
        capped = plan.config.soft_cap is not None  # then a logit may be equal to a smaller one
        self.head_sketch = head_sketch and self.native and not capped
        self.info: dict[str, ParameterInfo] = parameters(plan.config)
        self.tensor = math.prod(mesh.shape[a] for a in TENSOR_AXES)
        self.units = self._units()
        self.read_names: set[str] = set()

    def _units(self) -> dict[str, tuple[Units, ...]]:
        """For every logical axis that is split: what each of its shards holds."""
        config, heads = self.plan.config, self.plan.heads
        units = {"vocab": split_even(config.vocab, self.mesh.shape[STAGE] * self.tensor)}
        if self.plan.experts:
            units["experts"] = tuple(Units(1, held) for held in self.plan.experts)
        if self.tensor == 1:  # cutting one whole into heads would cut its groups too
            return units
        units["heads"] = heads.query_units(config.attention.head_dim)
        units["kv_heads"] = heads.kv_units(config.attention.head_dim)
        units["mlp"] = self._columns_of("dense", config.mlp.width)
        if config.moe:
            units["expert_mlp"] = self._columns_of("moe", config.moe.width)
        return units

    def _columns_of(self, kind: str, width: int) -> tuple[Units, ...]:
        """What each tensor shard holds of the inner width of an MLP: whole groups of every weight that contracts over it."""
        layers = [i for i in range(self.plan.config.layers) if self.plan.config.kind(i) == kind]
        kinds = [_kind(self.source[f"blocks.{i}.mlp.down"]) for i in layers]
        unit = math.lcm(32 if width % 32 == 0 else 1, *(g for kind in kinds for g in kind.groups))  # 32: of packed files
        if width % unit:
            raise MeshError(f"an mlp of {width} is not made of groups of {unit}; quantise with groups that divide it")
        return split_even(width, self.tensor, unit)

    def run(self) -> Placed:
        slots = [self.slot(i) for i in range(self.plan.slots)]
        ends: dict[str, Any] = {
            name: self._arrays(functools.partial(_same, (name,)), staged=False) if name in self.info else None for name in ENDS
        }
        weights = DecoderWeights(layers=tuple(slots), embed_scale=self.plan.config.embed_scale, **ends)
        weights = dataclasses.replace(weights, sketch=self._sketch(weights.table))
        return Placed(mesh=self.mesh, plan=self.plan, weights=weights, specs=jax.tree.map(lambda a: a.sharding.spec, weights))

    def slot(self, slot: int) -> LayerWeights:
        """The weights of one slot: for each field of the two half-layer operations, one array or a run of joined ones; and what the
        layer has beside them."""
        halves: dict[str, Any] = {}
        sample = f"blocks.{self.plan.sample(slot)}."
        for half, block in (("attention", Attention), ("mlp", MLP_BLOCKS[self.plan.kinds[slot]])):
            prefix = f"{sample}{half}."
            known = {path.removeprefix(prefix) for path in self.info if path.startswith(prefix)}
            names = block.build(lambda name, known=known: name if name in known else None)
            filled: dict[str, Any] = {}
            for field in dataclasses.fields(names):
                value = getattr(names, field.name)
                if isinstance(value, tuple):
                    whole = [f"{half}.{name}" for name in value]
                    filled[field.name] = tuple(self._weight(slot, run) for run in self._alike(slot, whole))
                else:
                    filled[field.name] = None if value is None else self._weight(slot, (f"{half}.{value}",))
            halves[half] = type(names)(**filled)
        post = {name: self._weight(slot, (name,)) for name in POST_NORMS if sample + name in self.info}
        return LayerWeights(**halves, **post)

    def sketch_shapes(self, head: Any, width: int) -> HeadSketch | None:
        """Of each shard's part of a head of this many inputs, or None where no sketch is kept. head: as it is placed, or a part of it."""
        if not self.head_sketch or sketch_refusal(head, width) is not None:
            return None
        return sketch_shapes(self.units["vocab"][0].length, width)

    def _sketch(self, head: Any) -> HeadSketch | None:
        shapes = self.sketch_shapes(head, self.plan.config.embed)
        if shapes is None:
            return None
        devices = [device for device in self.mesh.devices.flat if device.process_index == jax.process_index()]
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec(("vocab", None, None))))

        def assemble(shape, *leaves):
            return self._put(leaves, devices, (shape.shape[0] * len(self.units["vocab"]), *shape.shape[1:]), sharding)

        return jax.tree.map(assemble, shapes, *self._sketches(head, shapes, devices))

    def _sketches(self, head: Any, shapes: HeadSketch, devices: Sequence[jax.Device]) -> list[HeadSketch]:
        """Of what each device has of the placed head."""
        own = lambda device: lambda a: next(shard.data for shard in a.addressable_shards if shard.device == device)
        return [make_sketch(jax.tree.map(own(device), head)) for device in devices]

    def _paths(self, stage: int, slot: int, names: Sequence[str]) -> tuple[str, ...] | None:
        layer = self.plan.layer(stage, slot)
        return None if layer is None else tuple(f"blocks.{layer}.{name}" for name in names)

    def _alike(self, slot: int, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Neighbours that are stored alike, to be joined into one array."""
        runs: list[tuple[str, ...]] = []
        for name in names:
            kind = self._kind(slot, name)
            if runs and kind.joins and self._kind(slot, runs[-1][-1]) == kind:
                runs[-1] += (name,)
            else:
                runs.append((name,))
        return runs

    def _kind(self, slot: int, name: str) -> "_Kind":
        """How the weight is stored, alike on all stages: they run one program."""
        paths = [p[0] for s in range(len(self.plan.counts)) if (p := self._paths(s, slot, (name,)))]
        kinds = {_kind(self.source[path]): path for path in paths}
        if len(kinds) > 1:
            stored = ", ".join(f"{path} as {kind}" for kind, path in kinds.items())
            raise MeshError(
                f"layers that share a pipeline slot are stored differently ({stored}); convert them to one format first"
            )
        return next(iter(kinds))

    def _weight(self, slot: int, names: Sequence[str]):
        paths = functools.partial(self._paths, slot=slot, names=names)
        sample = self.plan.sample(slot)  # gives an empty slot its shape
        return self._arrays(paths, staged=True, spare=tuple(f"blocks.{sample}.{name}" for name in names))

    def _arrays(self, paths: Callable[[int], Sequence[str] | None], *, staged: bool, spare: Sequence[str] = ()):
        """One weight on every device of the mesh that is this process's. paths(stage): the tensors that are joined along their
        outputs there; None for an empty slot, which gets zeros in the shape of the tensors `spare`."""
        axes = self.info[(paths(0) or spare)[0]].axes
        mesh_axes = spec(("stage", *axes) if staged else axes)
        shards: dict[tuple[int, int, int], Any] = {}  # devices that hold the same shard read it once
        devices, local = [], []
        for (_, stage, expert, host, tensor), device in np.ndenumerate(self.mesh.devices):
            if device.process_index != jax.process_index():
                continue
            rank = host * self.mesh.devices.shape[-1] + tensor
            key = (
                stage if staged or "vocab" in axes else 0,
                rank if set(axes) & set(self.units) - {"experts"} else 0,
                expert if "experts" in axes and self.plan.experts else 0,
            )
            if key not in shards:
                names = paths(stage)
                shards[key] = self._shard(names or spare, key, empty=names is None)
            devices.append(device)
            local.append(shards[key])

        # a scale per channel has one column, which no shard of the inputs divides, an order one row for all outputs, and a scale of inputs
        # neither; of other parts a shard may well have one group, or one expert
        first = local[0]
        by_channel = isinstance(first, QTensor) and (first.group is None or first.order is not None)
        blocked = isinstance(first, QTensor) and first.layout == BLOCKS

        def assemble(path, *leaves):
            shape = (1, *leaves[0].shape) if staged else leaves[0].shape
            shared = by_channel or path == INPUT_SCALE
            named = (*mesh_axes, *(None,) * (len(shape) - len(mesh_axes)))  # blocks have axes of their own behind these
            last = int(staged) if blocked else 0  # of the axes that every part has in full
            one = (
                qtensor.CPU_BLOCK if blocked and len(shape) == len(mesh_axes) else 1
            )  # of scales in blocks, the size of a group
            kept = [
                n > one or i <= last or e == EXPERT or not shared for i, (e, n) in enumerate(zip(named, shape, strict=True))
            ]
            entries = [e if keep else None for e, keep in zip(named, kept, strict=True)]
            times = [math.prod(self.mesh.shape[m] for m in ((e,) if isinstance(e, str) else e or ())) for e in entries]
            whole = tuple(n * t for n, t in zip(shape, times, strict=True))
            return self._put(leaves, devices, whole, NamedSharding(self.mesh, PartitionSpec(*entries)))

        return jax.tree_util.tree_map_with_path(assemble, *local)

    def _put(self, leaves, devices, shape: tuple[int, ...], sharding: NamedSharding):
        """One array of what each device holds."""
        own = sharding.shard_shape(shape)
        put = self.pages.put if devices[0].platform == "cpu" else jax.device_put
        arrays = [put(a.reshape(own), d) for a, d in zip(leaves, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _cut(self, name: str, key: tuple[int, int, int]) -> tuple[Units | None, ...]:
        """What the devices of a (stage, tensor rank, expert shard) hold of a tensor, for each of its axes."""
        stage, rank, expert = key
        index = {"vocab": stage * self.tensor + rank, "experts": expert}
        return tuple(self.units[a][index.get(a, rank)] if a in self.units else None for a in self.info[name].axes)

    def _shard(self, names: Sequence[str], key: tuple[int, int, int], empty: bool):
        """What the devices of a (stage, tensor rank, expert shard) hold of the named tensors, joined along their outputs; zeros where
        `empty`."""
        parts = []
        for name in names:
            parts.append(self.source[name].read(self._cut(name, key)))
            if self.progress and name not in self.read_names:
                self.read_names.add(name)
                self.progress(len(self.read_names), len(self.info), name)
        whole = parts[0] if len(parts) == 1 else _joined(parts)
        if isinstance(whole, QTensor) and self.in_blocks(names, whole, [part.shape[-2] for part in parts], whole.shape[-1]):
            whole = qtensor.repack(whole, BLOCKS)
        return jax.tree.map(np.zeros_like, whole) if empty else whole

    def in_blocks(self, names: Sequence[str], form: QTensor, outputs: Sequence[int], inputs: int) -> bool:
        """Whether a shard of the named tensors is kept in the order of native kernels. form: with their format, group and dtypes; outputs:
        of each."""
        axes = self.info[names[0]].axes
        if not self.native or "experts" in axes:  # whose matmuls are not native
            return False
        # every part and shard has whole blocks; a vocabulary that lies on one device may fill up its last one
        shards = lambda axis: len(self.units.get(axis, ()))
        if (axes[-2] != "vocab" or shards("vocab") > 1) and any(n % qtensor.CPU_BLOCK for n in outputs):
            return False
        return operands.refusal(form, over_shards=shards(axes[-1]) > 1) is None and qtensor.blocks_refusal(form, inputs) is None


class _Shapes(Placer):
    """Places nothing and reads nothing: every array is a ShapeDtypeStruct with its sharding."""

    def _shard(self, names: Sequence[str], key: tuple[int, int, int], empty: bool):
        cuts = [self._cut(name, key) for name in names]
        wholes = [shard_shape(self.source[name].shape, cut) for name, cut in zip(names, cuts, strict=True)]
        row = _columns(_first_row(self.source[names[0]]), cuts[0][-1] if len(cuts[0]) > 1 else None)
        if len(wholes[0]) == 1:
            return jax.ShapeDtypeStruct((sum(shape[0] for shape in wholes),), row.dtype)
        lead, count = wholes[0][:-2], sum(shape[-2] for shape in wholes)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((*lead, count, a.shape[-1]), a.dtype), row)
        if isinstance(row, QTensor) and row.order is not None:  # one row for all outputs
            shapes = shapes.replace(order=jax.ShapeDtypeStruct((*lead, 1, row.order.shape[-1]), row.order.dtype))
        if isinstance(row, QTensor) and row.input_scale is not None:
            shapes = shapes.replace(input_scale=jax.ShapeDtypeStruct((*lead, 1, 1), row.input_scale.dtype))
        if isinstance(row, QTensor) and self.in_blocks(names, row, [shape[-2] for shape in wholes], row.shape[-1]):
            shapes = jax.eval_shape(functools.partial(qtensor.repack, layout=BLOCKS), shapes)
        return shapes

    def _sketches(self, head: Any, shapes: HeadSketch, devices: Sequence[jax.Device]) -> list[HeadSketch]:
        return [shapes] * len(devices)

    def _put(self, leaves, devices, shape: tuple[int, ...], sharding: NamedSharding):
        return jax.ShapeDtypeStruct(shape, leaves[0].dtype, sharding=sharding)


def _columns(row: np.ndarray | QTensor, unit: Units | None):
    """The shard of a row along its last axis, as far as its form goes."""
    if unit is None:
        return row
    if isinstance(row, QTensor):
        return qtensor.take(row, axis=-1, unit=unit.size, indices=unit.indices)
    return np.zeros((*row.shape[:-1], unit.length), row.dtype)


def _joined(parts: list):
    """Tensors of one form joined along their outputs."""
    if isinstance(parts[0], QTensor):
        return qtensor.concatenate(parts)
    return np.concatenate(parts, axis=0 if parts[0].ndim == 1 else -2)


def _same(names: Sequence[str], stage: int) -> Sequence[str]:
    """The tensors of a weight that every stage shares."""
    return names


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a tensor is stored, as far as it decides what can be joined and where it can be cut."""

    dtype: str
    group: int | None = None
    zeros: bool = False
    activation: qtensor.ActivationQuant | None = None

    @property
    def joins(self) -> bool:
        """Whether it can be joined with another of its kind: not where each tensor has an order or a scale of inputs of its own."""
        return self.dtype != "int4_ordered" and not (self.activation and self.activation.static)

    @property
    def groups(self) -> tuple[int, ...]:
        """Group sizes along the inputs: of the scales and of the activations' scales."""
        return tuple(g for g in (self.group, self.activation and self.activation.group) if g)


def _kind(tensor: Readable) -> _Kind:
    head = _first_row(tensor)
    if not isinstance(head, QTensor):
        return _Kind(str(head.dtype))
    return _Kind(head.format, head.group, head.zeros is not None, head.activation)


def _first_row(tensor: Readable) -> np.ndarray | QTensor:
    """The first row, of the first matrix of a stack, as `read` gives it, zeros of its form where the tensor describes itself: what a file
    holds is not read for this."""
    *lead, columns = tensor.shape if len(tensor.shape) > 1 else (*tensor.shape, None)
    if not isinstance(tensor, LazyTensor):
        return tensor.read((Units(1, (0,)),) * len(lead) + (() if columns is None else (None,)))
    shape = (1,) * len(lead) + (() if columns is None else (columns,))
    return np.zeros(shape, tensor.dtype) if tensor.packed is None else tensor.packed.blank(shape)
