"""Which experts a token goes to, and tokens in the order of their experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=("experts", "weights"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """experts: int32 [T, k], the best first. weights: float32 [T, k], of their outputs."""

    experts: jax.Array
    weights: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("tokens", "places", "sizes"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sorted:
    """T * k rows in the order of experts. tokens: int32 [T * k], the token that each row is of. places: int32 [T, k], the row that
    each choice of a token went to. sizes: int32 [E], rows of each expert."""

    tokens: jax.Array
    places: jax.Array
    sizes: jax.Array


def sort_tokens(experts, count: int) -> Sorted:
    """Choices int32 [T, k] of `count` experts in the order of experts; those of one expert in the order of tokens."""
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    sizes = jnp.sum(flat[:, None] == jnp.arange(count), 0, dtype=jnp.int32)
    return Sorted(tokens=order // experts.shape[-1], places=places.reshape(experts.shape), sizes=sizes)


def combine(y, routing: Routing, rows: Sorted):
    """Outputs float [T * k, D] of the experts, as sums over each token's choices: float32 [T, D]."""
    return jnp.einsum("tk,tkd->td", routing.weights, y[rows.places].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
