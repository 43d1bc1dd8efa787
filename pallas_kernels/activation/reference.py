"""Activations in plain jnp, float32 inside: the meaning of the operation."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dropout as dropping
from pallas_kernels.activation.output import ActivationOutput
from pallas_kernels.quantize import quantize_activations

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def activation(x, bias, *, kind, gated, dropout, quant, out_dtype):
    z = x.astype(jnp.float32)
    if bias is not None:
        z = z + bias.astype(jnp.float32)
    act = ACTIVATIONS[kind]
    if gated:
        half = z.shape[-1] // 2
        y = act(z[..., :half]) * z[..., half:]
    else:
        y = act(z)
    y = dropping.apply(y, dropout)
    if quant is None:
        return ActivationOutput(y=y.astype(out_dtype))
    levels, scales = quantize_activations(y, quant, implementation="reference")
    return ActivationOutput(y=levels, scales=scales)
