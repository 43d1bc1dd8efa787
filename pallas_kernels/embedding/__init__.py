"""Rows of an embedding table."""

import jax
import jax.numpy as jnp

from pallas_kernels.embedding import reference
from pallas_kernels.errors import ShapeError
from pallas_kernels.registry import choose, register

register("embedding", "reference", reference.embedding)


def embedding(table, ids, *, first: int | jax.Array = 0, implementation: str | None = None) -> jax.Array:
    """y = table[ids - first], and zeros for ids outside of the table: the partial result of one shard of the vocabulary.

    table: float array [V, D] or a canonical or cpu32 QTensor of that shape. ids: int32, any shape. first: id of the table's first row.
    Returns float32 [*ids.shape, D]. Raises ShapeError.
    """
    if len(table.shape) != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ShapeError(f"embedding: table must be [V, D] and ids integers, got {list(table.shape)} and {ids.dtype}")
    return choose("embedding", implementation, shape=table.shape).function(table, ids, first)
