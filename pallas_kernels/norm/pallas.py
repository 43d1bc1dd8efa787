"""Norms as one pass over their rows, for NVIDIA GPUs through Pallas and Triton: each input is read once, each output written once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.kernel_math import ACTIVATIONS, drop, masked_slice, power_of_two
from pallas_kernels.launch import gpu_refusal, launch
from pallas_kernels.norm import reference
from pallas_kernels.norm.output import NormOutput
from pallas_kernels.norm.rows import rows_refusal
from pallas_kernels.quantize.pallas import Tile as Block
from pallas_kernels.quantize.pallas import block, results, scales_refusal, store_results
from pallas_kernels.tuning import tile_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """rows: of a block. warps: of 32 threads."""

    rows: int
    warps: int


def heuristic(columns: int) -> Tile:
    """Eight to sixteen elements a thread, and blocks of at least 1024 elements. columns: of a block, a power of two."""
    return Tile(rows=max(1, 1024 // columns), warps=min(32, max(1, columns // 512)) if columns > 1024 else 4)


def _supports(target, facts) -> bool | str:
    if reason := gpu_refusal(target) or rows_refusal(facts["shape"]):
        return reason
    quant = facts.get("quant")
    return True if quant is None else scales_refusal(target, facts["shape"][-1], quant.group, quant.format)


supports_rms_norm = supports_layer_norm = supports_fused_norm = _supports


def rms_norm(x, scale, *, eps, unit_offset, out_dtype):
    kind = "rms_offset" if unit_offset else "rms"
    return _norm(x, scale, None, None, None, kind, eps, None, None, jnp.dtype(out_dtype)).y


def layer_norm(x, scale, bias, *, eps, out_dtype):
    return _norm(x, scale, bias, None, None, "layer", eps, None, None, jnp.dtype(out_dtype)).y


def fused_norm(x, scale, bias, *, kind, eps, residual, activation, dropout, quant, out_dtype):
    return _norm(x, scale, bias, residual, dropout, kind, eps, activation, quant, jnp.dtype(out_dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def _norm(x, scale, bias, residual, dropout, kind, eps, activation, quant, out_dtype):
    width, lead = x.shape[-1], x.shape[:-1]
    rows = x.size // width
    columns = max(power_of_two(width), (quant and quant.group) or 1)
    tile = tile_for("norm", heuristic(columns), width=width, dtype=str(x.dtype), kind=kind)
    flat = lambda a: None if a is None else a.reshape(-1, width)
    given = {"x": flat(x), "residual": flat(residual), "scale": scale, "bias": bias}
    given = {name: a for name, a in given.items() if a is not None}
    given |= {} if dropout is None else dropout.operands(x.shape)
    out = results(rows, width, quant, out_dtype)
    if residual is not None:
        out["total"] = jax.ShapeDtypeStruct((rows, width), jnp.promote_types(x.dtype, residual.dtype))
    kernel = functools.partial(
        _kernel,
        names=(*given, *out),
        tile=Block(rows=tile.rows, columns=columns, warps=tile.warps),
        width=width,
        rows=rows,
        kind=kind,
        eps=eps,
        activation=activation,
        rate=dropout and dropout.rate,
        group=quant and quant.group,
    )
    grid = (-(-rows // tile.rows), 1)
    found = launch(kernel, *given.values(), name="norm", out=tuple(out.values()), grid=grid, warps=tile.warps)
    return NormOutput(**{name: a.reshape(*lead, a.shape[-1]) for name, a in zip(out, found, strict=True)})


def _kernel(*refs, names, tile, rows, width, kind, eps, activation, rate, group):
    ref = dict(zip(names, refs, strict=True))
    places = block(tile, rows, width)
    inside = places.inside

    def row(name):
        return triton.load(ref[name].at[places.at], mask=inside, other=0.0).astype(jnp.float32)

    def vector(name):
        kept = jnp.arange(tile.columns) < width
        return triton.load(ref[name].at[masked_slice(0, tile.columns)], mask=kept, other=0.0).astype(jnp.float32)[None]

    x = row("x")
    if "residual" in ref:
        x = x + row("residual")
        triton.store(ref["total"].at[places.at], x.astype(ref["total"].dtype), mask=inside)
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
    if rate is not None:
        y = drop(y, rate, ref, pl.program_id(0) * tile.rows, 0, rows)
    store_results(y, places, ref, tile=tile, rows=rows, width=width, group=group)


def _forward(x, scale, bias, residual, dropout, *static):
    return _norm(x, scale, bias, residual, dropout, *static), (x, scale, bias, residual, dropout)


def _backward(kind, eps, activation, quant, out_dtype, saved, gradient):
    *arrays, dropout = saved

    def run(x, scale, bias, residual):
        return reference.fused_norm(
            x,
            scale,
            bias,
            kind=kind,
            eps=eps,
            residual=residual,
            activation=activation,
            dropout=dropout,
            quant=quant,
            out_dtype=out_dtype,
        )

    return *jax.vjp(run, *arrays)[1](gradient), None


_norm.defvjp(_forward, _backward)
