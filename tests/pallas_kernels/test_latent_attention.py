"""latent_attention: against float64, pages, 8-bit caches, its gradient, poisoned tokens, and compiled for three generations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import close, compiled, kernels

from pallas_kernels import tuner
from pallas_kernels.errors import BackendError, ShapeError
from pallas_kernels.latent_attention import latent_attention
from pallas_kernels.latent_attention.specs import SPECS
from pallas_kernels.target import interpreting
from pallas_kernels.tuning import tiles

S = jax.ShapeDtypeStruct
SCALE = 0.4


def truth(q, cache, positions, values):
    out = np.zeros((*q.shape[:3], values))
    for b, t, n in np.ndindex(out.shape[:3]):
        own = cache[b, : positions[b, t] + 1]
        if len(own):
            scores = SCALE * own @ q[b, t, n]
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ own[:, :values]
    return out


def case(rng, spec, B, T, tokens, starts, dtype):
    """q, a cache that is NaN where no query may look, its scales, positions, and the result."""
    q = np.asarray(jnp.asarray(rng.normal(size=(B, T, spec.heads, spec.latent + spec.rotated)), jnp.float32), np.float64)
    cache, scales = rng.normal(size=(B, tokens, q.shape[-1])), None
    positions = np.asarray(starts)[:, None] + np.arange(T)
    if jnp.dtype(dtype).itemsize == 1:
        top = 127 if dtype == "int8" else 448
        scales = np.abs(cache).max(-1).astype(np.float32) / top
        cache = cache / scales[..., None]
        cache = np.round(cache) if dtype == "int8" else cache
    stored = jnp.asarray(cache, dtype)
    exact = np.asarray(stored, np.float64) * (1 if scales is None else np.asarray(scales, np.float64)[..., None])
    wanted = truth(q, exact, positions, spec.latent)
    unused = np.arange(tokens) > positions.max(1)[:, None]
    poison = 127 if dtype == "int8" else np.nan
    stored = jnp.where(unused[..., None], jnp.asarray(poison, dtype), stored)
    return jnp.asarray(q, jnp.float32), stored, None if scales is None else jnp.asarray(scales), jnp.asarray(positions), wanted


EXACT = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "int8": 1e-4, "float8_e4m3fn": 1e-4}
SPLIT = EXACT | {"int8": 3e-3, "float8_e4m3fn": 3e-3}  # partial sums of 8 bits, each of which is off by 2e-3 at most


@pytest.mark.parametrize(
    ("T", "tokens", "starts", "dtype", "tile"),
    [
        pytest.param(1, 70, (0, 69, -1), "float32", {"splits": 4}, marks=pytest.mark.slow),
        pytest.param(3, 50, (7, 40, 0), "bfloat16", {"splits": 1, "queries": 16}, marks=pytest.mark.slow),
        (4, 33, (12, 29, 3), "int8", {"splits": 2, "queries": 16, "keys": 16}),
        pytest.param(1, 40, (39, 0, 5), "float8_e4m3fn", {"splits": 2}, marks=pytest.mark.slow),
    ],
)
def test_against_float64(rng, T, tokens, starts, dtype, tile):
    spec = SPECS["odd"]
    q, cache, scales, positions, wanted = case(rng, spec, 3, T, tokens, starts, dtype)
    run = functools.partial(latent_attention, values=spec.latent, scale=SCALE)
    with kernels(), tiles({"latent_attention": tile}):
        found = jax.jit(functools.partial(run, implementation="pallas"))(q, cache, positions=positions, scales=scales)
    close(found, wanted, SPLIT[dtype])
    clean = jnp.where(jnp.isnan(cache), 0, cache).astype(cache.dtype) if dtype != "int8" else cache
    found = run(q, clean, positions=positions, scales=scales, implementation="reference")
    close(found, wanted, EXACT[dtype])


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
def test_pages_and_rows(rng, implementation):
    spec = SPECS["odd"]
    q, cache, _, positions, wanted = case(rng, spec, 2, 1, 48, (47, 20), "float32")
    cache = jnp.nan_to_num(cache)
    order = np.array([4, 0, 3, 5, 1, 2])
    pages = cache.reshape(6, 16, -1)[np.argsort(order)]  # page i of the sequences stands at row order[i]
    run = functools.partial(latent_attention, q, values=spec.latent, scale=SCALE, implementation=implementation)
    with kernels():
        paged = run(pages, positions=positions, rows=jnp.asarray(order.reshape(2, 3), jnp.int32))
        turned = run(cache[::-1], positions=positions, rows=jnp.array([1, 0]))
    close(paged, wanted, 1e-5)
    close(turned, wanted, 1e-5)


@pytest.mark.slow
def test_gradient(rng):
    spec = SPECS["odd"]
    q, cache, _, positions, _ = case(rng, spec, 1, 2, 20, (9,), "float32")
    cache = jnp.nan_to_num(cache)

    def loss(name, q, cache):
        out = latent_attention(q, cache, values=spec.latent, positions=positions, scale=SCALE, implementation=name)
        return jnp.sin(out).sum()

    with kernels():
        found = jax.jit(jax.grad(functools.partial(loss, "pallas"), (0, 1)))(q, cache)
    close(found, jax.grad(functools.partial(loss, "reference"), (0, 1))(q, cache), 1e-5)


def test_a_tuner_runs_it_on_a_full_cache(rng):
    q, cache, at = S((2, 1, 3, 20), jnp.float32), S((2, 64, 20), jnp.bfloat16), S((2, 1), jnp.int32)
    run = lambda q, cache, at: latent_attention(q, cache, values=16, positions=at, scale=1.0)
    with interpreting():
        (task,) = tuner.record(lambda: jax.eval_shape(run, q, cache, at))
    _, _, positions = task.call.arrays(rng)
    assert positions.tolist() == [[63], [63]]


def test_refusals():
    q, cache, at = jnp.ones((2, 1, 3, 20)), jnp.ones((2, 8, 20)), jnp.zeros((2, 1), jnp.int32)
    call = functools.partial(latent_attention, values=16, positions=at, scale=1.0)
    for arguments, reason in (
        (lambda: call(q, cache[..., :19]), r"cache \[R, S, C \+ P\] \[2, 8, 19\] and C = 16 do not fit"),
        (lambda: call(q, cache[:1]), "1 rows of a cache do not fit a batch of 2"),
        (lambda: call(q, cache.astype(jnp.int8)), r"a cache of int8 has scales \[2, 8\], got None"),
        (lambda: call(q, cache, scales=jnp.ones((2, 8))), "a cache of float32 has no scales"),
    ):
        with pytest.raises(ShapeError, match=reason):
            arguments()
    with kernels(), pytest.raises(BackendError, match="not of 8"):
        call(q, cache, rows=jnp.zeros((2, 2), jnp.int32), implementation="pallas")


@pytest.mark.aot
@pytest.mark.parametrize(("gpu", "name", "B", "T", "dtype"), [("h100", "deepseek_v3", 1, 1, "bfloat16")])
def test_compiles(gpu, name, B, T, dtype):
    spec = SPECS[name]
    size = spec.latent + spec.rotated

    def run(q, cache, positions, scales=None):
        return latent_attention(q, cache, values=spec.latent, positions=positions, scale=0.1, scales=scales)

    args = S((B, T, spec.heads, size), jnp.float32), S((B, 8192, size), dtype), S((B, T), jnp.int32)
    args = (*args, S((B, 8192), jnp.float32)) if jnp.dtype(dtype).itemsize == 1 else args
    found = compiled(gpu, run, *args, launches=("latent_attention", "latent_reduce"))
    by_name = {kernel.name: kernel for kernel in found.kernels}
    if dtype != "float32":
        assert by_name["latent_attention"].tensor_cores
    if name != "odd":
        assert by_name["latent_attention"].widest_load == 16
