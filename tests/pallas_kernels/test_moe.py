"""Mixtures of experts: routing, sorting and grouped matmuls against float64, and the GPU's kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import close, compiled, kernels

from pallas_kernels import tuner
from pallas_kernels.deviceless import compile_for
from pallas_kernels.errors import ShapeError
from pallas_kernels.gpus import GPUS
from pallas_kernels.kernel_math import power_of_two
from pallas_kernels.moe import Routing, grouped_matmul, in_order, moe, route, sort_tokens
from pallas_kernels.moe.specs import SPECS
from pallas_kernels.qtensor import ActivationQuant, QTensor, dequantize, round_to_nearest
from pallas_kernels.quant_matmul.tiles import rows_of_expert
from pallas_kernels.target import interpreting
from pallas_kernels.tuning import tiles

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


IMPLEMENTATIONS = ("reference", "pallas")


# rows of a block: several blocks, or one that sorts too
@pytest.mark.parametrize(("implementation", "rows"), [("reference", 8), ("pallas", 1), ("pallas", 8)])
@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "scoring", "groups", "group_score", "normalise"),
    [
        (6, 8, 2, "softmax", 1, "max", True),
        (6, 8, 2, "sigmoid", 4, "top2", True),
        (7, 42, 5, "softmax", 3, "max", False),  # neither experts nor groups are powers of two
        (1, 5, 1, "sigmoid", 1, "max", False),
    ],
)
def test_route(rng, implementation, tokens, experts, chosen, scoring, groups, group_score, normalise, rows):
    logits, bias = rng.standard_normal((tokens, experts)), rng.standard_normal(experts) / 4
    each, kept = experts // groups, max(1, groups // 2)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) if scoring == "softmax" else 1 / (1 + np.exp(-logits))
    with kernels(), tiles({"route": {"tokens": rows}}):
        found = route(
            jnp.asarray(logits, jnp.float32),
            bias=jnp.asarray(bias, jnp.float32),
            experts_per_token=chosen,
            scoring=scoring,
            normalise=normalise,
            scale=2.5,
            groups=groups,
            kept_groups=kept,
            group_score=group_score,
            implementation=implementation,
        )
    for t in range(tokens):
        wanted = (scores[t] + bias).reshape(groups, each)
        best = np.sort(wanted, -1)[:, -2:].sum(-1) if group_score == "top2" else wanted.max(-1)
        allowed = np.full((groups, each), -np.inf)
        for g in np.argsort(-best)[:kept]:
            allowed[g] = wanted[g]
        own = np.argsort(-allowed.reshape(-1))[:chosen]
        np.testing.assert_array_equal(found.experts[t], own)
        total = scores[t, own].sum() if normalise else 1.0
        np.testing.assert_allclose(found.weights[t], 2.5 * scores[t, own] / total, rtol=1e-5)
    assert (found.rows is None) == (implementation == "reference" or rows < tokens)
    if found.rows is not None:
        sorted_by_expert(found.rows, found.experts, experts)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_equal_experts_the_first_are_chosen(implementation):
    logits = jnp.asarray([[0, 1, 1, 0, 1, 0, 1, 1.0], [0] * 8, [0, 0, 0, 0, 0, 0, -np.inf, 3], [np.nan] * 8], jnp.float32)
    how = {"experts_per_token": 3, "scoring": "sigmoid", "implementation": implementation}
    with kernels():
        found = route(logits, **how)
        grouped = route(logits, groups=4, kept_groups=2, group_score="top2", **how)
        hindered = route(logits, bias=jnp.full(8, -jnp.inf), **how)
    first = [0, 1, 2]
    np.testing.assert_array_equal(found.experts[:3], [[1, 2, 4], first, [7, 0, 1]])
    np.testing.assert_array_equal(grouped.experts[:3], [[1, 6, 7], first, first])
    np.testing.assert_array_equal(hindered.experts[:3], [first] * 3)
    for made in (found, grouped, hindered):  # a row of NaN goes to experts that there are, none of them twice
        assert len(set(np.asarray(made.experts[3]).tolist()) & set(range(8))) == 3


@pytest.mark.parametrize("bias", [None, 0.1])
def test_gradient_of_route(rng, bias):
    logits = jnp.asarray(rng.standard_normal((3, 10)), jnp.float32)
    bias = bias if bias is None else bias * jnp.asarray(rng.standard_normal(10), jnp.float32)
    weighted = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)

    def loss(logits, name):
        made = route(logits, bias=bias, experts_per_token=4, normalise=True, implementation=name)
        return jnp.sum(made.weights * weighted)

    with kernels():
        close(jax.grad(loss)(logits, "pallas"), jax.grad(loss)(logits, "reference"), 1e-5)


def sorted_by_expert(rows, experts, count):
    """Checks rows of choices [T, k]."""
    experts = np.asarray(experts)
    order = np.argsort(experts.reshape(-1), kind="stable")
    np.testing.assert_array_equal(rows.sizes, np.bincount(experts.reshape(-1), minlength=count))
    np.testing.assert_array_equal(rows.tokens, order // experts.shape[1])
    np.testing.assert_array_equal(np.asarray(rows.places).reshape(-1)[order], np.arange(order.size))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "count", "tile"),
    [
        ((7, 2), 5, {}),
        ((1, 1), 1, {}),
        ((1, 8), 128, {}),
        ((37, 3), 42, {"step": 8, "choices": 16}),  # seven parts of two steps
        ((9, 1), 3, {"step": 4, "choices": 4}),
    ],
)
def test_tokens_are_sorted_by_expert(rng, implementation, shape, count, tile):
    experts = rng.integers(0, count, shape)
    with kernels(), tiles({"sort_tokens": tile}):
        rows = sort_tokens(jnp.asarray(experts, jnp.int32), count, implementation=implementation)
    sorted_by_expert(rows, experts, count)


CASES = [("reference", form) for form in FORMS] + [("pallas", form) for form in ("bfloat16", "int4-32")]
CASES += [pytest.param("pallas", form, marks=pytest.mark.slow) for form in ("int8", "int8 inputs")]


@pytest.mark.parametrize(("implementation", "form"), CASES)
def test_grouped_matmul(rng, implementation, form):
    spec = SPECS["odd.5"]
    sizes = np.array([3, 0, 1, 9, 0]) if form == "bfloat16" else np.array([1, 0, 40, 0, 2])
    w = weight(rng, (5, 2 * spec.hidden, spec.embed), form)
    # rows of tokens in any order, or in this one
    rows = rng.integers(0, 6, sizes.sum()) if form in ("bfloat16", "int8 inputs") else np.arange(sizes.sum())
    x = jnp.asarray(rng.standard_normal((rows.max() + 1, spec.embed)), jnp.float32)
    named = None if form in ("int8", "int4-32") else jnp.asarray(rows, jnp.int32)
    if implementation == "pallas" and form == "bfloat16":  # experts without rows, and a row that none has
        w = w.at[jnp.asarray([1, 4])].set(jnp.nan)
        x = jnp.concatenate([x, jnp.full((1, spec.embed), jnp.nan)])
    bias = jnp.asarray(rng.standard_normal((5, 2 * spec.hidden)), jnp.float32)
    with kernels():
        found = grouped_matmul(
            x,
            w,
            jnp.asarray(sizes, jnp.int32),
            rows=named,
            bias=bias,
            activation="silu",
            gated=True,
            implementation=implementation,
        )
    expert = np.repeat(np.arange(5), sizes)
    z = np.einsum("ni,noi->no", np.asarray(x, np.float64)[rows], floats(w)[expert]) + np.asarray(bias)[expert]
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
    with pytest.raises(ShapeError, match=r"rows must be integers \[N\]"):
        grouped_matmul(x, w, sizes, rows=jnp.ones((4, 1), jnp.int32))
    for experts, count in ((jnp.ones(4, jnp.int32), 2), (jnp.ones((4, 1)), 2), (jnp.ones((4, 1), jnp.int32), 0)):
        with pytest.raises(ShapeError, match=r"integers \[T, k\]"):
            sort_tokens(experts, count)
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


@pytest.mark.parametrize(
    ("rows", "experts", "wanted"), [(8, 128, 1), (64, 256, 1), (128, 128, 2), (32, 8, 8), (2, 8, 1), (120, 8, 16), (136, 8, 17)]
)
def test_rows_that_a_program_has_of_an_expert(rows, experts, wanted):
    assert rows_of_expert(rows, experts) == wanted


def test_what_a_tuner_runs_them_on(rng):
    """Rows spread over the experts, each a token that there is."""
    x, w = jax.ShapeDtypeStruct((6, 64), jnp.float32), jax.ShapeDtypeStruct((5, 32, 64), jnp.bfloat16)

    def trace(x, w, experts, logits):
        sorted_ = sort_tokens(experts, 5)
        return grouped_matmul(x, w, sorted_.sizes, rows=sorted_.tokens), route(logits, experts_per_token=2)

    more = jax.ShapeDtypeStruct((6, 2), jnp.int32), jax.ShapeDtypeStruct((6, 5), jnp.float32)
    with interpreting():
        tasks = {task.op: task.call for task in tuner.record(lambda: jax.eval_shape(trace, x, w, *more))}
    assert set(tasks) == {"sort_tokens", "quant_matmul", "route"}
    (experts,) = tasks["sort_tokens"].arrays(rng)
    assert experts.shape == (6, 2) and int(experts.min()) >= 0 and int(experts.max()) < 5
    *_, sizes, rows = tasks["quant_matmul"].arrays(rng)
    assert int(sizes.sum()) == rows.size == 12 and int(sizes.max()) - int(sizes.min()) <= 1
    assert sorted(set(rows.tolist())) == list(range(6))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "form", "tokens", "gpu"),
    [("mixtral_8x7b", "int4-32", 1, "h100"), ("qwen3_30b_a3b", "int8", 4, "a100")],
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
    before = ["quantize_activations"] if form == "int8 inputs" else []
    assert [name.partition("__")[0] for name in found.launches] == [*before, "quant_matmul"]
    for kernel in found.kernels:
        assert kernel.spilled == 0 and kernel.shared <= GPUS[gpu].shared, kernel


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "tokens", "gpu"),
    [("deepseek_v3", 16, "h100"), ("qwen3_30b_a3b", 1, "b200"), ("qwen3_30b_a3b", 512, "a100")]
    + [pytest.param(name, tokens, "h100", marks=pytest.mark.slow) for name in SPECS for tokens in (1, 16, 64, 8192)],
)
def test_routing_compiles_for_gpus(name, tokens, gpu):
    spec = SPECS[name]
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

    def run(logits, bias):
        routing = route(logits, bias=bias, normalise=True, **spec.routing)
        rows = in_order(routing, spec.experts)
        return routing.experts, routing.weights, rows

    fits = tokens * power_of_two(spec.experts) <= 4096
    alone = tokens * spec.chosen * power_of_two(spec.experts) <= 4 * 4096
    launches = ("route",) if fits else ("route", "sort") if alone else ("route", "count", "sort")
    compiled(gpu, run, struct(tokens, spec.experts), struct(spec.experts), launches=launches)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "tokens", "gpu"),
    [("qwen3_30b_a3b", 1, "h100")]
    + [pytest.param(name, tokens, "h100", marks=pytest.mark.slow) for name in SPECS for tokens in (1, 16)],
)
def test_launches_of_experts_in_decoding(name, tokens, gpu):
    """From the router's logits to the residual: the choice with the order of rows, two matmuls, and a sum that XLA makes."""
    spec = SPECS[name]
    struct = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)

    def run(logits, x, up, down, residual):
        return residual + moe(x, route(logits, **spec.routing), up, down, activation="silu")

    up = struct(spec.experts, 2 * spec.hidden, spec.embed, dtype=jnp.bfloat16)
    down = struct(spec.experts, spec.embed, spec.hidden, dtype=jnp.bfloat16)
    x = struct(tokens, spec.embed)
    found = compile_for(gpu, run, struct(tokens, spec.experts), x, up, down, x)
    assert len(found.launches) == 4 and found.launches[0] == "route", found.launches
    assert [kernel.name.partition("__")[0] for kernel in found.kernels].count("quant_matmul") == 2
    assert all(kernel.spilled == 0 for kernel in found.kernels)
