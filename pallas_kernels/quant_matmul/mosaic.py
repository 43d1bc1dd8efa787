"""Matmuls with many rows on Hopper, through Pallas and Mosaic GPU: TMA brings tiles in, two warpgroups multiply what a third one fetched.

Each warpgroup has half of a tile's outputs. Levels of a quantised weight become bfloat16 on their way through shared memory, which is where
Hopper's instructions want an operand that is not the first; a scale per output follows after the last step, a group's scale is multiplied
into the weights, rounded to bfloat16 once. Nibbles stay in the order in which bytes hold them: the inputs of x are put in that order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.errors import BackendError
from pallas_kernels.hopper import PRODUCER_REGISTERS, ROWS, SHARED, STORED, WARPGROUPS, hopper_refusal, transforms
from pallas_kernels.qtensor import QTensor, packing_block
from pallas_kernels.quant_matmul import reference
from pallas_kernels.target import interpreted
from pallas_kernels.tuning import tile_for
from pallas_kernels.value_formats import INT4_OFFSET

OUTPUTS, INPUTS = 128, 64  # what sizes must be multiples of, as rows of ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """rows of x and outputs of a block; inputs of a step; stages: steps that are under way."""

    rows: int
    outputs: int
    inputs: int
    stages: int


def heuristic(rows: int, outputs: int, bits: int, group: int | None) -> Tile:
    """The largest tile that divides the sizes, with as many stages as shared memory holds."""
    tile = Tile(
        rows=128 if rows % 128 == 0 else ROWS,
        outputs=256 if outputs % 256 == 0 else OUTPUTS,
        inputs=2 * INPUTS if bits == 4 and group is not None and group % (2 * INPUTS) == 0 else INPUTS,
        stages=4,
    )
    while tile.stages > 2 and _shared(tile, bits) > SHARED:
        tile = dataclasses.replace(tile, stages=tile.stages - 1)
    return tile


def _shared(tile: Tile, bits: int) -> int:
    step = tile.inputs * (2 * tile.rows + tile.outputs * bits // 8)
    converted = 0 if bits == 16 else 2 * tile.outputs * tile.inputs
    return tile.stages * step + converted + WARPGROUPS * tile.rows * STORED * 4


def supports_quant_matmul(target, facts) -> bool | str:
    if reason := hopper_refusal(target):
        return reason
    format, group = facts["format"], facts["group"]
    if format not in ("bfloat16", "int8", "int4") or facts["layout"] != "canonical":
        return f"it multiplies bfloat16 and canonical int8 and int4 weights, not {format} in {facts['layout']!r}"
    if facts["activation"] is not None or facts["zeros"] is not None:
        return "it multiplies symmetric weights with float inputs"
    unit = INPUTS if group is None else max(INPUTS, group)
    if group is not None and (group % INPUTS or group & (group - 1)):
        return f"it takes groups of 64, 128 and further powers of two, not {group}"
    for name, size in (("rows", ROWS), ("outputs", OUTPUTS), ("inputs", unit)):
        if not facts[name] or facts[name] % size:
            return f"it takes multiples of {size} {name}, not {facts[name]}"
    return True


def _product(x, w):
    rows, inputs, outputs = x.size // x.shape[-1], x.shape[-1], w.shape[0]
    quantised = isinstance(w, QTensor)
    bits, group = (w.kind.bits, w.group) if quantised else (16, None)
    default = heuristic(rows, outputs, bits, group)
    tile = tile_for("quant_matmul_mosaic", default, rows=rows, outputs=outputs, inputs=inputs, bits=bits, group=group)
    _check(tile, rows, outputs, inputs, group)
    nibbles = bits == 4
    x_rows = x.reshape(rows, inputs).astype(jnp.bfloat16)
    if nibbles:
        half = packing_block(group) // 2
        parts = x_rows.reshape(rows, inputs // tile.inputs, tile.inputs // (2 * half), 2, half)
        x_rows = jnp.swapaxes(parts, 2, 3).reshape(rows, inputs)
    operands = [x_rows]
    if quantised:
        # a step's scales side by side in memory
        scales = w.scales.astype(jnp.float32)
        operands += [w.values, scales[:, 0] if group is None else scales.T]
    else:
        operands.append(w)
    own = tile.outputs // WARPGROUPS
    columns = tile.inputs // 2 if nibbles else tile.inputs  # that are written or read at once
    buffers = {"stored": _buffer((WARPGROUPS, tile.rows, STORED), jnp.float32, STORED)}
    if quantised:
        buffers["converted"] = _buffer((WARPGROUPS, own, tile.inputs), jnp.bfloat16, columns)
    y = plgpu.kernel(
        functools.partial(_kernel, tile=tile, inputs=inputs, nibbles=nibbles, group=group),
        out_type=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
        scratch_types=buffers,
        grid=(rows // tile.rows, outputs // tile.outputs),
        grid_names=("rows", "outputs"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpreted() else None,
    )(*operands)
    return y.reshape(*x.shape[:-1], outputs)


def _check(tile: Tile, rows: int, outputs: int, inputs: int, group: int | None) -> None:
    whole = rows % tile.rows == 0 and outputs % tile.outputs == 0 and inputs % tile.inputs == 0
    if not whole or tile.rows % ROWS or tile.outputs % OUTPUTS or tile.stages < 2:
        raise BackendError(
            f"quant_matmul: {tile} does not cut {rows} rows, {outputs} outputs and {inputs} inputs into whole parts"
        )
    if tile.inputs % INPUTS or (group is not None and group % tile.inputs):
        raise BackendError(
            f"quant_matmul: a step has multiples of {INPUTS} inputs within a group of {group}, not {tile.inputs}"
        )


quant_matmul = reference.from_product(_product)


def _buffer(shape: tuple[int, ...], dtype, columns: int):
    return plgpu.SMEM(shape, dtype, transforms=transforms(columns, dtype))


def _kernel(x_ref, w_ref, *refs, tile: Tile, inputs: int, nibbles: bool, group: int | None, stored, converted=None):
    scales_ref, out_ref = refs if len(refs) == 2 else (None, *refs)
    row, column, warpgroup = lax.axis_index("rows"), lax.axis_index("outputs"), lax.axis_index("warpgroup")
    own = tile.outputs // WARPGROUPS
    part = pl.ds(warpgroup * own, own)  # of the tile's outputs
    outputs = pl.ds(column * tile.outputs + warpgroup * own, own)
    half = tile.inputs // 2

    def multiply(index, x_tile, w_tile, total):
        if converted is None:
            plgpu.wgmma(total, x_tile, w_tile.at[part].transpose((1, 0)))
        else:
            levels, b = w_tile.at[part][...], converted.at[warpgroup]
            scaled = lambda v: v
            if group is not None:
                (step,) = index
                scale = _load(scales_ref.at[lax.div(step * tile.inputs, group), outputs], plgpu.Layout.WGMMA.reduce(1))
                scale = lax.broadcast_in_dim(scale, (own, levels.shape[1]), (0,))
                scaled = lambda v: v.astype(jnp.float32) * scale
            if nibbles:
                b.at[:, pl.ds(0, half)][...] = scaled((levels & 15).astype(jnp.float32) - INT4_OFFSET).astype(jnp.bfloat16)
                b.at[:, pl.ds(half, half)][...] = scaled((levels & 240).astype(jnp.float32) / 16 - INT4_OFFSET).astype(
                    jnp.bfloat16
                )
            else:
                b[...] = scaled(levels).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.wgmma(total, x_tile, b.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return total

    def finish(pipeline):
        def scope(total):
            pipeline(total)
            y = total[...]
            if scales_ref is not None and group is None:
                scale = _load(scales_ref.at[outputs], plgpu.Layout.WGMMA.reduce(0))
                y = y * lax.broadcast_in_dim(scale, (tile.rows, own), (1,))
            for first in range(0, own, STORED):
                place = pl.ds(column * tile.outputs + warpgroup * own + first, STORED)
                stored.at[warpgroup][...] = y[:, first : first + STORED]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stored.at[warpgroup], out_ref.at[pl.ds(row * tile.rows, tile.rows), place])
                plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scope, plgpu.ACC((tile.rows, own), jnp.float32))

    width = half if nibbles else tile.inputs
    plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(inputs // tile.inputs,),
        in_specs=[
            plgpu.BlockSpec((tile.rows, tile.inputs), lambda k: (row, k), transforms=transforms(width, x_ref.dtype)),
            plgpu.BlockSpec((tile.outputs, width), lambda k: (column, k), transforms=transforms(width, w_ref.dtype)),
        ],
        memory_registers=PRODUCER_REGISTERS,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=tile.stages,
        compute_context=finish,
    )(x_ref, w_ref)


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)
