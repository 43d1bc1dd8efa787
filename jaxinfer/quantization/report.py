"""What weights really take: bytes of the arrays that lie on the devices, by kind of tensor and form."""

import dataclasses
import math
from collections import defaultdict
from typing import Any

import jax

from jaxinfer.models.decoder import DecoderWeights
from pallas_kernels.head_argmax import HeadSketch
from pallas_kernels.qtensor import ActivationQuant, QTensor

MATRICES = ("qkv", "out", "up", "down", "embedding", "head", "sketch")  # fields of the placed weights that are matrices
OTHERS = "norms and biases"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorBytes:
    """Tensors of one kind in one form.

    kind: "attention.qkv", "mlp.down", "embedding", ..., or "norms and biases". form: a dtype, or the format of QTensors with
    their group and how inputs are quantised. values, scales: bytes of the stored values, and of scales, zeros and the order of
    groups; over all of this process's devices, replicas and padding included. device: both, on the fullest of them.
    """

    kind: str
    form: str
    values: int
    scales: int
    device: int

    @property
    def nbytes(self) -> int:
        return self.values + self.scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """rows: the largest first. total: bytes over all of this process's devices. device: bytes on the fullest one."""

    rows: tuple[TensorBytes, ...]
    total: int
    device: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rows": [dataclasses.asdict(row) | {"bytes": row.nbytes} for row in self.rows],
            "bytes": self.total,
            "device_bytes": self.device,
        }


def memory_report(weights: DecoderWeights) -> MemoryReport:
    """The bytes of placed weights on this process's devices, read off the arrays themselves."""
    by_row: dict[tuple[str, str], dict[str, dict[Any, int]]] = defaultdict(lambda: {"values": {}, "scales": {}})
    fullest: dict[Any, int] = defaultdict(int)
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights, is_leaf=lambda leaf: isinstance(leaf, QTensor | HeadSketch))
    for path, leaf in leaves:
        parts = by_row[_kind(path), form_of(leaf)]
        arrays: list[tuple[str, Any]]
        if isinstance(leaf, QTensor):
            beside = (leaf.scales, leaf.zeros, leaf.order, leaf.input_scale)
            arrays = [("values", leaf.values), *(("scales", a) for a in beside if a is not None)]
        elif isinstance(leaf, HeadSketch):
            arrays = [("values", leaf.blocks), ("scales", leaf.numbers)]
        else:
            arrays = [("values", leaf)]
        for part, array in arrays:
            for shard in array.addressable_shards:
                size = math.prod(shard.data.shape) * array.dtype.itemsize
                parts[part][shard.device] = parts[part].get(shard.device, 0) + size
                fullest[shard.device] += size
    rows = [
        TensorBytes(
            kind=kind,
            form=form,
            values=sum(parts["values"].values()),
            scales=sum(parts["scales"].values()),
            device=max(size + parts["scales"].get(device, 0) for device, size in parts["values"].items()),
        )
        for (kind, form), parts in by_row.items()
    ]
    return MemoryReport(
        rows=tuple(sorted(rows, key=lambda row: -row.nbytes)), total=sum(fullest.values()), device=max(fullest.values())
    )


def _kind(path: tuple[Any, ...]) -> str:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey) and key.name != "layers"]
    return ".".join(names) if names[-1] in MATRICES else OTHERS


def inputs_of(activation: ActivationQuant) -> str:
    """How inputs are quantised, in words: "int8 inputs per 64"."""
    return f"{activation.format} inputs {'at a static scale' if activation.static else f'per {activation.group or "token"}'}"


def form_of(value: Any) -> str:
    """How a weight is stored, in words: "bfloat16", or "int4, group 32, zeros, int8 inputs per 64"."""
    if isinstance(value, HeadSketch):
        return "5 bits"
    if not isinstance(value, QTensor):
        return str(value.dtype)
    parts = [value.format, f"group {value.group}" if value.group else "per channel"]
    if value.zeros is not None:
        parts.append("zeros")
    if value.activation is not None:
        parts.append(inputs_of(value.activation))
    return ", ".join(parts)
