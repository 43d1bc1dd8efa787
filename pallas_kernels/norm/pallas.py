"""Norms as one pass over their rows, for NVIDIA GPUs through Pallas and Triton: each input is read once, each output written once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.kernel_math import ACTIVATIONS, of_dtype, power_of_two
from pallas_kernels.launch import gpu_refusal, launch
from pallas_kernels.norm import reference
from pallas_kernels.norm.output import NormOutput
from pallas_kernels.tuning import tile_for
from pallas_kernels.value_formats import FP8_MAX

WIDEST = 1 << 15  # elements of a row: what a block of 1024 threads holds in registers
NARROWEST_FP8 = (8, 9)  # Ada: the first that converts to e4m3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """rows: of a block. warps: of 32 threads."""

    rows: int
    warps: int


def heuristic(width: int) -> Tile:
    """Eight to sixteen elements a thread, and blocks of at least 1024 elements."""
    block = power_of_two(width)
    return Tile(rows=max(1, 1024 // block), warps=min(32, max(1, block // 512)) if block > 1024 else 4)


def _supports(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    width = facts["shape"][-1]
    if not 1 <= width <= WIDEST:
        return f"a row of {width} does not fit the registers of a block, at most {WIDEST} do"
    if 0 in facts["shape"]:
        return "there is nothing to norm"
    quant = facts.get("quant")
    if quant is not None:
        if quant.group is not None and (quant.group & (quant.group - 1) or quant.group > power_of_two(width)):
            return f"it takes scales per row or per power of two, not per {quant.group}"
        if quant.format == "fp8" and target.capability is not None and target.capability < NARROWEST_FP8:
            return f"{target.device_kind} cannot convert to float8_e4m3fn"
    return True


supports_rms_norm = supports_layer_norm = supports_fused_norm = _supports


def rms_norm(x, scale, *, eps, unit_offset, out_dtype):
    kind = "rms_offset" if unit_offset else "rms"
    return _norm(x, scale, None, None, kind, eps, None, None, jnp.dtype(out_dtype)).y


def layer_norm(x, scale, bias, *, eps, out_dtype):
    return _norm(x, scale, bias, None, "layer", eps, None, None, jnp.dtype(out_dtype)).y


def fused_norm(x, scale, bias, *, kind, eps, residual, activation, quant, out_dtype):
    return _norm(x, scale, bias, residual, kind, eps, activation, quant, jnp.dtype(out_dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def _norm(x, scale, bias, residual, kind, eps, activation, quant, out_dtype):
    width, lead = x.shape[-1], x.shape[:-1]
    rows = x.size // width
    tile = tile_for("norm", heuristic(width), width=width, dtype=str(x.dtype), kind=kind)
    flat = lambda a: None if a is None else a.reshape(-1, width)
    given = {"x": flat(x), "residual": flat(residual), "scale": scale, "bias": bias}
    given = {name: a for name, a in given.items() if a is not None}
    dtype = out_dtype if quant is None else jnp.dtype(jnp.float8_e4m3fn if quant.format == "fp8" else jnp.int8)
    out = {"y": jax.ShapeDtypeStruct((rows, width), dtype)}
    if residual is not None:
        out["total"] = jax.ShapeDtypeStruct((rows, width), jnp.promote_types(x.dtype, residual.dtype))
    groups = 0
    if quant is not None:
        groups = -(-width // (quant.group or width))
        out["scales"] = jax.ShapeDtypeStruct((rows, groups), jnp.float32)
    kernel = functools.partial(
        _kernel,
        names=(*given, *out),
        block=(tile.rows, power_of_two(width)),
        width=width,
        rows=rows,
        kind=kind,
        eps=eps,
        activation=activation,
        group=quant and (quant.group or power_of_two(width)),
        groups=groups,
    )
    found = launch(
        kernel, *given.values(), name="norm", out=tuple(out.values()), grid=(-(-rows // tile.rows),), warps=tile.warps
    )
    return NormOutput(**{name: a.reshape(*lead, a.shape[-1]) for name, a in zip(out, found, strict=True)})


def _kernel(*refs, names, block, width, rows, kind, eps, activation, group, groups):
    ref = dict(zip(names, refs, strict=True))
    first = pl.program_id(0) * block[0]
    columns = lax.broadcasted_iota(jnp.int32, block, 1)
    inside = (columns < width) & (first + lax.broadcasted_iota(jnp.int32, block, 0) < rows)
    tile = (pl.ds(first, block[0]), pl.ds(0, block[1]))

    def row(name):
        return triton.load(ref[name].at[tile], mask=inside, other=0.0).astype(jnp.float32)

    def vector(name):
        kept = jnp.arange(block[1]) < width
        return triton.load(ref[name].at[pl.ds(0, block[1])], mask=kept, other=0.0).astype(jnp.float32)[None]

    x = row("x")
    if "residual" in ref:
        x = x + row("residual")
        triton.store(ref["total"].at[tile], x.astype(ref["total"].dtype), mask=inside)
    if kind == "layer":
        x = jnp.where(inside, x - jnp.sum(x, 1, keepdims=True) / width, 0.0)
    y = x * lax.rsqrt(jnp.sum(x * x, 1, keepdims=True) / width + eps)
    if "scale" in ref:
        scale = vector("scale")
        y = y * (1 + scale if kind == "rms_offset" else scale)
    if "bias" in ref:
        y = y + vector("bias")
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if group is not None:
        y, scales = _quantized(y, inside, group, ref["y"].dtype)
        places = lax.broadcasted_iota(jnp.int32, scales.shape, 1)
        kept = (places < groups) & (first + lax.broadcasted_iota(jnp.int32, scales.shape, 0) < rows)
        triton.store(ref["scales"].at[tile[0], pl.ds(0, scales.shape[1])], scales, mask=kept)
    triton.store(ref["y"].at[tile], of_dtype(y, ref["y"].dtype), mask=inside)


def _quantized(y, inside, group, dtype):
    """Levels, as floats, and scales [rows, groups], see `quantize_activations`."""
    rows, width = y.shape
    parts = jnp.where(inside, y, 0.0).reshape(rows, width // group, group)
    top = FP8_MAX if dtype == jnp.float8_e4m3fn else 127.0
    scales = jnp.max(jnp.abs(parts), 2) * (1 / top)
    levels = parts / jnp.where(scales == 0, 1.0, scales)[:, :, None]
    return jnp.clip(levels, -top, top).reshape(rows, width), scales


def _forward(x, scale, bias, residual, *static):
    return _norm(x, scale, bias, residual, *static), (x, scale, bias, residual)


def _backward(kind, eps, activation, quant, out_dtype, saved, gradient):
    def run(x, scale, bias, residual):
        return reference.fused_norm(
            x,
            scale,
            bias,
            kind=kind,
            eps=eps,
            residual=residual,
            activation=activation,
            quant=quant,
            out_dtype=out_dtype,
        )

    return jax.vjp(run, *saved)[1](gradient)


_norm.defvjp(_forward, _backward)
