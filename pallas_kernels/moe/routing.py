"""Which experts a token goes to, tokens in the order of their experts, and the sums of what these say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=("tokens", "places", "sizes"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sorted:
    """T * k rows in the order of experts. tokens: int32 [T * k], the token that each row is of. places: int32 [T, k], the row that
    each choice of a token went to. sizes: int32 [E], rows of each expert."""

    tokens: jax.Array
    places: jax.Array
    sizes: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("experts", "weights", "rows"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """experts: int32 [T, k], the best first. weights: float32 [T, k], of their outputs. rows: the choices in the order of all experts,
    where what made the choice had them at hand, or None."""

    experts: jax.Array
    weights: jax.Array
    rows: Sorted | None = None


def combine(y, routing: Routing, rows: Sorted):
    """Outputs float [T * k, D] of the experts, as sums over each token's choices: float32 [T, D].

    XLA makes one kernel of it, with the residual that is added to it too: each row is read once and each sum written once, so that there
    is nothing for another to gain.
    """
    return jnp.sum(routing.weights[..., None] * y[rows.places].astype(jnp.float32), 1)
