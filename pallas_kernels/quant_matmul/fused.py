"""A matmul with what stands before and behind it: norm, bias, activation, gate, residual."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.activation.reference import ACTIVATIONS
from pallas_kernels.cpu import operations as native
from pallas_kernels.errors import ShapeError
from pallas_kernels.norm import KINDS, fused_norm, norm
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.registry import choose, register, register_file
from pallas_kernels.shares import share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """What inputs go through first. kind: one of `norm.KINDS`; scale [I], or None for ones in a layer norm; bias [I] or None."""

    kind: str
    eps: float
    scale: jax.Array | None
    bias: jax.Array | None = None


_ARRAYS = ("x", "weights", "biases", "scale", "norm_bias", "residual", "lead")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """The arrays of a call."""

    x: jax.Array
    weights: tuple
    biases: tuple
    scale: jax.Array | None
    norm_bias: jax.Array | None
    residual: jax.Array | None
    lead: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What of a call is fixed when a program is compiled. kind: of the norm, or None."""

    activation: str | None
    gated: bool
    kind: str | None
    eps: float
    out_dtype: jnp.dtype
    max_over_shards: Callable | None


def fused_matmul(
    x,
    weights: tuple,
    *,
    biases: tuple = (),
    norm: Norm | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual=None,
    lead: jax.Array | None = None,
    out_dtype=jnp.float32,
    max_over_shards: Callable | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """A linear layer, or the two of a gated one, with its neighbours.

        z = norm(x) @ W.T + b          y = residual + act(z)          or residual + act(z_gate) * z_up where gated

    x: float [..., I]. weights: float arrays or QTensors [O_i, I], whose outputs are joined; gated: the first half of all outputs is the
    gate. biases: [O_i] each, or () for none. activation: one of `activation.KINDS`, or None for the identity. residual: float [..., O] or
    None, O being the outputs of y. lead: bool scalar, whether biases and residual go into this shard's part of a sum; None: they do, and
    nothing but a partial sum that is neither activated nor gated takes one. max_over_shards: see `quant_matmul`. Returns out_dtype [...,
    O]. Differentiable as `quant_matmul`. Raises ShapeError. Source: Shazeer 2020, arXiv:2002.05202.
    """
    if not weights or any(len(w.shape) != 2 or w.shape[1] != x.shape[-1] for w in weights):
        raise ShapeError(
            f"fused_matmul: weights must be [O, {x.shape[-1]}] as x {list(x.shape)}, got {[list(w.shape) for w in weights]}"
        )
    if biases and [b.shape for b in biases] != [(w.shape[0],) for w in weights]:
        raise ShapeError(
            f"fused_matmul: biases must be {[[w.shape[0]] for w in weights]}, one per weight, got {[list(b.shape) for b in biases]}"
        )
    if norm is not None and norm.kind not in KINDS:
        raise ShapeError(f"fused_matmul: norm {norm.kind!r} is not one of {KINDS}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ShapeError(f"fused_matmul: activation {activation!r} is not one of {tuple(ACTIVATIONS)}")
    outputs = sum(w.shape[0] for w in weights)
    if gated and (outputs % 2 or (len(weights) > 1 and [w.shape[0] for w in weights] != [outputs // 2] * 2)):
        raise ShapeError(f"fused_matmul: gate and up have as many outputs each, got {[w.shape[0] for w in weights]}")
    shape = (*x.shape[:-1], outputs // 2 if gated else outputs)
    if residual is not None and residual.shape != shape:
        raise ShapeError(f"fused_matmul: residual must be {list(shape)}, got {list(residual.shape)}")
    if lead is not None and (gated or activation is not None):
        raise ShapeError("fused_matmul: an activation is not of a partial sum; give lead without gate and activation")
    call = Call(
        activation=activation,
        gated=gated,
        kind=None if norm is None else norm.kind,
        eps=0.0 if norm is None else norm.eps,
        out_dtype=jnp.dtype(out_dtype),
        max_over_shards=max_over_shards,
    )
    operands = Operands(
        x=x,
        weights=tuple(weights),
        biases=tuple(biases),
        scale=None if norm is None else norm.scale,
        norm_bias=None if norm is None else norm.bias,
        residual=residual,
        lead=lead,
    )
    facts = {"shape": x.shape, "weights": operands.weights, "activation": activation, "gated": gated}
    run = choose("fused_matmul", implementation, **facts, over_shards=max_over_shards is not None)
    return run.function(operands, call)


def compose(operands: Operands, call: Call, implementation: str | None = None) -> jax.Array:
    """The meaning of `fused_matmul`, from the small operations. implementation: of each of them."""
    n = operands.x
    if call.kind is not None:
        n = norm(n, operands.scale, operands.norm_bias, kind=call.kind, eps=call.eps, implementation=implementation)
    biases = tuple(share(operands.lead, b) for b in operands.biases) or (None,) * len(operands.weights)
    run = functools.partial(quant_matmul, n, max_over_shards=call.max_over_shards, implementation=implementation)
    z = jnp.concatenate([run(w, bias=b) for w, b in zip(operands.weights, biases, strict=True)], -1)
    act = ACTIVATIONS[call.activation] if call.activation is not None else lambda z: z
    if call.gated:
        half = z.shape[-1] // 2
        y = act(z[..., :half]) * z[..., half:]
    else:
        y = act(z)
    if operands.residual is not None:
        y = share(operands.lead, operands.residual.astype(jnp.float32)) + y
    return y.astype(call.out_dtype)


def around_xla(operands: Operands, call: Call) -> jax.Array:
    """Products of floats by XLA, which puts what follows behind them; the norm gives what is multiplied, in its dtype."""
    if call.kind is None:
        return compose(operands, call)
    n = fused_norm(
        operands.x, operands.scale, operands.norm_bias, kind=call.kind, eps=call.eps, out_dtype=operands.weights[0].dtype
    ).y
    return compose(dataclasses.replace(operands, x=n, scale=None, norm_bias=None), dataclasses.replace(call, kind=None))


def _supports_around_xla(target, facts) -> bool | str:
    if target.platform != "gpu":
        return f"it is made for gpu, not for {target.platform}"
    formats = {w.format if isinstance(w, QTensor) else str(w.dtype) for w in facts["weights"]}
    return True if formats <= {"bfloat16", "float16"} else f"it multiplies 16-bit floats, not {', '.join(sorted(formats))}"


register("fused_matmul", "reference", compose)
register("fused_matmul", "native", native.fused_matmul, supports=native.supports_fused_matmul, priority=native.PRIORITY)
register("fused_matmul", "xla", around_xla, supports=_supports_around_xla, priority=10)
register_file("fused_matmul", "pallas", "pallas_kernels.quant_matmul.pallas")
