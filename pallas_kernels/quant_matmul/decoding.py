"""Stored bytes and nibbles as operands of tensor cores, within a Triton kernel.

Compiled, a register of four bytes becomes two registers of two bfloat16 each, per weight:

    int4    1.6 instructions: 128 + nibble has the bits 0x4300 | nibble; 128 + 8 are taken off again
    e2m1    2.5: sign and magnitude are moved to where bfloat16 has them, and a product with 2^126 mends the exponent, denormals included
    e4m3    2.5: likewise, with 2^120; no GPU before Ada converts it by an instruction
    nf4     3.2: entries of a table in eight registers, picked by `prmt`, which chooses bytes by a register of nibbles; they are rounded to
            bfloat16, the others are exact

A NaN of e4m3 becomes 480: weights are checked for it when they are read. Interpreted, values are looked up by comparing.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental.pallas import triton

from pallas_kernels.target import interpreted
from pallas_kernels.value_formats import INT4_OFFSET, VALUE_FORMATS

NIBBLES = ("int4", "nf4", "mxfp4")
BYTES = ("int8", "fp8")

_INT4 = """
{
  .reg .b32 t, lo, hi, magic, one, eight;
  shr.u32 t, $2, SHIFT;
  mov.b32 magic, 0x43004300;
  prmt.b32 lo, t, 0, 0x4140;
  prmt.b32 hi, t, 0, 0x4342;
  lop3.b32 lo, lo, 0x000F000F, magic, 0xEA;
  lop3.b32 hi, hi, 0x000F000F, magic, 0xEA;
  mov.b32 one, 0x3F803F80;
  mov.b32 eight, 0xC308C308;
  fma.rn.bf16x2 $0, lo, one, eight;
  fma.rn.bf16x2 $1, hi, one, eight;
}
"""

# each byte in the upper half of a lane of 16 bits: its sign is in place, what follows is moved down by SHIFT and kept by MASK
_MINIFLOAT = """
{
  .reg .b32 t, lo, hi, low, high, power, zero;
  shl.b32 t, $2, FIRST;
  prmt.b32 lo, t, 0, 0x1404;
  prmt.b32 hi, t, 0, 0x3424;
  shr.u32 low, lo, SHIFT;
  shr.u32 high, hi, SHIFT;
  and.b32 low, low, MASK;
  and.b32 high, high, MASK;
  lop3.b32 lo, lo, 0x80008000, low, 0xEA;
  lop3.b32 hi, hi, 0x80008000, high, 0xEA;
  mov.b32 power, POWER;
  mov.b32 zero, 0x80008000;
  fma.rn.bf16x2 $0, lo, power, zero;
  fma.rn.bf16x2 $1, hi, power, zero;
}
"""
_E2M1 = {"SHIFT": "6", "MASK": "0x01C001C0", "POWER": "0x7E807E80"}
_E4M3 = {"SHIFT": "4", "MASK": "0x07F007F0", "POWER": "0x7B807B80"}

# entries 0..7 and 8..15 of four nibbles are picked at once, upper and lower bytes apart; UPPER0.. are bytes of the table, four by four
_TABLE = """
{
  .reg .b32 t, pick, which, near, far, upper0, lower0, upper1, lower1;
  mov.b32 t, $2;
"""
_HALF = """
  and.b32 pick, t, 0x7777;
  shr.u32 which, t, 3;
  and.b32 which, which, 0x1111;
  prmt.b32 which, 0x0000FF00, 0, which;
  prmt.b32 near, UPPER0, UPPER1, pick;
  prmt.b32 far, UPPER2, UPPER3, pick;
  lop3.b32 upperN, which, far, near, 0xCA;
  prmt.b32 near, LOWER0, LOWER1, pick;
  prmt.b32 far, LOWER2, LOWER3, pick;
  lop3.b32 lowerN, which, far, near, 0xCA;
"""
_JOIN = """
  prmt.b32 $0, lower0, upper0, PLACES;
  prmt.b32 $1, lower1, upper1, PLACES;
}
"""


def _filled(text: str, fields: dict[str, str]) -> str:
    for name, value in fields.items():
        text = text.replace(name, value)
    return text


@functools.cache
def _lookup(format: str) -> tuple[str, ...]:
    """The instructions that look nibbles up in the table of a format, rounded to bfloat16, and take the low or the high ones of what was
    found. An inline text has one result here; what both have in common ptxas computes once."""
    table = VALUE_FORMATS[format].table
    assert table is not None
    bits = table.astype(ml_dtypes.bfloat16).view(np.uint16)
    words = lambda part: (int.from_bytes(part[i : i + 4].astype(np.uint8).tobytes(), "little") for i in range(0, 16, 4))
    fields = {
        f"{name}{i}": f"0x{word:08X}"
        for name, part in (("UPPER", bits >> 8), ("LOWER", bits & 255))
        for i, word in enumerate(words(part))
    }
    halves = [_filled(_HALF, fields | {"upperN": f"upper{i}", "lowerN": f"lower{i}"}) for i in (0, 1)]
    found = _TABLE + halves[0] + "  shr.u32 t, t, 16;\n" + halves[1]
    return tuple(found + _filled(_JOIN, {"PLACES": places}) for places in ("0x6240", "0x7351"))


def assembly(format: str) -> tuple[str, ...]:
    """What is compiled for a format: for its bytes, or for low and for high nibbles."""
    if format == "int4":
        return tuple(_filled(_INT4, {"SHIFT": shift}) for shift in ("0", "4"))
    if format == "mxfp4":
        return tuple(_filled(_MINIFLOAT, _E2M1 | {"FIRST": first}) for first in ("4", "0"))
    if format == "fp8":
        return (_filled(_MINIFLOAT, _E4M3 | {"FIRST": "0"}),)
    return _lookup(format)


def _assembled(packed, format: str) -> tuple[jax.Array, ...]:
    out = [jax.ShapeDtypeStruct(packed.shape, jnp.bfloat16)]
    run = functools.partial(triton.elementwise_inline_asm, args=[packed], pack=4, result_shape_dtypes=out)
    return tuple(run(text, constraints="=r,=r,r")[0] for text in assembly(format))


def stored(values, dtype):
    """A weight's values as the kernel is given them to become `dtype`: e4m3 as its bits, unless it is multiplied as it is."""
    if values.dtype == jnp.float8_e4m3fn and jnp.dtype(dtype) != values.dtype:
        return lax.bitcast_convert_type(values, jnp.uint8)
    return values


def decoded(raw, format: str, dtype) -> tuple[jax.Array, ...]:
    """Levels in `dtype` of what is stored [R, n], before the scale: those of bytes, or of low and of high nibbles; int4's are 8 less."""
    if format == "fp8" and raw.dtype == jnp.uint8:
        if interpreted():
            return (lax.bitcast_convert_type(raw, jnp.float8_e4m3fn).astype(dtype),)
        return _assembled(raw, format)
    if format not in NIBBLES:
        return (raw.astype(dtype),)
    if dtype == jnp.int8 or interpreted():
        wide = raw.astype(jnp.int32)
        table = VALUE_FORMATS[format].table
        value = (lambda n: n - INT4_OFFSET) if table is None else functools.partial(_compared, table=table)
        return tuple(value(n).astype(dtype) for n in (wide & 15, wide >> 4))
    return _assembled(raw, format)


def _compared(n, table):
    return functools.reduce(
        lambda rest, i: jnp.where(n == i, float(table[i]), rest), range(16), jnp.zeros(n.shape, jnp.float32)
    )


def scale_of(stored_scale) -> jax.Array:
    """A scale as float32; a byte is the exponent of one, 2^(byte - 127)."""
    if stored_scale.dtype != jnp.uint8:
        return stored_scale.astype(jnp.float32)
    bits = stored_scale.astype(jnp.int32)
    return lax.bitcast_convert_type(jnp.where(bits == 0, 1 << 22, bits << 23), jnp.float32)
