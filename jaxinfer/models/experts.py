"""Mixtures of experts: the block that holds them, and the half layer that routes tokens through them.

Where experts lie on several devices of the mesh's `expert` axis, each has rows of its own: tokens travel to the experts that they chose,
and what these say travels back (GShard, Lepikhin et al. 2020, arXiv:2006.16668); no token is dropped, however uneven the choice.

Shapes: B rows, T tokens, D embed, E experts (of this shard), F their width (likewise), k experts of a token, N = B T k.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.blocks import WeightBlock, matrix, norm_scale, present
from jaxinfer.models.config import ModelConfig
from pallas_kernels.moe import Routing, combine, grouped_matmul, in_order, route, sort_tokens
from pallas_kernels.norm import norm
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quantize import dequantize_activations, quantize_activations
from pallas_kernels.target import current_target
from sharding.context import ParallelContext


@functools.partial(jax.tree_util.register_dataclass, data_fields=("norm", "router", "up", "down"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEWeights:
    """Weights of the half layer, as arrays or QTensors. norm [D]; router [experts of all shards, D]; up: (gate [E, F, D], up [E, F, D]), or
    both joined along their outputs; down [E, D, F]."""

    norm: jax.Array
    router: jax.Array
    up: tuple
    down: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoESpec:
    """What is fixed when a program is compiled. used, normalise: of MoEConfig. activation, norm, eps: of MLPSpec. held: for each expert
    shard the experts that it holds, -1 for padding; () where every device holds all. normed: as in MLPSpec."""

    used: int
    normalise: bool
    activation: str
    eps: float
    norm: str
    held: tuple[tuple[int, ...], ...] = ()
    normed: bool = False

    def place_of(self) -> tuple[int, ...]:
        """For each expert its place among the held ones of all shards, padding counted."""
        places = {expert: place for place, expert in enumerate(e for shard in self.held for e in shard) if expert >= 0}
        return tuple(places[expert] for expert in range(len(places)))


class MoE(WeightBlock):
    """A router and its experts, as stacks [E, out, in]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32):
        assert config.moe is not None
        D, E, F = config.embed, config.moe.experts, config.moe.width
        self.norm = norm_scale(config, D, "embed")
        self.router = matrix(rngs, (E, D), (None, "embed"), dtype)  # every device chooses among all experts
        self.gate = matrix(rngs, (E, F, D), ("experts", "expert_mlp", "embed"), dtype)
        self.up = matrix(rngs, (E, F, D), ("experts", "expert_mlp", "embed"), dtype)
        self.down = matrix(rngs, (E, D, F), ("experts", "embed", "expert_mlp"), dtype)

    @staticmethod
    def build(get) -> MoEWeights:
        return MoEWeights(norm=get("norm"), router=get("router"), up=present(get("gate"), get("up")), down=get("down"))


def moe_block(x, weights: MoEWeights, *, spec: MoESpec, ctx: ParallelContext, residual=None) -> jax.Array:
    """The half of a pre-norm decoder layer that has experts, for one tensor shard and one expert shard.

        y = residual + sum over the k experts e of a token of w_e W_down[e] (act(W_gate[e] n) * W_up[e] n),     n = norm(x)

    x: float32 [B, T, D], the rows of this shard. residual: likewise, or None; under tensor parallelism y is a partial sum, and one shard
    passes it. Returns float32 [B, T, D]. Source: Jiang et al. 2024, arXiv:2401.04088.
    """
    with jax.named_scope("norm"):
        n = x if spec.normed else norm(x, weights.norm, kind=spec.norm, eps=spec.eps)
        n = n.reshape(-1, x.shape[-1])
    with jax.named_scope("route"):
        routing = route(quant_matmul(n, weights.router), experts_per_token=spec.used, normalise=spec.normalise)
    y = _from_all_shards(n, routing, weights, spec, ctx) if spec.held else _from_own(n, routing, weights, spec, ctx)
    y = y.reshape(x.shape)
    return y if residual is None else residual + y


def _from_own(x, routing: Routing, weights: MoEWeights, spec: MoESpec, ctx: ParallelContext):
    """float32 [T, D] of x [T, D], by experts that are all here."""
    with jax.named_scope("sort"):
        rows = in_order(routing, weights.down.shape[0])
    y = _experts(x, rows.tokens, rows.sizes, weights, spec, ctx)
    with jax.named_scope("combine"):
        return combine(y, routing, rows)


def _from_all_shards(x, routing: Routing, weights: MoEWeights, spec: MoESpec, ctx: ParallelContext):
    """The same by experts of which every shard holds some."""
    E, k = len(spec.held[0]), min(spec.used, len(spec.held[0]))
    ragged = current_target().platform == "gpu"
    with jax.named_scope("sort"):
        places = jnp.asarray(spec.place_of(), jnp.int32)[routing.experts]
        rows = sort_tokens(places, len(spec.held) * E)
    with jax.named_scope("dispatch"):
        sizes = rows.sizes.reshape(len(spec.held), E)
        arrived = ctx.to_experts(x[rows.tokens], sizes, capacity=x.shape[0] * k, ragged=ragged)
    with jax.named_scope("sort"):
        here = sort_tokens(arrived.experts[:, None], E + 1)  # the last kind is what holds no row
        # rows that hold nothing come last, and the last expert has them too: sizes add up to all rows
        sizes = here.sizes[:E].at[E - 1].add(here.sizes[E])
    y = _experts(arrived.rows, here.tokens, sizes, weights, spec, ctx)[here.places[:, 0]]
    with jax.named_scope("collect"):
        back = ctx.from_experts(y, arrived, rows=rows.tokens.size, ragged=ragged)
    with jax.named_scope("combine"):
        return combine(back, routing, rows)


def _experts(x, rows, sizes, weights: MoEWeights, spec: MoESpec, ctx: ParallelContext):
    """Rows of x [T, D], which `rows` [N] names in the order of their experts, through these: float32 [N, D], not yet weighted."""
    with jax.named_scope("up"):
        if len(weights.up) == 1:
            h = grouped_matmul(x, weights.up[0], sizes, rows=rows, activation=spec.activation, gated=True)
        else:
            gate, up = weights.up
            h = grouped_matmul(x, gate, sizes, rows=rows, activation=spec.activation)
            h = h * grouped_matmul(x, up, sizes, rows=rows)
    with jax.named_scope("down"):
        down: Any = weights.down
        inputs = down.activation if isinstance(down, QTensor) else None
        if inputs is not None and inputs.group is None and not inputs.static and ctx.tensor:
            # one scale for a token's inputs, of which every tensor shard has a part
            h = dequantize_activations(*quantize_activations(h, inputs, ctx.max_over_tensor), inputs)
            down = down.replace(activation=None)
        return grouped_matmul(h, down, sizes)
