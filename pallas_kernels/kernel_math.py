"""Arithmetic, places and dropout inside Triton kernels: what the lowering does not take, written with what it takes; float32."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.dropout import dropped
from pallas_kernels.target import interpreted

LOG2_E = 1.4426950408889634


def exp2(x):
    """2^x of float32 by the GPU's own instruction, to 2^-22; less than 2^-126 is 0, for which XLA has three instructions more."""
    if interpreted():
        return jnp.exp2(x)
    out = [jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    (y,) = triton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=out
    )
    return y


def erf(x):
    """The error function to 1.5e-7. Source: Abramowitz and Stegun 1964, formula 7.1.26."""
    size = jnp.abs(x)
    t = 1 / (1 + 0.3275911 * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    value = 1 - series * jnp.exp(-size * size)
    return jnp.where(x < 0, -value, value)


def silu(x):
    return x / (1 + jnp.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + erf(x * 0.7071067811865476))


def gelu_tanh(x):
    return 0.5 * x * (1 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


def relu(x):
    return jnp.maximum(x, 0.0)


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


def round_even(x):
    """To the nearest whole number, halves to even."""
    below = jnp.floor(x)
    rest = x - below  # exact
    odd = below - 2 * jnp.floor(below * 0.5) == 1
    return jnp.where((rest > 0.5) | ((rest == 0.5) & odd), below + 1, below)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def masked_slice(start, size: int) -> pl.Slice:
    """`size` elements from `start` on, of which a mask keeps those inside of the array.

    jax 0.12 refuses a slice that ends past its array where it knows the start, whatever the mask keeps; this hides it.
    """
    return pl.ds(jax.lax.full((), 0, jnp.int32) + start, size)


def of_dtype(x: jax.Array, dtype) -> jax.Array:
    """Cast to a stored dtype; int8 rounds to the nearest, halves to even, within -127..127."""
    if jnp.dtype(dtype) == jnp.int8:
        return jnp.clip(round_even(x), -127, 127).astype(jnp.int32).astype(jnp.int8)
    return x.astype(dtype)


def drop(y, rate: float, ref, row, column, rows: int):
    """Dropout of a block y [r, c] that begins at this row and column of an array of so many rows. ref: what `Dropout.operands` gives."""
    number = row + jnp.arange(y.shape[0])
    if "row_numbers" in ref:
        number = triton.load(ref["row_numbers"].at[number], mask=number < rows, other=0)
    columns = (column + jnp.arange(y.shape[1])).astype(jnp.uint32)
    if "column" in ref:
        columns = columns + ref["column"][0]
    spread = lambda a: jnp.broadcast_to(a, y.shape)
    return dropped(y, rate, (ref["seed"][0], ref["seed"][1]), spread(number.astype(jnp.uint32)[:, None]), spread(columns[None]))
