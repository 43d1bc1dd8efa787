"""Operations of no rows: kernels leave them to the reference, which gives an empty array; or an error says that there is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import kernels

from pallas_kernels.activation import activation
from pallas_kernels.attention import attention
from pallas_kernels.cross_entropy import log_probs
from pallas_kernels.errors import ShapeError
from pallas_kernels.latent_attention import latent_attention
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.moe import grouped_matmul, moe, route, sort_tokens
from pallas_kernels.norm import fused_norm, rms_norm
from pallas_kernels.qtensor import ActivationQuant, round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quantize import quantize_activations
from pallas_kernels.rope_cache import rope, rope_cache
from pallas_kernels.sampling import argmax
from pallas_kernels.softmax import softmax
from pallas_kernels.triangle_attention import triangle_attention

zeros = jnp.zeros


def numbers(*shape: int):
    return jnp.zeros(shape, jnp.int32)


def cache(rows: int) -> LayerCache:
    return LayerCache(k=zeros((rows, 1, 9, 8)), v=zeros((rows, 1, 9, 8)))


def attend(rows: int, tokens: int):
    return attention(
        zeros((rows, tokens, 2, 8)), cache(rows), rows=None, positions=numbers(rows, tokens), scale=1.0, soft_cap=2.0
    )


def attend_latent():
    return latent_attention(zeros((0, 1, 2, 8)), zeros((0, 9, 8)), values=6, positions=numbers(0, 1), scale=1.0)


def multiply():
    w = round_to_nearest(np.ones((8, 64), np.float32), format="int8")
    return quant_matmul(zeros((0, 64)), jax.tree.map(jnp.asarray, w))


def turn():
    heads = lambda n: zeros((1, 0, n, 8))
    return rope_cache(heads(2), heads(1), heads(1), None, None, cache(1), rows=None, positions=numbers(1, 0))[0]


def mix():
    routing = route(zeros((0, 3)), experts_per_token=2)
    return moe(zeros((0, 16)), routing, zeros((3, 8, 16)), zeros((3, 16, 4)), activation="silu")


EMPTY = {
    "activation": (lambda: activation(zeros((0, 16)), kind="silu", gated=True).y, (0, 8)),
    "rms_norm": (lambda: rms_norm(zeros((0, 16)), zeros(16), eps=1e-5), (0, 16)),
    "fused_norm": (lambda: fused_norm(zeros((0, 16)), zeros(16), kind="rms", eps=1e-5, residual=zeros((0, 16))).y, (0, 16)),
    "log_probs": (lambda: log_probs(zeros((0, 16)), numbers(0)), (0,)),
    "attention without tokens": (lambda: attend(1, 0), (1, 0, 2, 8)),
    "attention without rows": (lambda: attend(0, 1), (0, 1, 2, 8)),
    "latent_attention": (attend_latent, (0, 1, 2, 6)),
    "route": (lambda: route(zeros((0, 8)), experts_per_token=2).weights, (0, 2)),
    "sort_tokens": (lambda: sort_tokens(numbers(0, 2), 4).places, (0, 2)),
    "grouped_matmul": (lambda: grouped_matmul(zeros((0, 16)), zeros((3, 4, 16)), numbers(3)), (0, 4)),
    "moe": (mix, (0, 16)),
    "quant_matmul": (multiply, (0, 8)),
    "quantize_activations": (lambda: quantize_activations(zeros((0, 64)), ActivationQuant())[0], (0, 64)),
    "rope": (lambda: rope(zeros((0, 3, 2, 8)), zeros((0, 3, 4)), zeros((0, 3, 4))), (0, 3, 2, 8)),
    "rope_cache": (turn, (1, 0, 2, 8)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_in_and_nothing_out(name):
    run, shape = EMPTY[name]
    with kernels():
        assert run().shape == shape


@pytest.mark.parametrize(
    "run",
    [
        lambda: argmax(zeros((0, 16))),
        lambda: softmax(zeros((0, 16))),
        lambda: triangle_attention(*[zeros((0, 3, 3, 2, 8))] * 3, zeros((0, 2, 3, 3)), scale=1.0),
    ],
)
def test_what_has_no_empty_form_says_so(run):
    with pytest.raises(ShapeError, match="got float32"), kernels():
        run()
