"""Mixtures of experts: routing, tokens in the order of experts, one matmul for all experts, and their weighted sum.

routing = route(x @ router.T, experts_per_token=8, normalise=True)
y = moe(x, routing, up, down, activation="silu")
"""

import jax
import jax.numpy as jnp

from pallas_kernels.activation import KINDS
from pallas_kernels.errors import ShapeError
from pallas_kernels.moe import reference
from pallas_kernels.moe.routing import Routing, Sorted, combine
from pallas_kernels.registry import choose, register, register_file

register("route", "reference", reference.route)
register_file("route", "pallas", "pallas_kernels.moe.pallas")
register("sort_tokens", "reference", reference.sort_tokens)
register_file("sort_tokens", "pallas", "pallas_kernels.moe.pallas")
register("grouped_matmul", "reference", reference.grouped_matmul)
register_file("grouped_matmul", "pallas", "pallas_kernels.quant_matmul.pallas")


def route(
    logits,
    *,
    experts_per_token: int,
    scoring: str = "softmax",
    bias=None,
    normalise: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    group_score: str = "max",
    implementation: str | None = None,
) -> Routing:
    """The experts of each token, and the weights of their outputs.

        s = scoring(logits)          experts = top_k(s + bias)          weights = scale * s[experts] (/ their sum)

    logits: float [T, E]. scoring: softmax or sigmoid. bias: float [E] or None, moves the choice and not the weights. groups: experts lie
    in so many equal groups, of which the kept_groups with the best group_score ("max": their best expert, "top2": the sum of their best
    two) are chosen from. Of equal ones the first is taken. Differentiable in logits. Raises ShapeError. Source: Shazeer et al. 2017,
    arXiv:1701.06538; groups and bias: DeepSeek-V3, arXiv:2412.19437.
    """
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ShapeError(f"route: logits must be float [T, E], got {logits.dtype}{list(logits.shape)}")
    experts = logits.shape[1]
    if scoring not in ("softmax", "sigmoid") or group_score not in ("max", "top2"):
        raise ShapeError(
            f"route: scoring {scoring!r} and group_score {group_score!r} must be softmax or sigmoid, and max or top2"
        )
    if groups < 1 or experts % groups or not 1 <= kept_groups <= groups:
        raise ShapeError(f"route: {experts} experts make no {groups} groups of which {kept_groups} are kept")
    if group_score == "top2" and groups > 1 and experts // groups < 2:
        raise ShapeError(f"route: groups of one expert have no best two; {experts} experts lie in {groups} groups")
    if not 1 <= experts_per_token <= experts // groups * kept_groups:
        raise ShapeError(
            f"route: {experts_per_token} experts of a token, there are {experts // groups * kept_groups} to choose from"
        )
    if bias is not None and bias.shape != (experts,):
        raise ShapeError(f"route: bias must be [{experts}], got {list(bias.shape)}")
    run = choose("route", implementation, shape=logits.shape, groups=groups)
    return run.function(
        logits,
        bias,
        experts_per_token=experts_per_token,
        scoring=scoring,
        normalise=normalise,
        scale=scale,
        groups=groups,
        kept_groups=kept_groups,
        group_score=group_score,
    )


def sort_tokens(experts, count: int, *, implementation: str | None = None) -> Sorted:
    """Choices of `count` experts in the order of experts, those of one expert in the order of tokens.

    experts: int32 [T, k], each in 0..count-1; an expert may be chosen twice. Raises ShapeError.
    """
    if experts.ndim != 2 or not jnp.issubdtype(experts.dtype, jnp.integer) or count < 1:
        raise ShapeError(
            f"sort_tokens: experts must be integers [T, k] below {count}, got {experts.dtype}{list(experts.shape)}; count is 1 or more"
        )
    run = choose("sort_tokens", implementation, shape=experts.shape, count=count)
    return run.function(experts, count=count)


def in_order(routing: Routing, count: int) -> Sorted:
    """The rows of a routing to `count` experts, in the order of these."""
    return sort_tokens(routing.experts, count) if routing.rows is None else routing.rows


def grouped_matmul(
    x,
    w,
    sizes,
    *,
    rows=None,
    bias=None,
    activation: str | None = None,
    gated: bool = False,
    out_dtype=jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Consecutive rows times the weight of their expert.

        z_i = Q(x_i) @ w[e].T + bias[e]  for the sizes[e] rows of expert e          y = act(z), or act(z_gate) * z_up where gated

    x: float [N, I]; or [T, I] with rows: int32 [N], which row of x each x_i is, so that no copy of them is made. w: float array or QTensor
    [E, O, I]; gated: the first half of O is the gate. sizes: int32 [E], which add up to N.
    bias: float [E, O] or None. activation: one of `activation.KINDS`, or None. Returns out_dtype [N, O], or [N, O/2] where gated.
    Differentiable as `quant_matmul`. Raises ShapeError. The reference is jax.lax.ragged_dot.
    """
    if len(w.shape) != 3 or x.ndim != 2 or x.shape[1] != w.shape[2] or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(
            f"grouped_matmul: x must be float [N, I] and w [E, O, I], got {x.dtype}{list(x.shape)} and {list(w.shape)}"
        )
    if sizes.shape != w.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ShapeError(f"grouped_matmul: sizes must be integers [{w.shape[0]}], got {sizes.dtype}{list(sizes.shape)}")
    if rows is not None and (rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer)):
        raise ShapeError(f"grouped_matmul: rows must be integers [N], got {rows.dtype}{list(rows.shape)}")
    if bias is not None and bias.shape != w.shape[:2]:
        raise ShapeError(f"grouped_matmul: bias must be {list(w.shape[:2])}, got {list(bias.shape)}")
    if activation is not None and activation not in KINDS:
        raise ShapeError(f"grouped_matmul: activation {activation!r} is not one of {KINDS}")
    if gated and w.shape[1] % 2:
        raise ShapeError(f"grouped_matmul: gate and up have as many outputs each, got {w.shape[1]} in all")
    shape = x.shape if rows is None else (*rows.shape, x.shape[1])
    run = choose("grouped_matmul", implementation, shape=shape, weight=w)
    return run.function(x, w, sizes, bias, rows, activation=activation, gated=gated, out_dtype=jnp.dtype(out_dtype))


def moe(x, routing: Routing, up, down, *, activation: str, up_bias=None, down_bias=None) -> jax.Array:
    """The gated MLPs of each token's experts, weighted.

        y_t = sum over k of weights[t, k] * (W_down[e] (act(W_gate[e] x_t) * W_up[e] x_t)),     e = experts[t, k]

    x: float [T, D]. up: [E, 2F, D], gates first; down: [E, D, F]; float arrays or QTensors. up_bias [E, 2F], down_bias [E, D], or None.
    Returns float32 [T, D]. Raises ShapeError.
    """
    with jax.named_scope("sort"):
        rows = in_order(routing, up.shape[0])
    with jax.named_scope("up"):
        h = grouped_matmul(x, up, rows.sizes, rows=rows.tokens, bias=up_bias, activation=activation, gated=True)
    with jax.named_scope("down"):
        y = grouped_matmul(h, down, rows.sizes, bias=down_bias)
    with jax.named_scope("combine"):
        return combine(y, routing, rows)
