"""Bias, activation, gate and rounding as one pass over memory, for NVIDIA GPUs through Pallas and Triton."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.activation import reference
from pallas_kernels.activation.output import ActivationOutput
from pallas_kernels.kernel_math import ACTIVATIONS, drop
from pallas_kernels.launch import gpu_refusal, launch
from pallas_kernels.quantize.pallas import block, heuristic, results, scales_refusal, store_results
from pallas_kernels.tuning import tile_for


def supports_activation(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there is nothing to do"
    quant = facts["quant"]
    if quant is None:
        return True
    return scales_refusal(target, facts["shape"][-1] // (2 if facts["gated"] else 1), quant.group, quant.format)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _activation(x, bias, dropout, kind, gated, quant, out_dtype):
    width, lead = x.shape[-1] // (2 if gated else 1), x.shape[:-1]
    rows = x.size // x.shape[-1]
    group = 1 if quant is None else quant.group  # without scales a block may end anywhere
    tile = tile_for("activation", heuristic(width, group), width=width, gated=gated, group=group, dtype=str(x.dtype))
    given = {"x": x.reshape(rows, -1)} | ({} if bias is None else {"bias": bias})
    given |= {} if dropout is None else dropout.operands((*lead, width))
    out = results(rows, width, quant, out_dtype)
    found = launch(
        functools.partial(
            _kernel,
            names=(*given, *out),
            tile=tile,
            rows=rows,
            width=width,
            kind=kind,
            gated=gated,
            rate=dropout and dropout.rate,
            group=quant and quant.group,
        ),
        *given.values(),
        name="activation",
        out=tuple(out.values()),
        grid=(-(-rows // tile.rows), -(-width // tile.columns)),
        warps=tile.warps,
    )
    return ActivationOutput(**{name: a.reshape(*lead, a.shape[-1]) for name, a in zip(out, found, strict=True)})


def _kernel(*refs, names, tile, rows, width, kind, gated, rate, group):
    ref = dict(zip(names, refs, strict=True))

    def part(first):
        places = block(tile, rows, width, first)
        z = triton.load(ref["x"].at[places.at], mask=places.inside, other=0.0).astype(jnp.float32)
        if "bias" in ref:
            kept = pl.program_id(1) * tile.columns + jnp.arange(tile.columns) < width
            z = z + triton.load(ref["bias"].at[places.at[1]], mask=kept, other=0.0).astype(jnp.float32)[None]
        return z

    y = ACTIVATIONS[kind](part(0))
    if gated:
        y = y * part(width)
    if rate is not None:
        y = drop(y, rate, ref, pl.program_id(0) * tile.rows, pl.program_id(1) * tile.columns, rows)
    store_results(y, block(tile, rows, width), ref, tile=tile, rows=rows, width=width, group=group)


def _forward(x, bias, dropout, *static):
    return _activation(x, bias, dropout, *static), (x, bias, dropout)


def _backward(kind, gated, quant, out_dtype, saved, gradient):
    x, bias, dropout = saved

    def run(x, bias):
        return reference.activation(x, bias, kind=kind, gated=gated, dropout=dropout, quant=quant, out_dtype=out_dtype)

    return *jax.vjp(run, x, bias)[1](gradient), None


_activation.defvjp(_forward, _backward)


def activation(x, bias, *, kind, gated, dropout, quant, out_dtype):
    return _activation(x, bias, dropout, kind, gated, quant, out_dtype)
