"""Matmul with a float or quantised weight in plain jnp, float32 inside: the meaning of the operation."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.precision import dot_precision
from pallas_kernels.qtensor import QTensor, dequantize
from pallas_kernels.quantize import dequantize_activations, quantize_activations


@jax.custom_jvp
def _straight_through(x, value):
    return value


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    # rounding has gradient zero almost everywhere; the gradient is taken as if the inputs had not been rounded
    return primals[1], tangents[0]


def quant_matmul(x, w, *, bias, max_over_shards):
    x = x.astype(jnp.float32)
    if isinstance(w, QTensor):
        if w.activation is not None:
            levels, scales = quantize_activations(
                jax.lax.stop_gradient(x), w.activation, max_over_shards, static=w.input_scale, implementation="reference"
            )
            x = _straight_through(x, dequantize_activations(levels, scales, w.activation))
        w = dequantize(w)
    precision = dot_precision(x.dtype, rows=math.prod(x.shape[:-1]))
    y = jnp.einsum("...i,oi->...o", x, w.astype(jnp.float32), precision=precision)
    return y if bias is None else y + bias.astype(jnp.float32)


def from_product(product: Callable) -> Callable:
    """An implementation of `quant_matmul` from product(x, w), float32 without bias and without quantised inputs; its gradient is the one
    of the reference."""
    run = functools.partial(quant_matmul, bias=None, max_over_shards=None)
    differentiable = jax.custom_vjp(product)
    differentiable.defvjp(lambda x, w: (product(x, w), (x, w)), lambda saved, gradient: jax.vjp(run, *saved)[1](gradient))

    def implementation(x, w, *, bias, max_over_shards):
        del max_over_shards  # inputs are not quantised
        y = differentiable(x, w)
        return y if bias is None else y + bias.astype(jnp.float32)

    return implementation
