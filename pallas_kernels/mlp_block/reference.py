"""`mlp_block` as the composition of the small operations: its meaning, and the path of a device without a fused kernel."""

import jax
import jax.numpy as jnp

from pallas_kernels.activation.reference import ACTIVATIONS
from pallas_kernels.norm import norm
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.shares import share


def mlp_block(x, weights, *, spec, residual, lead, max_over_shards):
    with jax.named_scope("norm"):
        n = x if spec.normed else norm(x, weights.norm, weights.norm_bias, kind=spec.norm, eps=spec.eps)
    with jax.named_scope("up"):
        biases = weights.up_bias or (None,) * len(weights.up)
        h = jnp.concatenate([quant_matmul(n, w, bias=b) for w, b in zip(weights.up, biases, strict=True)], -1)
    with jax.named_scope("activation"):
        act = ACTIVATIONS[spec.activation]
        if spec.gated:
            half = h.shape[-1] // 2
            h = act(h[..., :half]) * h[..., half:]
        else:
            h = act(h)
    with jax.named_scope("down"):
        y = quant_matmul(h, weights.down, bias=share(lead, weights.down_bias), max_over_shards=max_over_shards)
        return y if residual is None else share(lead, residual) + y
