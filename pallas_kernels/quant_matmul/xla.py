"""Matmul with a float or quantised weight through the dots that XLA is fast at, on CPUs above all.

What decides (measured on XLA:CPU, jax 0.11):
* A row alone in bfloat16, float16 or int8 misses the fast path by 20-50x: such a row is doubled.
* XLA rebuilds a weight that is converted before a dot. An int8 weight therefore meets int8 rows: inputs in finer steps than
  one int8 are written as three int8 digits, x = s (d0 + d1 / 254 + d2 / 254^2), exact to 2^-23 of the row's largest input.
  Three rows cost as much as two, so this serves float inputs and inputs quantised by groups alike, with one read of the weight.
* A scale per group of a weight cannot leave the dot. Such weights are made float32 a megabyte of levels at a time, so that the
  floats stay in cache, and int4 as two planes of nibbles, so that nothing is interleaved.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.precision import dot_precision
from pallas_kernels.qtensor import FORMATS, QTensor, packing_block, repack
from pallas_kernels.quant_matmul import reference
from pallas_kernels.quantize import dequantize_activations, quantize_activations
from pallas_kernels.value_formats import INT4_OFFSET

CHUNK = 1 << 20  # weights made float at a time
DIGIT = 254  # base of the int8 digits: a remainder of at most 1/2 times 254 still lies in -127..127
WIDE = 32  # rows from which a bfloat16 dot of a bfloat16 copy of the weight beats float32

_LAST = (((1,), (1,)), ((), ()))  # contract the last axes: x [M, I], w [O, I] -> [M, O]


def supports(target, facts) -> bool | str:
    """Float weights run everywhere; QTensors on CPUs: in the layout cpu32, which is turned back in every call, they are slower."""
    if facts["format"] not in FORMATS:
        return True
    if facts["format"] not in ("int8", "int4"):
        return f"it multiplies float, int8 and int4 weights, not {facts['format']}, which the reference does"
    if target.platform != "cpu":
        return f"its {facts['format']} dots are made for CPUs, not for {target.platform}"
    if facts["layout"] not in ("canonical", "cpu32"):
        return f"it reads the canonical layout, not {facts['layout']!r}; use qtensor.repack"
    return True


def quant_matmul(x, w, *, bias, max_over_shards):
    rows = x.reshape(-1, x.shape[-1])
    y = _quantized(rows, repack(w, "canonical"), max_over_shards) if isinstance(w, QTensor) else _dot(rows, w)
    y = y.reshape(*x.shape[:-1], w.shape[0])
    return y if bias is None else y + bias.astype(jnp.float32)


def _dot(x, w):
    """x [M, I] in the dtype of w [O, I], accumulated in float32 (int32 for int8)."""
    exact = jnp.issubdtype(w.dtype, jnp.integer)
    x = x.astype(w.dtype)
    alone = x.shape[0] == 1 and w.dtype != jnp.float32
    y = jax.lax.dot_general(
        jnp.concatenate([x, x]) if alone else x,
        w,
        _LAST,
        precision=dot_precision(w.dtype, x.shape[0]),
        preferred_element_type=jnp.int32 if exact else jnp.float32,
    )
    return y[:1] if alone else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantized(x, w, max_over_shards):
    """float [M, I], QTensor [O, I] -> float32 [M, O]."""
    # without the barrier XLA recomputes what made x in each of the small fusions that quantise it: 1.5x slower at 512 rows
    x = jax.lax.optimization_barrier(x)
    per_channel = w.format == "int8" and w.group is None
    if w.activation is None:
        if not per_channel:
            return _by_chunks(x, w)
        x = x.astype(jnp.float32)
        return _by_digits(x, jnp.max(jnp.abs(x), -1, keepdims=True) / 127, w)
    levels, scales = quantize_activations(x, w.activation, max_over_shards, static=w.input_scale)
    if per_channel and scales.shape[-1] == 1:
        return _dot(levels, w.values).astype(jnp.float32) * scales * w.scales[:, 0].astype(jnp.float32)
    x = dequantize_activations(levels, scales, w.activation)
    # the largest input of a group has level 127, so that the largest scale serves the row without another pass over it
    return _by_digits(x, jnp.max(scales, -1, keepdims=True), w) if per_channel else _by_chunks(x, w)


def _forward(x, w, max_over_shards):
    return _quantized(x, w, max_over_shards), (x, w)


def _backward(max_over_shards, saved, gradient):
    # integer dots have no gradient of their own
    _, pull = jax.vjp(lambda x, w: reference.quant_matmul(x, w, bias=None, max_over_shards=max_over_shards), *saved)
    return pull(gradient)


_quantized.defvjp(_forward, _backward)


def _by_digits(x, scale, w):
    """An int8 weight with a scale per channel; x float32 [M, I] as three int8 digits, scale [M, 1] its largest over 127."""
    rest, digits = x / jnp.where(scale == 0, 1, scale), []
    for _ in range(3):
        digit = jnp.clip(jnp.rint(rest), -127, 127)  # clips rows of denormal numbers only
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * DIGIT
    y = _dot(jnp.concatenate(digits), w.values).reshape(3, *x.shape[:1], -1).astype(jnp.float32)
    return (y[0] + (y[1] + y[2] / DIGIT) / DIGIT) * scale * w.scales[:, 0].astype(jnp.float32)


def _by_chunks(x, w):
    """A weight with scales per group, made float a block of outputs at a time."""
    outputs, inputs = w.shape
    wide = x.shape[0] >= WIDE and x.dtype in (jnp.bfloat16, jnp.float16)
    x = x if wide else x.astype(jnp.float32)
    blocks = math.ceil(outputs * inputs / CHUNK)
    rows = math.ceil(outputs / blocks)
    if rows == outputs:
        return _grouped(x, w)
    # the last block starts earlier where the rows do not divide, so that no part of the weight is copied
    starts = [min(rows * b, outputs - rows) for b in range(math.ceil(outputs / rows))]
    cut = lambda start: jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, rows), w)
    y = jax.lax.map(lambda start: _grouped(x, cut(start)), jnp.asarray(starts, jnp.int32))  # [blocks, M, rows]
    whole = jnp.moveaxis(y[:-1], 0, 1).reshape(x.shape[0], -1)
    return jnp.concatenate([whole, y[-1][:, whole.shape[1] - outputs :]], -1)


def _grouped(x, w):
    """x [M, I] with the levels of w as floats of x's dtype."""
    if w.format == "int8":
        return _dot(x, _scaled(w, w.values, x.dtype))
    half = packing_block(w.group) // 2
    pairs = x.reshape(x.shape[0], -1, 2, half)  # inputs of low nibbles, then of high nibbles, in each packing block
    low, high = (pairs[:, :, i].reshape(x.shape[0], -1) for i in (0, 1))
    return _dot(low, _scaled(w, w.values & 15, x.dtype)) + _dot(high, _scaled(w, w.values >> 4, x.dtype))


def _scaled(w, levels, dtype):
    """Levels [O, n] of all groups, n a multiple of their number, as weights of `dtype`."""
    n = levels.astype(jnp.float32).reshape(*w.scales.shape, -1)
    scales, zeros = w.scales.astype(jnp.float32)[..., None], w.zeros
    if zeros is None:
        n = (n - (INT4_OFFSET if w.format == "int4" else 0)) * scales
    elif jnp.issubdtype(zeros.dtype, jnp.integer):
        n = (n - zeros.astype(jnp.float32)[..., None]) * scales
    else:
        n = n * scales + zeros.astype(jnp.float32)[..., None]
    return n.reshape(levels.shape).astype(dtype)
