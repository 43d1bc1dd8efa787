"""Routing, sorting and the matmuls of experts in plain jnp, float32 inside: the meaning of the operations."""

import jax
import jax.numpy as jnp

from pallas_kernels.activation.reference import ACTIVATIONS
from pallas_kernels.moe.routing import Routing, Sorted
from pallas_kernels.precision import dot_precision
from pallas_kernels.qtensor import QTensor, dequantize
from pallas_kernels.quantize import dequantize_activations, quantize_activations


def route(logits, bias, *, experts_per_token, scoring, normalise, scale, groups, kept_groups, group_score):
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, -1) if scoring == "softmax" else jax.nn.sigmoid(logits)
    wanted = scores if bias is None else scores + bias.astype(jnp.float32)
    if groups > 1:
        parts = wanted.reshape(*wanted.shape[:-1], groups, -1)
        best, _ = jax.lax.top_k(parts, 1 if group_score == "max" else 2)
        _, kept = jax.lax.top_k(jnp.sum(best, -1), kept_groups)
        keep = jnp.any(kept[..., None] == jnp.arange(groups), -2)
        wanted = jnp.where(keep[..., None], parts, -jnp.inf).reshape(wanted.shape)
    _, experts = jax.lax.top_k(wanted, experts_per_token)
    weights = jnp.take_along_axis(scores, experts, -1)
    if normalise:
        weights = weights / jnp.sum(weights, -1, keepdims=True)
    return Routing(experts=experts.astype(jnp.int32), weights=weights * scale)


def sort_tokens(experts, *, count):
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    sizes = jnp.sum(flat[:, None] == jnp.arange(count), 0, dtype=jnp.int32)
    return Sorted(tokens=order // experts.shape[-1], places=places.reshape(experts.shape), sizes=sizes)


def grouped_matmul(x, w, sizes, bias, rows, *, activation, gated, out_dtype):
    x = x.astype(jnp.float32)
    if rows is not None:
        x = x[rows]
    if isinstance(w, QTensor):
        if w.activation is not None:
            static = w.input_scale  # of every expert [E, 1, 1]
            if static is not None:
                static = jnp.repeat(static[:, 0], sizes, axis=0, total_repeat_length=x.shape[0])
            levels, scales = quantize_activations(x, w.activation, static=static, implementation="reference")
            x = dequantize_activations(levels, scales, w.activation)
        w = dequantize(w)
    precision = dot_precision(x.dtype, rows=x.shape[0], ragged=True)
    z = jax.lax.ragged_dot(x, jnp.swapaxes(w.astype(jnp.float32), 1, 2), sizes, precision=precision)
    if bias is not None:
        z = z + jnp.repeat(bias.astype(jnp.float32), sizes, axis=0, total_repeat_length=x.shape[0])
    act = ACTIVATIONS[activation] if activation is not None else lambda z: z
    if gated:
        half = z.shape[-1] // 2
        return (act(z[:, :half]) * z[:, half:]).astype(out_dtype)
    return act(z).astype(out_dtype)
