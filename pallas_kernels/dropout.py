"""Dropout whose choices are a function of a seed and of an element's index in the whole array.

Kernels make the choices where they use them and a gradient makes them again: no mask is stored, and every way to shard an array drops the
same elements of it. Source: Srivastava et al. 2014, "Dropout"; counters: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import ShapeError
from pallas_kernels.sampling.random import threefry


@functools.partial(jax.tree_util.register_dataclass, data_fields=("seed", "start"), meta_fields=("rate", "shape"))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
    """An element is 0 with probability `rate`, else divided by 1 - rate.

    rate: 0 <= rate < 1. seed: uint32 [2], another one for each layer and step. start: int32 [ndim], where in the whole array this shard
    begins, and shape: that array's; None for both where there is but one shard.
    """

    rate: float
    seed: jax.Array
    start: jax.Array | None = None
    shape: tuple[int, ...] | None = None

    def rows(self, shape: tuple[int, ...]) -> jax.Array:
        """The number of each row of an array [..., D] among the rows of the whole one, uint32 [rows]."""
        if self.start is None:
            return jnp.arange(math.prod(shape[:-1]), dtype=jnp.uint32)
        whole = self.shape or shape
        number = jnp.zeros(shape[:-1], jnp.uint32)
        for axis in range(len(shape) - 1):
            at = self.start[axis].astype(jnp.uint32) + jax.lax.broadcasted_iota(jnp.uint32, shape[:-1], axis)
            number = number * np.uint32(whole[axis]) + at
        return number.reshape(-1)

    def operands(self, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """What a kernel takes: the seed and, of a shard, the numbers of its rows and of its first column."""
        if self.start is None:
            return {"seed": self.seed}
        return {"seed": self.seed, "row_numbers": self.rows(shape), "column": self.start[-1:].astype(jnp.uint32)}


def check_dropout(op: str, dropout: Dropout | None, shape: tuple[int, ...]) -> None:
    """Raises ShapeError for a dropout that does not fit an array of this shape."""
    if dropout is None:
        return
    if not 0 <= dropout.rate < 1:
        raise ShapeError(f"{op}: the rate of dropout is {dropout.rate}; it must be at least 0 and less than 1")
    if dropout.seed.shape != (2,) or dropout.seed.dtype != jnp.uint32:
        raise ShapeError(f"{op}: the seed of dropout must be uint32[2], got {dropout.seed.dtype}{list(dropout.seed.shape)}")
    if (dropout.start is None) != (dropout.shape is None):
        raise ShapeError(f"{op}: start and shape of dropout come together; give both, or neither")
    if dropout.start is not None and (dropout.start.shape != (len(shape),) or len(dropout.shape or ()) != len(shape)):
        raise ShapeError(
            f"{op}: start and shape of dropout must have {len(shape)} numbers as {list(shape)} has axes, got "
            f"{list(dropout.start.shape)} and {dropout.shape}"
        )


def dropped(y, rate: float, seed, rows, columns):
    """float32 y under dropout. seed: a pair of uint32; rows, columns: uint32, numbers of its rows and columns, which broadcast to y."""
    bits, _ = threefry((seed[0], seed[1]), (rows, columns))
    # 31 bits, which compare as int32
    kept = (bits >> np.uint32(1)).astype(jnp.int32) < np.int32(min(round((1 - rate) * 2**31), 2**31 - 1))
    return jnp.where(kept, y * np.float32(1 / (1 - rate)), 0.0)


def apply(y, dropout: Dropout | None):
    """`dropped` of an array [..., D] in plain jnp."""
    if dropout is None:
        return y
    rows = dropout.rows(y.shape).reshape(*y.shape[:-1], 1)
    columns = jnp.arange(y.shape[-1], dtype=jnp.uint32)
    if dropout.start is not None:
        columns = columns + dropout.start[-1].astype(jnp.uint32)
    return dropped(y, dropout.rate, dropout.seed, *jnp.broadcast_arrays(rows, columns))
