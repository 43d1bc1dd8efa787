"""Norms in the Triton language, through jax-triton: an alternative to the Pallas kernel, with the sum before and the activation behind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.jax_triton import triton_call, triton_refusal
from pallas_kernels.kernel_math import power_of_two
from pallas_kernels.norm import reference
from pallas_kernels.norm.output import NormOutput
from pallas_kernels.norm.rows import rows_refusal
from pallas_kernels.target import interpreted
from pallas_kernels.tuning import tile_for

KINDS = {"rms": 0, "rms_offset": 1, "layer": 2}
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """warps: of 32 threads, which share a row."""

    warps: int


def _supports(target, facts) -> bool | str:
    if reason := triton_refusal(target, (kernel,)) or rows_refusal(facts["shape"]):
        return reason
    if facts.get("quant") is not None or facts.get("dropout"):
        return "it neither rounds to levels nor drops"
    if interpreted() and facts["dtype"] not in (jnp.float32, jnp.float16):
        return f"Triton's interpreter has no arithmetic for {facts['dtype']}"
    return True


supports_rms_norm = supports_layer_norm = supports_fused_norm = _supports


def rms_norm(x, scale, *, eps, unit_offset, out_dtype):
    kind = "rms_offset" if unit_offset else "rms"
    return _norm(x, scale, None, None, kind, eps, None, jnp.dtype(out_dtype)).y


def layer_norm(x, scale, bias, *, eps, out_dtype):
    return _norm(x, scale, bias, None, "layer", eps, None, jnp.dtype(out_dtype)).y


def fused_norm(x, scale, bias, *, kind, eps, residual, activation, dropout, quant, out_dtype):
    del dropout, quant  # refused
    return _norm(x, scale, bias, residual, kind, eps, activation, jnp.dtype(out_dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _norm(x, scale, bias, residual, kind, eps, activation, out_dtype):
    width = x.shape[-1]
    rows, block = x.size // width, power_of_two(width)
    tile = tile_for("norm_jax_triton", Tile(warps=min(32, max(4, block // 512))), width=width, dtype=str(x.dtype), kind=kind)
    flat = lambda a: a.reshape(rows, width)
    dtype = x.dtype if residual is None else jnp.promote_types(x.dtype, residual.dtype)
    out = [jax.ShapeDtypeStruct((rows, width), out_dtype)]
    out += [] if residual is None else [jax.ShapeDtypeStruct((rows, width), dtype)]
    y, *total = triton_call(
        kernel,
        flat(x),
        flat(x if residual is None else residual),  # a pointer that is not read
        x if scale is None else scale,
        x if bias is None else bias,
        out=out,
        name="norm_triton",
        grid=(rows,),
        warps=tile.warps,
        constants={
            "EPS": float(eps),
            "WIDTH": width,
            "BLOCK": block,
            "KIND": KINDS[kind],
            "SCALE": int(scale is not None),
            "BIAS": int(bias is not None),
            "ACTIVATION": ACTIVATIONS[activation],
        }
        | ({"total_ptr": None} if residual is None else {}),
    )
    return NormOutput(y=y.reshape(x.shape), total=total[0].reshape(x.shape) if total else None)


def _forward(x, scale, bias, residual, *static):
    return _norm(x, scale, bias, residual, *static), (x, scale, bias, residual)


def _backward(kind, eps, activation, out_dtype, saved, gradient):
    def run(x, scale, bias, residual):
        given = {"kind": kind, "eps": eps, "residual": residual, "activation": activation, "out_dtype": out_dtype}
        return reference.fused_norm(x, scale, bias, dropout=None, quant=None, **given)

    return jax.vjp(run, *saved)[1](gradient)


_norm.defvjp(_forward, _backward)


@triton.jit
def kernel(
    x_ptr,
    residual_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    x = tl.load(x_ptr + row + at, mask=inside, other=0.0).to(tl.float32)
    if total_ptr is not None:
        x += tl.load(residual_ptr + row + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total_ptr + row + at, x.to(total_ptr.dtype.element_ty), mask=inside)
    if KIND == 2:
        x = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
    y = x / tl.sqrt(tl.sum(x * x, 0) / WIDTH + EPS)
    if SCALE:
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if KIND == 1:
            scale = 1 + scale
        y = y * scale
    if BIAS:
        y = y + tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 1:
        y = y / (1 + tl.exp(-y))
    if ACTIVATION == 2:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == 3:
        bent = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1 + tl.exp(-2 * bent))
    if ACTIVATION == 4:
        y = tl.maximum(y, 0.0)
    tl.store(y_ptr + row + at, y.to(y_ptr.dtype.element_ty), mask=inside)
