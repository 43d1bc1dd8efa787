"""What a fused norm returns."""

import dataclasses
import functools

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=("y", "total", "scales"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class NormOutput:
    """y [..., D]: the result, or its levels. total [..., D]: x + residual where there was one. scales [..., groups]: of the levels."""

    y: jax.Array
    total: jax.Array | None = None
    scales: jax.Array | None = None
