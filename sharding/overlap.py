"""How XLA is told to run collectives beside what does not wait for them, on GPUs."""

import os
import re
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

# Compiler options by name, the same as in XLA_FLAGS. XLA's collective matmul (xla_gpu_threshold_for_windowed_einsum_mib) is not among them:
# it rewrites products that XLA's own partitioner has split, which there are none of inside shard_map.
OVERLAP: dict[str, bool] = {
    # starts collectives early and waits late; without it each is waited for where it stands
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # so that what was started early is not queued behind kernels
    "xla_gpu_enable_highest_priority_async_stream": True,
}


def overlap_options(mesh: Mesh, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Compiler options for programs over a mesh: OVERLAP where it has several GPUs, without what the user decides in XLA_FLAGS."""
    if mesh.devices.size == 1 or mesh.devices.flat[0].platform != "gpu":
        return {}
    flags = (os.environ if environ is None else environ).get("XLA_FLAGS", "")
    named = set(re.findall(r"(?:^|\s)--(\w+)", flags))
    return {name: value for name, value in OVERLAP.items() if name not in named}
