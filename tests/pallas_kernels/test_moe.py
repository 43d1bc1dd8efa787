"""Mixtures of experts: routing and grouped matmuls against float64, and the GPU's kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import GPU_NAMES, kernels

from pallas_kernels.deviceless import compile_for
from pallas_kernels.errors import ShapeError
from pallas_kernels.gpus import GPUS
from pallas_kernels.moe import Routing, grouped_matmul, moe, route
from pallas_kernels.moe.routing import sort_tokens
from pallas_kernels.moe.specs import SPECS
from pallas_kernels.qtensor import ActivationQuant, QTensor, dequantize, round_to_nearest

FORMS = {
    "float32": None,
    "bfloat16": None,
    "int8": {"format": "int8"},
    "int4-32": {"format": "int4", "group": 32},
    "int8 inputs": {"format": "int8", "activation": ActivationQuant()},
}


def weight(rng, shape, form):
    w = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
    return jnp.asarray(w, form) if FORMS[form] is None else jax.tree.map(jnp.asarray, round_to_nearest(w, **FORMS[form]))


def floats(w):
    return np.asarray(dequantize(w) if isinstance(w, QTensor) else w, np.float64)


def silu(z):
    return z / (1 + np.exp(-z))


@pytest.mark.parametrize(
    ("scoring", "groups", "group_score"), [("softmax", 1, "max"), ("sigmoid", 4, "top2"), ("softmax", 2, "max")]
)
def test_route(rng, scoring, groups, group_score):
    logits, bias = rng.standard_normal((6, 8)), rng.standard_normal(8) / 4
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) if scoring == "softmax" else 1 / (1 + np.exp(-logits))
    found = route(
        jnp.asarray(logits, jnp.float32),
        bias=jnp.asarray(bias, jnp.float32),
        experts_per_token=2,
        scoring=scoring,
        normalise=True,
        scale=2.5,
        groups=groups,
        kept_groups=max(1, groups // 2),
        group_score=group_score,
    )
    for t in range(6):
        wanted = (scores[t] + bias).reshape(groups, -1)
        best = np.sort(wanted, -1)[:, -2:].sum(-1) if group_score == "top2" else wanted.max(-1)
        allowed = np.full((groups, 8 // groups), -np.inf)
        for g in np.argsort(-best)[: max(1, groups // 2)]:
            allowed[g] = wanted[g]
        chosen = np.argsort(-allowed.reshape(-1))[:2]
        np.testing.assert_array_equal(found.experts[t], chosen)
        np.testing.assert_allclose(found.weights[t], 2.5 * scores[t, chosen] / scores[t, chosen].sum(), rtol=1e-5)


def test_tokens_are_sorted_by_expert(rng):
    experts = jnp.asarray(rng.integers(0, 5, (7, 2)), jnp.int32)
    rows = sort_tokens(experts, 5)
    np.testing.assert_array_equal(rows.sizes, np.bincount(np.asarray(experts).reshape(-1), minlength=5))
    taken = np.repeat(np.arange(5), rows.sizes)
    np.testing.assert_array_equal(taken[np.asarray(rows.places)], experts)
    np.testing.assert_array_equal(np.asarray(rows.tokens)[np.asarray(rows.places)], np.arange(7)[:, None] * np.ones((1, 2)))


CASES = [("reference", form) for form in FORMS] + [("pallas", form) for form in ("bfloat16", "int4-32")]
CASES += [pytest.param("pallas", form, marks=pytest.mark.slow) for form in ("int8", "int8 inputs")]


@pytest.mark.parametrize(("implementation", "form"), CASES)
def test_grouped_matmul(rng, implementation, form):
    spec = SPECS["odd.5"]
    sizes = np.array([3, 0, 1, 9, 0]) if form == "bfloat16" else np.array([1, 0, 40, 0, 2])
    w = weight(rng, (5, 2 * spec.hidden, spec.embed), form)
    x = jnp.asarray(rng.standard_normal((sizes.sum(), spec.embed)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((5, 2 * spec.hidden)), jnp.float32)
    with kernels():
        found = grouped_matmul(
            x, w, jnp.asarray(sizes, jnp.int32), bias=bias, activation="silu", gated=True, implementation=implementation
        )
    expert = np.repeat(np.arange(5), sizes)
    z = np.einsum("ni,noi->no", np.asarray(x, np.float64), floats(w)[expert]) + np.asarray(bias)[expert]
    wanted = silu(z[:, : spec.hidden]) * z[:, spec.hidden :]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=(1e-5 if form == "float32" else 3e-2) * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8"])
def test_moe_and_its_gradient(rng, form):
    spec, tokens = SPECS["odd.5"], 4
    up, down = weight(rng, (5, 2 * spec.hidden, spec.embed), form), weight(rng, (5, spec.embed, spec.hidden), form)
    x = jnp.asarray(rng.standard_normal((tokens, spec.embed)), jnp.float32)
    routing = Routing(
        experts=jnp.asarray([[0, 3], [3, 1], [4, 3], [0, 4]], jnp.int32), weights=jnp.asarray(rng.random((4, 2)), jnp.float32)
    )
    loss = lambda x: jnp.sum(moe(x, routing, up, down, activation="silu") ** 2)
    with kernels():
        y = moe(x, routing, up, down, activation="silu")
        gradient = jax.grad(loss)(x)
    wanted = np.zeros((tokens, spec.embed))
    for t, k in np.ndindex(tokens, 2):
        e = int(routing.experts[t, k])
        z = floats(up)[e] @ np.asarray(x[t], np.float64)
        wanted[t] += float(routing.weights[t, k]) * floats(down)[e] @ (silu(z[: spec.hidden]) * z[spec.hidden :])
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    reference = jax.grad(loss)(x)
    np.testing.assert_allclose(gradient, reference, rtol=0, atol=1e-4 * np.abs(reference).max())


def test_wrong_arguments_are_refused():
    x, w, sizes = jnp.ones((4, 8)), jnp.ones((2, 6, 8)), jnp.asarray([1, 3], jnp.int32)
    for arguments, reason in (
        ((x[:, :7], w, sizes), r"w \[E, O, I\]"),
        ((x, w, sizes[:1]), r"integers \[2\]"),
        ((x, w[:, :5], sizes), "as many outputs"),
    ):
        with pytest.raises(ShapeError, match=reason):
            grouped_matmul(*arguments, gated=True)
    with pytest.raises(ShapeError, match="swish"):
        grouped_matmul(x, w, sizes, activation="swish")
    with pytest.raises(ShapeError, match="bias"):
        grouped_matmul(x, w, sizes, bias=jnp.ones((2, 5)))
    for arguments, reason in (
        ({"experts_per_token": 9}, "to choose from"),
        ({"experts_per_token": 1, "groups": 3}, "make no 3 groups"),
        ({"experts_per_token": 1, "scoring": "tanh"}, "tanh"),
        ({"experts_per_token": 1, "bias": jnp.ones(3)}, "bias"),
        ({"experts_per_token": 1, "groups": 8, "group_score": "top2"}, "best two"),
    ):
        with pytest.raises(ShapeError, match=reason):
            route(jnp.ones((2, 8)), **arguments)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "form", "tokens", "gpu"),
    [("mixtral_8x7b", "int4-32", 1, "h100"), ("qwen3_30b_a3b", "int8", 4, "a100")]
    + [
        pytest.param(name, form, tokens, gpu, marks=pytest.mark.full)
        for name in SPECS
        for form in FORMS
        for tokens in (1, 16, 512)
        for gpu in GPU_NAMES
        if form != "float32"
    ],
)
def test_compiles_for_gpus(name, form, tokens, gpu):
    spec = SPECS[name]
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    shape = (spec.experts, 2 * spec.hidden, spec.embed)
    if FORMS[form] is None:
        w = jax.ShapeDtypeStruct(shape, form)
    else:
        w = jax.eval_shape(lambda w: round_to_nearest(w, **FORMS[form]), struct(*shape))
    sizes = jax.ShapeDtypeStruct((spec.experts,), jnp.int32)
    run = lambda x, w, sizes: grouped_matmul(x, w, sizes, activation="silu", gated=True)
    found = compile_for(gpu, run, struct(tokens * spec.chosen, spec.embed), w, sizes)
    assert found.launches[-1].startswith("quant_matmul")  # XLA counts the blocks of each expert before
    for kernel in found.kernels:
        assert kernel.spilled == 0 and kernel.shared <= GPUS[gpu].shared, kernel
