"""`mlp_block` as two kernels: norm, gate, up and activation; then down and residual. Many rows of floats: a norm and XLA's products."""

import math

import jax

from pallas_kernels.quant_matmul.fused import Norm, fused_matmul
from pallas_kernels.quant_matmul.pallas import weights_refusal
from pallas_kernels.quant_matmul.terms import inputs_dtype


def supports_mlp_block(target, facts) -> bool | str:
    weights = facts["weights"]
    for part in (weights.up, (weights.down,)):
        reason = weights_refusal(target, {"shape": facts["shape"], "weights": part})
        if reason is not True:
            return reason
    return True


def mlp_block(x, weights, *, spec, residual, lead, max_over_shards):
    rows = math.prod(x.shape[:-1])
    with jax.named_scope("up"):
        first = Norm(kind=spec.norm, eps=spec.eps, scale=weights.norm, bias=weights.norm_bias)
        norm = None if spec.normed else first
        how = {"activation": spec.activation, "gated": spec.gated, "out_dtype": inputs_dtype(weights.down, rows)}
        h = fused_matmul(x, weights.up, biases=weights.up_bias, norm=norm, **how)
    with jax.named_scope("down"):
        biases = () if weights.down_bias is None else (weights.down_bias,)
        shards = {"lead": lead, "max_over_shards": max_over_shards}
        return fused_matmul(h, (weights.down,), biases=biases, residual=residual, **shards)
