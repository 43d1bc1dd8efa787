"""What an activation returns."""

import dataclasses
import functools

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=("y", "scales"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationOutput:
    """y [..., F]: the result, or its levels. scales [..., groups]: of the levels, or None."""

    y: jax.Array
    scales: jax.Array | None = None
