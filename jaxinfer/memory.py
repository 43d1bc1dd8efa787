"""What an engine will take of each device's memory, before it takes it."""

import dataclasses

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh

from jaxinfer.config import EngineConfig
from jaxinfer.errors import MemoryPlanError
from jaxinfer.placement import Plan
from pallas_kernels.layer_cache import cache_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes per device. free: what is there before anything is placed."""

    weights: int
    cache: int
    free: int

    def __str__(self) -> str:
        gib = lambda n: f"{n / 2**30:.2f} GiB"
        return (
            f"weights {gib(self.weights)} + cache {gib(self.cache)} = {gib(self.weights + self.cache)} of {gib(self.free)} free"
        )


def cache_bytes_per_token(plan: Plan, dtype) -> int:
    """Bytes of keys and values that one token takes on one device."""
    heads, size = len(plan.heads.kv[0]), plan.config.attention.head_dim * jnp.dtype(dtype).itemsize
    scale = 4 if jnp.dtype(dtype) == jnp.int8 else 0
    return plan.slots * heads * 2 * (size + scale)


def free_bytes(mesh: Mesh) -> int:
    """Free memory of one device; CPU devices share the host's."""
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    on_host = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
    return psutil.virtual_memory().available // on_host


def check_memory(plan: Plan, mesh: Mesh, config: EngineConfig, *, weight_bytes: int) -> MemoryPlan:
    """The plan for weights of `weight_bytes` in all and a cache for every slot. Raises MemoryPlanError where it does not fit."""
    tokens = config.inference_max_tokens * config.micro_batch_size * plan.context.stages
    per_token = cache_bytes_per_token(plan, cache_dtype(config.kv_cache.dtype or config.dtype or "float32"))
    memory = MemoryPlan(weights=-(-weight_bytes // mesh.devices.size), cache=tokens * per_token, free=free_bytes(mesh))
    if memory.weights + memory.cache > config.memory_fraction * memory.free:
        raise MemoryPlanError(
            f"{memory} per device, memory_fraction allows {config.memory_fraction:.0%}; lower micro_batch_size "
            f"({config.micro_batch_size}) or inference_max_tokens ({config.inference_max_tokens}), choose a smaller kv_cache.dtype or "
            "fewer bits, or use more devices"
        )
    return memory
