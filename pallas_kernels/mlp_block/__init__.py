"""Half a layer as one operation: norm, up (and gate), activation, down, residual."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.cpu import operations as native
from pallas_kernels.errors import ShapeError
from pallas_kernels.mlp_block import reference
from pallas_kernels.norm import KINDS
from pallas_kernels.registry import choose, register, register_file
from pallas_kernels.target import Target

register("mlp_block", "reference", reference.mlp_block)


def _supports_native(target: Target, facts: Mapping[str, Any]) -> bool | str:
    if facts["spec"].normed:
        return "it has the norm in it; what is normed already runs through its parts"
    return native.supports_mlp_block(target, facts)


register("mlp_block", "native", native.mlp_block, supports=_supports_native, priority=native.PRIORITY)
register_file("mlp_block", "pallas", "pallas_kernels.mlp_block.pallas")


_FIELDS = ("norm", "norm_bias", "up", "up_bias", "down", "down_bias")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_FIELDS, meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPWeights:
    """Weights of the half layer, as arrays or QTensors [out, in].

    norm [D]; norm_bias [D] or None, of a layer norm. up: (gate [F, D], up [F, D]), or both joined along their outputs, or the one
    matrix of an ungated MLP. up_bias: the same parts as vectors, or (). down [D, F]; down_bias [D] or None.
    """

    norm: jax.Array
    norm_bias: jax.Array | None = None
    up: tuple
    up_bias: tuple
    down: jax.Array
    down_bias: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """What is fixed when a program is compiled. activation: one of `mlp_block.ACTIVATIONS`. gated: act(gate) * up, else act(up).
    norm: one of `norm.KINDS`; eps: its own. normed: x comes normed, and the block's own norm is left out."""

    activation: str
    gated: bool
    eps: float
    norm: str = "rms"
    normed: bool = False


ACTIVATIONS = tuple(reference.ACTIVATIONS)


def mlp_block(
    x,
    weights: MLPWeights,
    *,
    spec: MLPSpec,
    residual=None,
    lead: jax.Array | None = None,
    max_over_shards: Callable | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The MLP half of a pre-norm decoder layer, for one tensor shard.

        y = residual + W_down (act(W_gate n) * W_up n) + b_down,     n = norm(x)

    x: float32 [B, T, D]. residual: float32 [B, T, D] or None. lead: bool scalar, whether residual and down_bias go into this shard's y, a
    partial sum under tensor parallelism; None: they do. max_over_shards: see `quant_matmul`. Returns float32 [B, T, D]. Raises ShapeError.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    if x.ndim != 3 or weights.norm.shape != x.shape[-1:]:
        raise ShapeError(
            f"mlp_block: x must be [B, T, D] with D as the norm's, got {list(x.shape)} and {list(weights.norm.shape)}"
        )
    if spec.activation not in ACTIVATIONS:
        raise ShapeError(f"mlp_block: activation {spec.activation!r} is not one of {ACTIVATIONS}")
    if spec.norm not in KINDS:
        raise ShapeError(f"mlp_block: norm {spec.norm!r} is not one of {KINDS}")
    run = choose("mlp_block", implementation, shape=x.shape, spec=spec, weights=weights, max_over_shards=max_over_shards)
    return run.function(x, weights, spec=spec, residual=residual, lead=lead, max_over_shards=max_over_shards)
