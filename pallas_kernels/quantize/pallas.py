"""Dynamic quantisation of activations as one pass over memory, for NVIDIA GPUs through Pallas and Triton."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.kernel_math import of_dtype, power_of_two, round_even
from pallas_kernels.launch import NARROWEST_FP8, gpu_refusal, launch
from pallas_kernels.qtensor import QTensor, packing_block
from pallas_kernels.tuning import tile_for
from pallas_kernels.value_formats import FP8_MAX, INT4_OFFSET

WIDEST = 1 << 15  # elements that share a scale: what a block of 1024 threads holds in registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """rows and columns of a block, powers of two. warps: of 32 threads."""

    rows: int
    columns: int
    warps: int


def heuristic(width: int, group: int | None) -> Tile:
    """About 2048 elements a block, eight to sixteen a thread; whole rows where they share a scale."""
    columns = power_of_two(width) if group is None else max(group, min(1024, power_of_two(width)))
    return Tile(rows=max(1, 1024 // columns), columns=columns, warps=min(32, max(4, columns // 512)))


def scales_refusal(target, width: int, group: int | None, format: str | None) -> bool | str:
    """Why a block cannot hold what shares a scale, or True."""
    if not width >= 1 or (group is None and width > WIDEST):
        return f"a row of {width} does not fit the registers of a block, at most {WIDEST} do"
    if group is not None and (group & (group - 1) or group > WIDEST):
        return f"it takes scales per token or per power of two, not per {group}"
    if format == "fp8" and target.capability is not None and target.capability < NARROWEST_FP8:
        return f"{target.device_kind} cannot convert to float8_e4m3fn"
    return True


def supports_quantize_activations(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there is nothing to quantise"
    if facts["over_shards"] and facts["group"] is None:
        return "one scale a token over several shards needs a collective between the largest value and the levels"
    return scales_refusal(target, facts["shape"][-1], facts["group"], facts["format"])


def quantize_activations(x, quant, max_over_shards):
    del max_over_shards  # groups lie within a shard
    width, lead = x.shape[-1], x.shape[:-1]
    rows = x.size // width
    tile = tile_for("quantize_activations", heuristic(width, quant.group), width=width, group=quant.group, dtype=str(x.dtype))
    levels, scales = launch(
        functools.partial(_kernel, tile=tile, rows=rows, width=width, group=quant.group),
        x.reshape(rows, width),
        name="quantize_activations",
        out=tuple(results(rows, width, quant, x.dtype).values()),
        grid=(-(-rows // tile.rows), -(-width // tile.columns)),
        warps=tile.warps,
    )
    return levels.reshape(*lead, width), scales.reshape(*lead, scales.shape[-1])


def results(rows: int, width: int, quant, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """What a kernel writes whose y [rows, width] may be quantised: y of this dtype, or its levels and their scales."""
    if quant is None:
        return {"y": jax.ShapeDtypeStruct((rows, width), dtype)}
    levels = jax.ShapeDtypeStruct((rows, width), jnp.float8_e4m3fn if quant.format == "fp8" else jnp.int8)
    return {"y": levels, "scales": jax.ShapeDtypeStruct((rows, -(-width // (quant.group or width))), jnp.float32)}


def _kernel(x_ref, levels_ref, scales_ref, *, tile, rows, width, group):
    places = block(tile, rows, width)
    x = triton.load(x_ref.at[places.at], mask=places.inside, other=0.0).astype(jnp.float32)
    store_results(x, places, {"y": levels_ref, "scales": scales_ref}, tile=tile, rows=rows, width=width, group=group)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Where a program's block lies: its slices, and which of its elements are inside the array."""

    at: tuple
    inside: jax.Array


def block(tile, rows: int, width: int, first: int = 0) -> Places:
    """The block of this program in an array [rows, ...] of which columns first .. first + width are meant."""
    row, column = pl.program_id(0) * tile.rows, pl.program_id(1) * tile.columns
    shape = (tile.rows, tile.columns)
    inside = (row + lax.broadcasted_iota(jnp.int32, shape, 0) < rows) & (
        column + lax.broadcasted_iota(jnp.int32, shape, 1) < width
    )
    return Places(at=(pl.ds(row, tile.rows), pl.ds(first + column, tile.columns)), inside=inside)


def store_results(y, places: Places, ref, *, tile, rows, width, group) -> None:
    """Write a block y, as levels and scales where the references of `results` have these."""
    y_ref = ref["y"]
    if "scales" not in ref:
        triton.store(y_ref.at[places.at], y.astype(y_ref.dtype), mask=places.inside)
        return
    size, top = group or tile.columns, _top(y_ref.dtype)
    parts = jnp.where(places.inside, y, 0.0).reshape(tile.rows, tile.columns // size, size)
    scales = jnp.max(jnp.abs(parts), 2) * (1 / top)
    levels = jnp.clip(parts / jnp.where(scales == 0, 1.0, scales)[:, :, None], -top, top).reshape(tile.rows, tile.columns)
    triton.store(y_ref.at[places.at], of_dtype(levels, y_ref.dtype), mask=places.inside)
    shape = scales.shape
    row, column = pl.program_id(0) * tile.rows, pl.program_id(1) * shape[1]
    inside = (row + lax.broadcasted_iota(jnp.int32, shape, 0) < rows) & (
        column + lax.broadcasted_iota(jnp.int32, shape, 1) < -(-width // size)
    )
    triton.store(ref["scales"].at[pl.ds(row, shape[0]), pl.ds(column, shape[1])], scales, mask=inside)


def _top(dtype) -> float:
    """The largest level of a byte."""
    return FP8_MAX if dtype == jnp.float8_e4m3fn else 127.0


def supports_quantize_weights(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there is nothing to quantise"
    group, format = facts["group"], facts["format"]
    if format not in ("int8", "int4", "fp8"):
        return f"it rounds to int8, int4 and fp8, not to {format}"
    if format == "int4" and (group < 32 or group & (group - 1)):
        return f"it takes groups of 32, 64, 128 and further powers of two, not {group}"
    return scales_refusal(target, facts["shape"][-1], group, format)


def quantize_weights(w, *, format, group, symmetric, scale_dtype):
    inputs, lead = w.shape[-1], w.shape[:-1]
    rows, per_byte = w.size // inputs, 2 if format == "int4" else 1
    tile = tile_for("quantize_weights", heuristic(inputs, group), width=inputs, group=group, format=format, dtype=str(w.dtype))
    size = group or tile.columns
    groups = -(-inputs // size)
    values = {"int8": jnp.int8, "int4": jnp.uint8, "fp8": jnp.float8_e4m3fn}[format]
    out = [jax.ShapeDtypeStruct((rows, inputs // per_byte), values)]
    out += [jax.ShapeDtypeStruct((rows, groups), scale_dtype)] * (1 if symmetric else 2)
    found = launch(
        functools.partial(
            _weights_kernel,
            tile=tile,
            rows=rows,
            width=inputs,
            size=size,
            half=packing_block(group) // 2 if format == "int4" else 0,
        ),
        w.reshape(rows, inputs),
        name="quantize_weights",
        out=tuple(out),
        grid=(-(-rows // tile.rows), -(-inputs // tile.columns)),
        warps=tile.warps,
    )
    values, scales, *zeros = (a.reshape(*lead, a.shape[-1]) for a in found)
    return QTensor(values=values, scales=scales, zeros=zeros[0] if zeros else None, format=format, group=group)


def _weights_kernel(w_ref, values_ref, scales_ref, *zeros_ref, tile, rows, width, size, half):
    """half: bytes of a packing block of nibbles, 0 for values of a byte."""
    per_byte = 2 if half else 1
    n, first = tile.columns // per_byte, pl.program_id(1) * tile.columns
    row = pl.program_id(0) * tile.rows + jnp.arange(tile.rows)
    byte = jnp.arange(n)
    low = lax.div(byte, half) * (2 * half) + lax.rem(byte, half) if half else byte
    places = [low, low + half] if half else [low]
    shape, cut = (tile.rows, n), (tile.rows, tile.columns // size, size // per_byte)
    at = lambda column: (jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None], shape))
    inside = lambda column, limit: (row < rows)[:, None] & (column < limit)[None]
    parts = []
    for place in places:
        w = triton.load(w_ref.at[at(first + place)], mask=inside(first + place, width), other=0.0)
        parts.append(w.astype(jnp.float32).reshape(cut))
    if zeros_ref:
        lowest = functools.reduce(jnp.minimum, (jnp.min(p, 2) for p in parts))
        highest = functools.reduce(jnp.maximum, (jnp.max(p, 2) for p in parts))
        scales = ((highest - lowest) / 15).astype(scales_ref.dtype)
        stored = lowest.astype(scales_ref.dtype)
        parts = [p - stored.astype(jnp.float32)[:, :, None] for p in parts]
    else:
        largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(p), 2) for p in parts))
        top = 7.0 if half else _top(values_ref.dtype)
        scales = (largest / top).astype(scales_ref.dtype)
    steps = scales.astype(jnp.float32)
    steps = jnp.where(steps == 0, 1.0, steps)[:, :, None]
    levels = [(p / steps).reshape(shape) for p in parts]
    if half:
        if zeros_ref:
            nibbles = [jnp.clip(round_even(v), 0, 15) for v in levels]
        else:
            nibbles = [jnp.clip(round_even(v), -7, 7) + INT4_OFFSET for v in levels]
        packed = nibbles[0].astype(jnp.int32) | (nibbles[1].astype(jnp.int32) << 4)
        value = packed.astype(jnp.uint8)
    else:
        top = _top(values_ref.dtype)
        value = of_dtype(jnp.clip(levels[0], -top, top), values_ref.dtype)
    column = pl.program_id(1) * n + byte
    triton.store(values_ref.at[at(column)], value, mask=inside(column, width // per_byte))
    groups = cut[1]
    column = pl.program_id(1) * groups + jnp.arange(groups)
    kept = (row < rows)[:, None] & (column < -(-width // size))[None]
    place = (jnp.broadcast_to(row[:, None], cut[:2]), jnp.broadcast_to(column[None], cut[:2]))
    triton.store(scales_ref.at[place], scales, mask=kept)
    if zeros_ref:
        triton.store(zeros_ref[0].at[place], stored, mask=kept)
