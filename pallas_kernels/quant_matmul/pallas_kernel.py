"""The matmul kernel itself, see `tiles` for how it cuts its problem, and `pallas` for who calls it."""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.kernel_math import ACTIVATIONS, masked_slice, power_of_two
from pallas_kernels.quant_matmul.decoding import decoded, scale_of
from pallas_kernels.quant_matmul.tiles import Tile
from pallas_kernels.value_formats import INT4_OFFSET


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What the kernel is compiled for. names: of its references, in order. shape: rows, outputs and inputs. offsets: first row of each
    part in its weight. format: of the weight's values, see `decoding`. dtype: of the tensor core's operands. group, x_group: inputs per
    scale of the weight and of x, 0 for one scale an output or a token, None for no scale. unit: inputs that share both, or 0. before:
    scales are multiplied into the weights before the product. half: bytes of a packing block of nibbles, 0 for other formats."""

    names: tuple[str, ...]
    tile: Tile
    shape: tuple[int, int, int]
    offsets: tuple[int, ...]
    separate: bool
    format: str
    dtype: np.dtype
    half: int
    group: int | None
    x_group: int | None
    unit: int
    terms: int
    before: bool
    kind: str | None
    eps: float
    activation: str | None

    @property
    def groups(self) -> int:
        """Groups of one step that columns keep apart."""
        return 1 if not self.unit or self.before else self.tile.inputs // self.unit

    @property
    def columns(self) -> int:
        return max(8, self.tile.splits * self.terms * self.groups * self.tile.rows)


def kernel(*refs, spec: Spec) -> None:
    """One program: its tile of the output."""
    ref = dict(zip(spec.names, refs, strict=True))
    tile, (M, O, I) = spec.tile, spec.shape
    S, R, N = tile.splits, tile.outputs * tile.splits, spec.columns
    per_split = -(-I // (S * tile.inputs)) * tile.inputs
    row, column = jnp.arange(R), jnp.arange(N)
    if "sizes" in ref:
        expert, first, stop = _rows_of_expert(ref["sizes"], pl.program_id(0), tile.rows)
        base = expert * (O * len(spec.offsets))
    else:
        first, stop, base = pl.program_id(0) * tile.rows, M, 0
    output = base + jnp.minimum(pl.program_id(1) * tile.outputs + lax.rem(row, tile.outputs), O - 1)
    row_split = lax.div(row, tile.outputs)
    of_x = lambda row: ref["x_rows"][row] if "x_rows" in ref else row
    x_row = of_x(jnp.minimum(first + lax.rem(column, tile.rows), M - 1))
    group = lax.rem(lax.div(column, tile.rows), spec.groups)
    term = lax.rem(lax.div(column, tile.rows * spec.groups), spec.terms)
    column_split = lax.div(column, tile.rows * spec.groups * spec.terms)
    w_ref = lambda name, part: ref[f"{name}{part if spec.separate else 0}"]
    has = lambda name: f"{name}0" in ref
    exact = per_split * S == I

    def locals_():
        """Inputs, within a step, that one stored value after the other stands for."""
        if not spec.half:
            return (jnp.arange(tile.inputs),)
        byte = jnp.arange(tile.inputs // 2)
        low = lax.div(byte, spec.half) * (2 * spec.half) + lax.rem(byte, spec.half)
        return low, low + spec.half

    def values(part, step):
        """The levels of this step, one [R, inputs of a step], or those of low and of high nibbles."""
        per_byte = 2 if spec.half else 1
        n = tile.inputs // per_byte
        at = (row_split * (per_split // per_byte) + step * n)[:, None] + jnp.arange(n)[None]
        mask = None if exact else at < I // per_byte
        at = jnp.broadcast_to(at, (R, n))
        rows = jnp.broadcast_to((output + spec.offsets[part])[:, None], (R, n))
        raw = _load(w_ref("values", part).at[rows, at], mask)
        return decoded(raw, spec.format, spec.dtype)

    standardised = lambda x: x
    if spec.kind == "layer":
        mean, scatter = _mean_and_root(ref["x"], x_row, I, N, spec.eps)
        standardised = lambda x: (x - mean[None]) * scatter[None]

    def x_tile(local, step):
        """Columns of x, [inputs, N], and their squares for a norm that is finished at the end."""
        k = (column_split * per_split + step * tile.inputs)[None] + local[:, None]
        shape = (local.shape[0], N)
        mask = None
        if spec.groups > 1:
            mask = lax.div(local, spec.unit)[:, None] == group[None]
        if S * spec.terms * spec.groups * tile.rows < N:
            mask = _both(mask, jnp.broadcast_to((column_split < S)[None], shape))
        if not exact:
            mask = _both(mask, k < I)
        x = _load(ref["x"].at[jnp.broadcast_to(x_row[None], shape), k], mask)
        if spec.x_group is not None:
            return x, None
        squares = None
        if spec.kind is not None:
            x = x.astype(jnp.float32)
            same = S == 1  # all columns then have the same inputs
            at = step * tile.inputs + local if same else k
            inside = (None if exact else at < I) if same else mask
            vector = lambda name: _load(ref[name].at[at], inside).astype(jnp.float32)
            weight = lambda name: vector(name)[:, None] if same else vector(name)
            if spec.kind == "layer":
                x = standardised(x)
                if "norm_scale" in ref:
                    x = x * weight("norm_scale")
                if "norm_bias" in ref:
                    x = x + weight("norm_bias")
                if mask is not None:
                    x = jnp.where(mask, x, 0.0)
            else:
                squares = x * x
                scale = weight("norm_scale")
                x = x * (1 + scale if spec.kind == "rms_offset" else scale)
        high = x.astype(spec.dtype)
        if spec.terms == 2:
            low = (x - high.astype(jnp.float32)).astype(spec.dtype)
            high = jnp.where(jnp.broadcast_to((term == 0)[None], shape), high, low)
        return high, squares

    total_of = functools.partial(functools.reduce, operator.add)
    total = jnp.int32 if spec.dtype == jnp.int8 else jnp.float32
    dot = functools.partial(jnp.dot, preferred_element_type=total)

    def scale_at(part, step):
        """What this step's product is multiplied by, and what sums of x are: each [R, N], [R, 1] or [1, N], or None."""
        start = row_split * per_split + step * tile.inputs
        rows = output + spec.offsets[part]
        scale = shift = None
        if spec.group:
            if spec.groups == 1:
                at = lax.div(jnp.minimum(start, I - 1), spec.group)
                pick = lambda name: w_ref(name, part)[rows, at][:, None]
            else:
                at = lax.div(jnp.minimum(start[:, None] + group[None] * spec.unit, I - 1), spec.group)
                wide = jnp.broadcast_to(rows[:, None], (R, N))
                pick = lambda name: w_ref(name, part)[wide, at]
            scale = scale_of(pick("scales"))
            if has("zeros"):
                zeros = pick("zeros").astype(jnp.float32)
                # nibbles are 8 less in here: n s + z = (n - 8) s + (8 s + z), or (n - z) s = (n - 8) s + (8 - z) s
                integer = jnp.issubdtype(w_ref("zeros", part).dtype, jnp.integer)
                shift = (INT4_OFFSET - zeros) * scale if integer else INT4_OFFSET * scale + zeros
        if spec.x_group:
            at = jnp.minimum(column_split * per_split + step * tile.inputs + group * spec.unit, I - 1)
            for_x = ref["x_scales"][x_row, lax.div(at, spec.x_group)][None]
            scale = for_x if scale is None else scale * for_x
        return scale, shift

    stepwise = spec.unit > 0
    parts = range(len(spec.offsets))

    def body(step, carry):
        sums, squares, scales = carry
        columns = [x_tile(local, step) for local in locals_()]
        if spec.kind in ("rms", "rms_offset"):
            squares = squares + total_of(s for _, s in columns)
        # the next step's scales are asked for while this step multiplies
        following = tuple(scale_at(part, step + 1) for part in parts) if stepwise else scales
        out = []
        for part, acc in zip(parts, sums, strict=True):
            scale, shift = scales[part]
            levels = values(part, step)
            if spec.before:
                levels = [_scaled(v, scale, shift).astype(spec.dtype) for v in levels]
            products = (dot(v, x) for v, (x, _) in zip(levels, columns, strict=True))
            if not stepwise or spec.before:
                product = functools.reduce(operator.add, products, acc)  # one by one, so that tensor cores add them up
            else:
                product = total_of(products)
                product = acc + product.astype(jnp.float32) * scale
                if shift is not None:
                    ones = jnp.full((R, columns[0][0].shape[0]), 1, spec.dtype)
                    product = product + total_of(dot(ones, x) for x, _ in columns) * shift
            out.append(product)
        return tuple(out), squares, following

    width = locals_()[0].shape[0]
    squares = jnp.zeros((width, N), jnp.float32) if spec.kind in ("rms", "rms_offset") else None
    start = tuple(jnp.zeros((R, N), jnp.float32 if stepwise else total) for _ in parts)
    scales = tuple(scale_at(part, 0) if stepwise else (None, None) for part in parts)
    # blocks that are left over read no weight
    busy = jnp.minimum(stop - first, 1) if "sizes" in ref else 1
    sums, squares, _ = lax.fori_loop(0, per_split // tile.inputs * busy, body, (start, squares, scales))

    outputs = pl.program_id(1) * tile.outputs + jnp.arange(tile.outputs)
    safe = jnp.minimum(outputs, O - 1)
    x_rows = first + jnp.arange(tile.rows)
    safe_rows = jnp.minimum(x_rows, M - 1)
    root = None
    if squares is not None:
        squares = jnp.where((term == 0) & (column_split < S), jnp.sum(squares, 0), 0.0)
        root = lax.rsqrt(jnp.sum(squares.reshape(N // tile.rows, tile.rows), 0) / I + spec.eps)
    once = lambda a: a  # what only the shard that leads adds
    if "lead" in ref:
        leads = ref["lead"][0] != 0
        once = lambda a: jnp.where(leads, a, 0.0)
    done = []
    for part, acc in zip(parts, sums, strict=True):
        y = acc.astype(jnp.float32)
        if S > 1:
            y = jnp.where(row_split[:, None] == column_split[None], y, 0.0)
            y = jnp.sum(y.reshape(S, tile.outputs, N), 0)
        if tile.rows < N:
            y = jnp.sum(y.reshape(tile.outputs, N // tile.rows, tile.rows), 1)
        if root is not None:
            y = y * root[None]
        at = base + safe + spec.offsets[part]
        if spec.group == 0:
            y = y * w_ref("scales", part)[at, jnp.zeros_like(at)].astype(jnp.float32)[:, None]
        if spec.x_group == 0:
            y = y * ref["x_scales"][of_x(safe_rows), jnp.zeros_like(safe_rows)][None]
        if has("bias"):
            y = y + once(w_ref("bias", part)[at].astype(jnp.float32))[:, None]
        done.append(y)
    y = done[0] if spec.activation is None else ACTIVATIONS[spec.activation](done[0])
    if len(done) == 2:
        y = y * done[1]
    shape = (tile.outputs, tile.rows)
    if "residual" in ref:
        at = (jnp.broadcast_to(safe_rows[None], shape), jnp.broadcast_to(safe[:, None], shape))
        y = y + once(ref["residual"][at].astype(jnp.float32))
    mask = (outputs < O)[:, None] & (x_rows < stop)[None]
    place = ref["out"].at[jnp.broadcast_to(x_rows[None], shape), jnp.broadcast_to(outputs[:, None], shape)]
    triton.store(place, y.astype(ref["out"].dtype), mask=mask)


def _rows_of_expert(sizes_ref, block, rows: int):
    """The expert of a block of rows, its first row and where its rows stop; a block that is left over has none.

    Each block finds its own, which takes two short scans, where arrays of all would take launches of their own before.
    """
    count = sizes_ref.shape[0]
    number = jnp.arange(power_of_two(count))
    sizes = triton.load(sizes_ref.at[masked_slice(0, number.size)], mask=number < count, other=0)
    needed = lax.div(sizes + (rows - 1), rows)
    ends, stops = jnp.cumsum(needed), jnp.cumsum(sizes)
    mine = (ends - needed <= block) & (block < ends)
    pick = lambda a: jnp.sum(jnp.where(mine, a, 0))
    first = pick(stops - sizes + (block - ends + needed) * rows)
    return pick(number), first, jnp.minimum(first + rows, pick(stops))


def _both(a, b):
    return b if a is None else a & b


def _load(place, mask):
    if mask is None:
        return triton.load(place)
    return triton.load(place, mask=mask, other=0.0 if jnp.issubdtype(place.dtype, jnp.floating) else 0)


def _scaled(levels, scale, shift):
    w = levels.astype(jnp.float32) * scale
    return w if shift is None else w + shift


def _mean_and_root(x_ref, x_row, inputs: int, columns: int, eps: float):
    """Mean and reciprocal root of the variance of each column's row, both [N], in two passes as the reference."""
    block = 256
    k = jnp.arange(block)[:, None]
    shape = (block, columns)
    rows = jnp.broadcast_to(x_row[None], shape)

    def total(of: Callable):
        def add(i, acc):
            at = jnp.broadcast_to(i * block + k, shape)
            x = triton.load(x_ref.at[rows, at], mask=at < inputs, other=0).astype(jnp.float32)
            return acc + jnp.where(at < inputs, of(x), 0.0)

        return jnp.sum(lax.fori_loop(0, -(-inputs // block), add, jnp.zeros(shape, jnp.float32)), 0) / inputs

    mean = total(lambda x: x)
    variance = total(lambda x: (x - mean[None]) * (x - mean[None]))
    return mean, lax.rsqrt(variance + eps)
