"""int4 weights and up to eight rows of x in the Triton language, through jax-triton: an alternative to the Pallas kernel.

The sixteen columns that a product has at least are the rows of x, each as the two bfloat16 that its float32 is the sum of.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.jax_triton import triton_call, triton_refusal
from pallas_kernels.qtensor import packing_block
from pallas_kernels.quant_matmul import reference
from pallas_kernels.target import interpreted
from pallas_kernels.tuning import tile_for

ROWS = 8
NO_ZEROS, MINIMUM, POINT = 0, 1, 2  # what QTensor.zeros is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """outputs of a program, a power of two. warps, stages: of Triton."""

    outputs: int
    warps: int
    stages: int


def supports_quant_matmul(target, facts) -> bool | str:
    if reason := triton_refusal(target, (kernel,)):
        return reason
    if facts["format"] != "int4" or facts["layout"] != "canonical" or facts["activation"] is not None:
        return f"it multiplies canonical int4 weights with float inputs, not {facts['format']} in {facts['layout']!r}"
    group = facts["group"]
    if group < 32 or group & (group - 1):
        return f"it takes groups of 32, 64, 128 and further powers of two, not {group}"
    if not 1 <= facts["rows"] <= ROWS or not facts["outputs"]:
        return f"it takes 1 to {ROWS} rows, not {facts['rows']}"
    return True


def _product(x, w):
    inputs, outputs = x.shape[-1], w.shape[0]
    rows = x.size // inputs
    tile = tile_for(
        "quant_matmul_jax_triton", Tile(outputs=32, warps=2, stages=4), outputs=outputs, inputs=inputs, group=w.group
    )
    y = triton_call(
        kernel,
        x.reshape(rows, inputs),
        w.values,
        w.scales,
        w.scales if w.zeros is None else w.zeros,
        out=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
        name="quant_matmul_triton",
        grid=(-(-outputs // tile.outputs),),
        warps=tile.warps,
        stages=tile.stages,
        # the interpreter's bfloat16 are bit patterns without arithmetic
        constants=_constants(w, rows) | {"BLOCK": tile.outputs, "DTYPE": tl.float32 if interpreted() else tl.bfloat16},
    )
    return y.reshape(*x.shape[:-1], outputs)


def _constants(w, rows: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    zeros = NO_ZEROS if w.zeros is None else POINT if jnp.issubdtype(w.zeros.dtype, jnp.integer) else MINIMUM
    return {
        "M": rows,
        "O": w.shape[0],
        "I": w.shape[1],
        "GROUP": w.group,
        "HALF": packing_block(w.group) // 2,
        "ZEROS": zeros,
    }


quant_matmul = reference.from_product(_product)


@triton.jit
def kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    M: tl.constexpr,
    O: tl.constexpr,
    I: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.minimum(output, O - 1)
    column = tl.arange(0, 16)
    m = tl.minimum(column % 8, M - 1)
    byte = tl.arange(0, GROUP // 2)
    low = byte // HALF * (2 * HALF) + byte % HALF
    total = tl.zeros((BLOCK, 16), tl.float32)
    for group in range(0, I // GROUP):
        packed = tl.load(values_ptr + n[:, None] * (I // 2) + group * (GROUP // 2) + byte[None, :]).to(tl.int32)
        x_low = tl.load(x_ptr + m[None, :] * I + group * GROUP + low[:, None]).to(tl.float32)
        x_high = tl.load(x_ptr + m[None, :] * I + group * GROUP + HALF + low[:, None]).to(tl.float32)
        scale = tl.load(scales_ptr + n * (I // GROUP) + group).to(tl.float32)
        w_low = ((packed & 15) - 8).to(tl.float32).to(DTYPE)
        w_high = ((packed >> 4) - 8).to(tl.float32).to(DTYPE)
        first = (column < 8)[None, :]
        a, b = x_low.to(DTYPE), x_high.to(DTYPE)
        a = tl.where(first, a, (x_low - a.to(tl.float32)).to(DTYPE))
        b = tl.where(first, b, (x_high - b.to(tl.float32)).to(DTYPE))
        product = tl.dot(w_low, a) + tl.dot(w_high, b)
        total += product * scale[:, None]
        if ZEROS:
            zero = tl.load(zeros_ptr + n * (I // GROUP) + group).to(tl.float32)
            shift = 8 * scale + zero if ZEROS == 1 else (8 - zero) * scale
            sums = tl.sum(tl.where(first, x_low + x_high, 0.0), 0)
            total += sums[None, :] * shift[:, None]
    y = tl.sum(tl.reshape(total, (BLOCK, 2, 8)), 1)
    row = tl.arange(0, 8)
    tl.store(y_ptr + row[None, :] * O + output[:, None], y, mask=(row < M)[None, :] & (output < O)[:, None])
