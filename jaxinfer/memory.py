"""What an engine will take of each device's memory, before it takes it; and what to do when it was too much.

Weights and cache are counted: the shards that placement cuts, padding and copies included, from the tensors' shapes and formats alone.
What programs need for a moment is estimated from their largest intermediate arrays.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from convert.readers.base import PackedFormat
from jaxinfer.config import AUTO, EngineConfig
from jaxinfer.errors import ConfigError, MemoryPlanError, OutOfMemoryError
from jaxinfer.generation import empty_state
from jaxinfer.layout import Plan, plans
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import parameters
from jaxinfer.placement import InMemory, Placer, Readable
from pallas_kernels import gpus
from pallas_kernels.layer_cache import cache_dtype, token_bytes
from pallas_kernels.qtensor import CPU_BLOCK, QTensor
from sharding.distributed import channel, spans_processes
from sharding.partition import Units

LARGEST_AUTO = {"cpu": 32}  # sequences in a micro-batch that "auto" takes at most; a CPU's cores are busy with fewer
LARGEST_AUTO_ELSEWHERE = 256
SCORED_AT_ONCE = 512  # tokens whose logits scoring holds, see generation.score
FLOAT = 4  # bytes: activations are float32


def amount(n: int) -> str:
    """Bytes as people read them."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**27 else f"{n / 2**20:.2f} MiB"


# --- weights


def _outline(tensor: Any) -> np.ndarray | QTensor:
    """An array or QTensor of one byte, in the dtype or format that a tensor of a file, or a parameter in memory, has; nothing is read."""
    kept = tensor.value if isinstance(tensor, InMemory) else tensor.packed
    if kept is None or not isinstance(kept, QTensor | PackedFormat):
        return np.empty((1, 1), tensor.dtype if kept is None else kept.dtype)
    if isinstance(kept, QTensor):
        scale, zeros = kept.scales.dtype, None if kept.zeros is None else kept.zeros.dtype
    else:
        scale, zeros = kept.scale_dtype, kept.zeros_dtype
    return QTensor(
        values=np.empty((1, 1), np.uint8),
        scales=np.empty((1, 1), scale),
        zeros=None if zeros is None else np.empty((1, 1), zeros),
        format=kept.format,
        group=kept.group,
        activation=kept.activation,
        input_scale=np.empty((1, 1), np.float32) if kept.activation and kept.activation.static else None,
    )


@dataclasses.dataclass(frozen=True)
class _Outlined:
    """A tensor as far as placement looks at it to decide how to cut it."""

    shape: tuple[int, ...]
    outline: np.ndarray | QTensor

    def read(self, units: Any = None) -> np.ndarray | QTensor:
        return self.outline


def _shard_bytes(outline: np.ndarray | QTensor, shape: tuple[int, ...], columns: Units | None, inputs: int) -> int:
    """Of a shard; columns: how its last axis, of `inputs` before, was cut, since units that are smaller than a group repeat its scale."""
    values = math.prod(shape)
    if not isinstance(outline, QTensor):
        return values * outline.dtype.itemsize
    if outline.format == "int4_ordered":  # every shard has the scales of all groups, and the group of each of its inputs
        rows, groups = values // shape[-1], inputs // (outline.group or inputs)
        parts = [part for part in (outline.scales, outline.zeros) if part is not None]
        return values // 2 + rows * groups * sum(part.dtype.itemsize for part in parts) + shape[-1] * 4
    group = outline.group or shape[-1]
    group = math.gcd(group, columns.size) if columns and outline.group else group
    per_scale = sum(part.dtype.itemsize for part in (outline.scales, outline.zeros) if part is not None)
    return (
        values // outline.shape[-1] + values // group * per_scale
    )  # its one byte holds as many values as its last axis is long


def weight_bytes(
    tensors: Mapping[str, Readable], mesh: Mesh, plan: Plan, kernels: str = "auto", *, head_sketch: bool = False
) -> int:
    """Bytes of weights on each device, placed with the same `kernels` and `head_sketch`: all devices hold shards of one size. Reads
    nothing. Raises MeshError as `place` does."""
    outlines = {path: _Outlined(tuple(tensor.shape), _outline(tensor)) for path, tensor in tensors.items()}
    placer = Placer(outlines, mesh, plan, None, kernels, head_sketch)
    total, placed = 0, {str(plan.sample(slot)) for slot in range(plan.slots)}  # one layer a slot: all stages have its shapes
    for path, info in parameters(plan.config).items():
        _, layer, *_ = (*path.split("."), "")
        if path.startswith("blocks.") and layer not in placed:
            continue
        units = tuple(placer.units[a][0] if a in placer.units else None for a in info.axes)
        shape = tuple(n if unit is None else unit.length for n, unit in zip(tensors[path].shape, units, strict=True))
        outline, whole = outlines[path].outline, shape
        if isinstance(outline, QTensor) and placer.in_blocks((path,), outline, shape[-2:-1], shape[-1]):
            whole = (*shape[:-2], -(-shape[-2] // CPU_BLOCK) * CPU_BLOCK, shape[-1])  # the last block is filled up
        total += _shard_bytes(outline, whole, units[-1], tensors[path].shape[-1])
    sketch = placer.sketch_shapes(outlines["embedding" if plan.config.tied else "head"].outline, plan.config.embed)
    return total + sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(sketch))


# --- cache


def cache_bytes_per_token(plan: Plan, dtype) -> int:
    """Bytes of keys and values that one token takes on one device."""
    return plan.slots * len(plan.heads.kv[0]) * token_bytes(dtype, plan.config.attention.head_dim)


def state_bytes(plan: Plan, dtype, *, batch: int, tokens: int) -> int:
    """Bytes on one device of the state of `batch` sequences per micro-batch, each with a cache of `tokens` tokens."""
    one = jax.eval_shape(lambda: empty_state(plan, batch=1, tokens=tokens, cache_dtype=dtype))
    return batch * sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(one))


# --- what programs need for a moment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one device's programs compute with; sizes are of its shard. The estimates are held against compiled programs by tests.

    mlp: columns of what the MLP or the experts hold of a token. shard_vocab: of its logits. cached: dtype of the cache. packed: weights are
    quantised. dequantised: bytes of the largest weight that is made float32 in one piece. chunk: tokens of a prompt that are read at once;
    None: all.
    """

    stages: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    embed: int
    mlp: int
    vocab: int
    shard_vocab: int
    cached: str
    packed: bool
    dequantised: int
    chunk: int | None = None

    def _logits(self, rows: int) -> int:
        return rows * FLOAT * (2 * self.shard_vocab + 3 * self.vocab)  # sampling looks at the whole vocabulary

    def _forward(self, rows: int, tokens: int, cached: str) -> int:
        """Rows through the layers, whole or a chunk at a time. cached: dtype of the caches over which chunks look."""
        at_once = rows // self.stages if rows % self.stages == 0 else rows  # of a pipeline's micro-batch
        read, seen, carried = tokens, tokens, 0
        if self.chunk is not None and self.chunk < tokens:  # over the room of all chunks and one more, for stages without work
            read, tokens = self.chunk, -(-tokens // self.chunk) * self.chunk
            seen = tokens + read
            carried = (rows + at_once) * seen * self.slots * self.kv_heads * token_bytes(cached, self.head_dim)
            # and a layer's keys and values, as they are multiplied
            carried += 2 * at_once * self.kv_heads * seen * self.head_dim * FLOAT
        scores = 2 * at_once * self.heads * read * seen * FLOAT
        qkv = at_once * read * (self.heads + 2 * self.kv_heads) * self.head_dim * FLOAT
        mlp = at_once * read * self.mlp * FLOAT * (3 if self.packed else 1)
        hidden = rows * tokens * self.embed * FLOAT * (3 if self.stages == 1 else 5)
        return hidden + qkv + max(scores, mlp) + carried + self.dequantised

    def prefill(self, rows: int, tokens: int, sequences: int = 0) -> int:
        """Bytes to read `rows` prompts of `tokens` tokens, their fresh caches included. sequences: that continue them, if they are more."""
        fresh = rows * tokens * self.slots * self.kv_heads * token_bytes(self.cached, self.head_dim)
        return self._forward(rows, tokens, self.cached) + fresh + self._logits(max(rows, sequences))

    def score(self, rows: int, tokens: int) -> int:
        """Bytes to score `rows` texts of `tokens` tokens."""
        return self._forward(rows, tokens, "float32") + max(SCORED_AT_ONCE, rows) * self.shard_vocab * FLOAT * 2

    def decode(self, rows: int, tokens: int, reported: int) -> int:
        """Bytes for a token of `rows` sequences per micro-batch with caches of `tokens`. reported: alternatives told of each token."""
        scores = 2 * rows * self.heads * tokens * FLOAT
        copies = 2 * rows * self.kv_heads * tokens * self.head_dim
        # a micro-batch's rows are gathered
        own = rows * self.kv_heads * tokens * token_bytes(self.cached, self.head_dim) if self.stages > 1 else 0
        wide = copies * FLOAT if self.cached in ("int8", "fp8", "int4") else 0
        told = 2 * self.stages * rows * tokens * (8 + 8 * reported)
        return scores + own + wide + told + self._logits(rows) + self.dequantised


def _work(tensors: Mapping[str, Readable], mesh: Mesh, plan: Plan, cached: str, chunk: int | None) -> Work:
    c, heads = plan.config, plan.heads
    tensor, stages = len(heads.query), plan.context.stages
    width = -(-c.mlp.width // tensor)
    shard_vocab = -(-c.vocab // (tensor * stages))
    layer = [path for slot in range(plan.slots) for path in parameters(c) if path.startswith(f"blocks.{plan.sample(slot)}.")]
    packed = any(isinstance(_outline(tensors[path]), QTensor) for path in layer)
    head = "embedding" if c.tied else "head"
    gates = 2 if c.mlp.gated else 1
    whole = [shard_vocab * c.embed] if isinstance(_outline(tensors[head]), QTensor) else []
    whole += [gates * width * c.embed] if packed else []
    on_cpu, columns = mesh.devices.flat[0].platform == "cpu", (gates + 1) * width
    if c.moe is not None:
        own, inner = len(plan.experts[0]) if plan.experts else c.moe.experts, -(-c.moe.width // tensor)
        # rows that a token takes among this device's experts, and columns of each; XLA on a CPU has a row once for every expert
        chosen = len(plan.experts) * min(c.moe.used, own) if plan.experts else c.moe.used
        columns = max(columns, chosen * (3 * inner + c.embed + (own * max(inner, c.embed) if on_cpu else 0)))
        whole += [2 * own * inner * c.embed] if packed else []
    return Work(
        stages=stages,
        heads=len(heads.query[0]),
        kv_heads=len(heads.kv[0]),
        head_dim=c.attention.head_dim,
        slots=plan.slots,
        embed=c.embed,
        mlp=columns,
        vocab=c.vocab,
        shard_vocab=shard_vocab,
        cached=cached,
        packed=packed,
        dequantised=0 if on_cpu else FLOAT * max(whole, default=0),
        chunk=chunk,
    )


# --- the plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes per device. weights, cache (the state of every slot) and temporary (the most that a program needs beside them).

    free: what is there before anything is placed, of which `fraction` may be taken. micro_batch_size, inference_max_tokens: what the cache
    is for. slots: sequences per copy of the model. devices: in all.
    """

    weights: int
    cache: int
    free: int
    temporary: int = 0
    fraction: float = 1.0
    micro_batch_size: int = 1
    inference_max_tokens: int = 0
    slots: int = 1
    devices: int = 1
    work: Work | None = None

    @property
    def needed(self) -> int:
        return self.weights + self.cache + self.temporary

    @property
    def allowed(self) -> int:
        return int(self.fraction * self.free)

    def prefill_rows(self, tokens: int) -> int:
        """Prompts of `tokens` tokens to read at once in each copy of the model, continued by any number of sequences that there are slots
        for: a power of two, as many as fit."""
        room, rows = self.allowed - self.weights - self.cache, 1
        while self.work and rows < self.slots and self.work.prefill(2 * rows, tokens, self.slots) <= room:
            rows *= 2
        return rows

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, `needed` and `allowed` too."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "work"}
        return values | {"needed": self.needed, "allowed": self.allowed}

    def summary(self) -> str:
        """In one line."""
        parts = f"weights {amount(self.weights)} + cache {amount(self.cache)} + temporary {amount(self.temporary)}"
        return f"{parts} = {amount(self.needed)} of {amount(self.free)} free"

    def __str__(self) -> str:
        """A table."""
        tokens = f"{self.slots} sequences of {self.inference_max_tokens} tokens" if self.inference_max_tokens else ""
        lines = [
            ("weights", self.weights, ""),
            ("cache", self.cache, tokens),
            ("temporary", self.temporary, "the largest program's, estimated"),
            ("needed", self.needed, "per device" + (f", on {self.devices} devices" if self.devices > 1 else "")),
            ("allowed", self.allowed, f"{self.fraction:.0%} of {amount(self.free)} free"),
        ]
        return "\n".join(f"{name:<10}{amount(size):>12}  {note}".rstrip() for name, size, note in lines)

    def advice(self) -> str:
        """What to change for less, beginning with what takes most."""
        batch, tokens = f"micro_batch_size ({self.micro_batch_size})", f"inference_max_tokens ({self.inference_max_tokens})"
        chunk = self.work.chunk if self.work else None
        reading = f"lower {tokens}, whose square the scores of a prompt take, or {batch}, or set prefill_chunk"
        if chunk is not None:
            reading = f"lower prefill_chunk ({chunk}), {tokens} or {batch}"
        ways = {
            self.cache: f"lower {batch} or {tokens}, choose a smaller kv_cache.dtype",
            self.weights: "choose fewer bits for the weights (quantization)",
            self.temporary: reading,
        }
        return "; ".join(text for _, text in sorted(ways.items(), reverse=True)) + "; or use more devices"


def bytes_on_a_device(arrays: Any) -> int:
    """Of arrays that are spread alike over devices: what the first of this process has of each."""
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(arrays))


def free_bytes(mesh: Mesh) -> int:
    """Free memory of the fullest of this process's devices; CPU devices share the host's, GPUs that are not here are free."""
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    try:
        stats = [device.memory_stats() for device in local]
    except jax.errors.JaxRuntimeError:  # devices of a topology
        return gpus.describe(local[0].device_kind).memory
    if all(s and "bytes_limit" in s for s in stats):
        return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    return _host_free() // len(local)


def _host_free(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Free memory of the host, or of the container where that may take less."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
        limit, used = (int((root / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(lines.get("inactive_file", 0)))  # the page cache is given back when asked for
    return max(free, 0)


def plan_memory(tensors: Mapping[str, Readable], mesh: Mesh, plan: Plan, config: EngineConfig) -> MemoryPlan:
    """What weights, a cache for every slot, and the programs will take; reads no weight.

    Its micro_batch_size is the configured one, or for "auto" the largest power of two that fits. Raises MemoryPlanError where it does not
    fit, and MeshError for a mesh that the weights cannot be cut for.
    """
    dtype, tokens, stages = cache_dtype(config.cache_dtype), config.inference_max_tokens, plan.context.stages
    weights = weight_bytes(tensors, mesh, plan, config.kernels, head_sketch=config.head_sketch)
    work = _work(tensors, mesh, plan, config.cache_dtype, config.prefill_chunk)
    free = free_bytes(mesh)
    if spans_processes(mesh):  # what is chosen from it must be the same everywhere
        free = channel("free memory").exchange(free, min)
    one = state_bytes(plan, dtype, batch=1, tokens=tokens)

    def of(batch: int) -> MemoryPlan:
        reported = config.max_logprobs
        reading = work.prefill(1, tokens, batch * stages)
        growing = batch * one // plan.slots  # a layer's old cache beside its new one, see Slots
        needs = (work.decode(batch, tokens, reported), reading, work.score(1, tokens), growing)
        return MemoryPlan(
            weights=weights,
            cache=batch * one,
            temporary=max(needs),
            free=free,
            fraction=config.memory_fraction,
            micro_batch_size=batch,
            inference_max_tokens=tokens,
            slots=batch * stages,
            devices=mesh.devices.size,
            work=work,
        )

    if config.micro_batch_size == AUTO:
        largest = LARGEST_AUTO.get(mesh.devices.flat[0].platform, LARGEST_AUTO_ELSEWHERE)
        sizes = [2**n for n in range(largest.bit_length() - 1, -1, -1)]
        memory = next((m for size in sizes if (m := of(size)).needed <= m.allowed), of(1))
    else:
        memory = of(config.micro_batch_size)
    if memory.needed > memory.allowed:
        raise MemoryPlanError(
            f"{memory.summary()} per device{_held(plan)}, memory_fraction allows {config.memory_fraction:.0%}; {memory.advice()}"
        )
    return memory


def _held(plan: Plan) -> str:
    """Which layers a device of a pipeline has room for: those of the fullest stage, whichever it is of."""
    if len(plan.counts) == 1:
        return ""
    return f", each of which holds {plan.slots} of {plan.config.layers} layers: the {len(plan.counts)} stages have {list(plan.counts)}"


def fitting_plan(
    tensors: Mapping[str, Readable], mesh: Mesh, model: ModelConfig, config: EngineConfig
) -> tuple[Plan, MemoryPlan]:
    """The fastest way to lay a model on a mesh that fits into memory, and what it takes. Raises as `plan_memory`, of the smallest way,
    where none fits."""
    refused: MemoryPlanError | None = None
    for plan in plans(model, mesh):
        try:
            return plan, plan_memory(tensors, mesh, plan, config)
        except MemoryPlanError as error:
            refused = error
    assert refused is not None, "there is a plan, or an error of its own"
    raise refused


@contextlib.contextmanager
def explained(memory: MemoryPlan | None) -> Iterator[None]:
    """What runs inside may run out of memory: raises OutOfMemoryError then, with the plan and what to lower."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error).strip()
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text:
            raise
        first = text.splitlines()[0] if text else "no memory is left on the host"
        planned = f"; the plan was\n{memory}\n{memory.advice()}" if memory else ""
        raise OutOfMemoryError(f"out of memory: {first}{planned}") from error


def check_positions(model: ModelConfig, what: str, tokens: int) -> None:
    """Raise ConfigError for more tokens than a model with a table of positions has rows for."""
    if model.learned_positions and tokens > model.max_positions:
        raise ConfigError(f"{what} is {tokens}, but the model has learned {model.max_positions} positions; lower it to that")
