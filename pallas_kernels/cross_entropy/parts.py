"""What one shard of a vocabulary adds to a log-probability."""

import dataclasses
import functools

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=("largest", "total", "target"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """All float32 [...]. largest: logit; total: of exp(logit - largest); target: the target's logit, 0 where it lies on another shard."""

    largest: jax.Array
    total: jax.Array
    target: jax.Array
