"""Dropout in norm and activation: the same elements in every kernel, shard and gradient; how many; and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from kernel_checks import GPU_NAMES, close, compiled, kernels

from pallas_kernels.activation import activation
from pallas_kernels.dropout import Dropout, apply
from pallas_kernels.errors import ShapeError
from pallas_kernels.norm import fused_norm
from pallas_kernels.qtensor import ActivationQuant

S = jax.ShapeDtypeStruct


def seed(rng):
    return jnp.asarray(rng.integers(0, 1 << 32, 2, np.uint32))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.75])
def test_how_many_and_how_much(rng, rate):
    y = np.asarray(apply(jnp.ones((64, 1000)), Dropout(rate=rate, seed=seed(rng))))
    share = (y == 0).mean()
    assert abs(share - rate) <= 5 * np.sqrt(rate * (1 - rate) / y.size)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
    # neither rows nor columns share their choices
    if rate:
        for axis in (0, 1):
            spread = (y == 0).mean(axis).std() / np.sqrt(rate * (1 - rate) / y.shape[axis])
            assert 0.7 < spread < 1.4


@pytest.mark.skipif(len(jax.devices()) < 8, reason="its meshes have eight devices")
def test_every_sharding_drops_the_same_elements(rng):
    x, key = jnp.asarray(rng.normal(size=(4, 6, 16)), jnp.float32), seed(rng)
    call = lambda x, dropout: activation(x, kind="gelu", dropout=dropout).y
    whole = call(x, Dropout(rate=0.5, seed=key))
    for shape, spec in (((4, 1, 2), P("a", "b", "c")), ((2, 2, 2), P("a", "b", "c")), ((1, 2, 4), P("c", "b", "a"))):
        mesh = Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("a", "b", "c"))

        def shard(x, spec=spec):
            start = jnp.stack([jax.lax.axis_index(name) * n for name, n in zip(spec, x.shape, strict=True)])
            return call(x, Dropout(rate=0.5, seed=key, start=start, shape=(4, 6, 16)))

        found = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec))(x)
        np.testing.assert_array_equal(found == 0, whole == 0)
        close(found, whole, 1e-6)


@pytest.mark.parametrize(
    ("op", "start"),
    [
        ("norm", (3, 1, 40)),
        ("activation", None),
        pytest.param("norm", None, marks=pytest.mark.slow),
        pytest.param("activation", (3, 1, 40), marks=pytest.mark.slow),
        ("gated", (3, 1, 40)),
    ],
)
def test_kernels_make_the_choices_of_the_reference(rng, op, start):
    x = jnp.asarray(rng.normal(size=(2, 3, 100)), jnp.float32)
    residual, scale, bias = jnp.asarray(rng.normal(size=x.shape), jnp.float32), jnp.ones(100), jnp.full(100, 0.5)
    whole = {} if start is None else {"start": jnp.asarray(start, jnp.int32), "shape": (9, 9, 200)}
    dropout = Dropout(rate=0.3, seed=seed(rng), **whole)
    weights = jnp.asarray(rng.normal(size=(2, 3, 50 if op == "gated" else 100)), jnp.float32)

    def loss(name, x, scale, bias):
        if op == "norm":
            given = {"kind": "layer", "eps": 1e-5, "residual": residual, "activation": "gelu"}
            y = fused_norm(x, scale, bias, **given, dropout=dropout, implementation=name).y
        else:
            y = activation(x, kind="gelu", bias=bias, gated=op == "gated", dropout=dropout, implementation=name).y
        return (y * weights).sum() + 0 * scale.sum(), y

    run = lambda name: jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2), has_aux=True))(x, scale, bias)
    with kernels():
        found, y = run("pallas")
    wanted, reference = run("reference")
    np.testing.assert_array_equal(y == 0, reference == 0)
    assert 0.1 < (np.asarray(y) == 0).mean() < 0.5
    close(y, reference, 1e-6)
    close(found, wanted, 1e-5)
    if op == "activation":  # what is dropped has no gradient
        np.testing.assert_array_equal(np.asarray(found[0]) == 0, np.asarray(y) == 0)


def test_it_comes_before_the_rounding(rng):
    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
    quant, dropout = ActivationQuant(group=16), Dropout(rate=0.5, seed=seed(rng))
    kept = np.asarray(apply(jnp.ones(x.shape), dropout)) != 0
    for name in ("reference", "pallas"):
        with kernels():
            out = fused_norm(x, jnp.ones(64), kind="rms", eps=1e-5, dropout=dropout, quant=quant, implementation=name)
        assert out.y.dtype == jnp.int8 and not np.asarray(out.y)[~kept].any() and np.asarray(out.y)[kept].any()


def test_refusals():
    x, good = jnp.ones((2, 8)), jnp.zeros(2, jnp.uint32)
    for wrong, reason in (
        (Dropout(rate=1.0, seed=good), r"rate of dropout is 1\.0"),
        (Dropout(rate=0.1, seed=jnp.zeros(2)), r"must be uint32\[2\], got float32\[2\]"),
        (Dropout(rate=0.1, seed=good, start=jnp.zeros(2, jnp.int32)), "come together"),
        (Dropout(rate=0.1, seed=good, start=jnp.zeros(3, jnp.int32), shape=(4, 8)), "must have 2 numbers"),
    ):
        with pytest.raises(ShapeError, match=reason):
            activation(x, kind="relu", dropout=wrong)
        with pytest.raises(ShapeError, match=reason):
            fused_norm(x, jnp.ones(8), kind="rms", eps=1e-5, dropout=wrong)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("gpu", "gated", "quant"),
    [
        ("h100", True, ActivationQuant(format="fp8", group=128)),
        pytest.param("a100", True, ActivationQuant(group=None), marks=pytest.mark.slow),
        pytest.param("b200", False, ActivationQuant(), marks=pytest.mark.slow),
        pytest.param("a100", False, None, marks=pytest.mark.slow),
    ],
)
def test_an_activation_with_everything_is_one_launch(gpu, gated, quant):
    run = lambda x, bias, seed: activation(
        x, kind="gelu", gated=gated, bias=bias, dropout=Dropout(rate=0.1, seed=seed), quant=quant
    )
    width = 14336 * (2 if gated else 1)
    arguments = S((64, width), jnp.bfloat16), S((width,), jnp.float32), S((2,), jnp.uint32)
    compiled(gpu, run, *arguments, launches=("activation",), registers=128)


@pytest.mark.aot
@pytest.mark.parametrize("gpu", [n if n == "h100" else pytest.param(n, marks=pytest.mark.slow) for n in GPU_NAMES])
def test_norm_gelu_dropout_is_one_launch(gpu):
    def run(x, scale, bias, seed):
        dropout = Dropout(rate=0.1, seed=seed)
        return fused_norm(x, scale, bias, kind="layer", eps=1e-5, residual=x, activation="gelu", dropout=dropout)

    row, vector = S((64, 4096), jnp.bfloat16), S((4096,), jnp.float32)
    found = compiled(gpu, run, row, vector, vector, S((2,), jnp.uint32), launches=("norm",), registers=128)
    assert found.kernels[0].widest_load == 16
