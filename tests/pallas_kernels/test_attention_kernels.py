"""The GPU kernels of attention: interpreted against the reference, unused keys poisoned, and compiled for three generations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import GPU_NAMES, close, compiled, kernels

from pallas_kernels.attention import attention
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.rope_cache.specs import SPECS
from pallas_kernels.tuning import tiles

S = jax.ShapeDtypeStruct
NEVER = 2**31 - 1


def case(rng, B, T, N, K, H, tokens, dtype, starts, poison=np.nan):
    """q, a cache that is NaN (or the largest int8) wherever no query may look, and positions."""
    q = jnp.asarray(rng.normal(size=(B, T, N, H)) * 2, jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(B, K, tokens, H)), jnp.float32) for _ in range(2))
    cache = LayerCache.zeros(rows=B, kv_heads=K, tokens=tokens, head_dim=H, dtype=dtype).encode(k, v)
    positions = jnp.asarray(starts, jnp.int32)[:, None] + jnp.arange(T, dtype=jnp.int32)
    unused = jnp.arange(tokens) > positions.max(1)[:, None]  # [B, S]

    def poisoned(a):
        mask = unused[:, None] if a.ndim == 3 else unused[:, None, :, None]
        return jnp.where(mask, jnp.asarray(127 if a.dtype == jnp.int8 else poison, a.dtype), a)

    clean = jax.tree.map(
        lambda a: jnp.where(unused[:, None] if a.ndim == 3 else unused[:, None, :, None], 0, a).astype(a.dtype), cache
    )
    return q, jax.tree.map(poisoned, cache), clean, positions


TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "int8": 1e-4}


@pytest.mark.parametrize(
    ("sizes", "dtype", "starts", "options", "tile"),
    [
        ((2, 1, 6, 3, 8, 70), "float32", (0, 69), {}, {"keys": 16, "splits": 2}),
        ((2, 1, 6, 3, 8, 70), "float32", (33, 65), {"window": 5, "soft_cap": 1.5}, {"keys": 16, "splits": 4}),
        ((2, 3, 4, 1, 20, 50), "bfloat16", (7, 40), {"window": NEVER}, {"keys": 32, "splits": 1}),
        ((3, 1, 2, 2, 16, 33), "int8", (31, 2, 16), {"soft_cap": 3.0, "rows": (2, 0, 1)}, {"keys": 16, "splits": 2}),
        ((1, 4, 8, 1, 16, 40), "float16", (11,), {"window": 3}, {}),
    ],
)
def test_few_queries(rng, sizes, dtype, starts, options, tile):
    q, poisoned, clean, positions = case(rng, *sizes, dtype, starts)
    options = dict(options)
    window, rows = options.pop("window", None), options.pop("rows", None)
    if rows is not None:
        place = jnp.argsort(jnp.asarray(rows))
        poisoned, clean = (jax.tree.map(lambda a: a[place], c) for c in (poisoned, clean))
    options |= {"rows": None if rows is None else jnp.asarray(rows, jnp.int32), "positions": positions, "scale": 0.4}
    options["window"] = None if window is None else jnp.int32(window)
    with kernels(), tiles({"attention": tile}):
        found = jax.jit(lambda q, cache: attention(q, cache, **options, implementation="pallas"))(q, poisoned)
    close(found, attention(q, clean, **options, implementation="reference"), TOLERANCE[dtype])


def test_a_row_without_keys_is_zero(rng):
    q, poisoned, _, positions = case(rng, 2, 1, 2, 1, 8, 40, "float32", (-1, 5))
    with kernels():
        found = attention(q, poisoned, rows=None, positions=positions, scale=1.0, implementation="pallas")
    assert not np.asarray(found[0]).any() and np.isfinite(found).all()


def test_gradients_of_few_queries(rng):
    q, _, cache, positions = case(rng, 1, 2, 2, 1, 8, 20, "float32", (9,))

    def loss(name, q, k, v):
        out = attention(q, LayerCache(k=k, v=v), rows=None, positions=positions, scale=0.4, implementation=name)
        return (out**2).sum()

    with kernels():
        found = jax.grad(functools.partial(loss, "pallas"), argnums=(0, 1, 2))(q, cache.k, cache.v)
    close(found, jax.grad(functools.partial(loss, "reference"), argnums=(0, 1, 2))(q, cache.k, cache.v), 1e-5)


@pytest.mark.parametrize(
    ("sizes", "dtype", "starts", "options", "tile"),
    [
        ((2, 37, 4, 2, 8, 60), "float32", (0, 20), {}, {"queries": 16, "keys": 16}),
        pytest.param(
            (1, 23, 3, 1, 20, 40),
            "float32",
            (11,),
            {"window": 6, "soft_cap": 1.5},
            {"queries": 32, "keys": 16},
            marks=pytest.mark.slow,
        ),
        ((2, 40, 4, 2, 16, 48), "bfloat16", (0, 3), {"soft_cap": 2.0}, {"queries": 64, "keys": 32}),
        ((1, 70, 2, 2, 16, 80), "int8", (5,), {"window": NEVER}, {"queries": 16, "keys": 32}),
    ],
)
def test_many_queries(rng, sizes, dtype, starts, options, tile):
    q, poisoned, clean, positions = case(rng, *sizes, dtype, starts)
    options = dict(options)
    window = options.pop("window", None)
    options |= {"rows": None, "positions": positions, "scale": 0.4, "window": None if window is None else jnp.int32(window)}
    with kernels(), tiles({"attention": tile | {"splits": 1}}):
        found = jax.jit(lambda q, cache: attention(q, cache, **options, implementation="pallas"))(q, poisoned)
    # many queries meet int8 levels in bfloat16
    close(found, attention(q, clean, **options, implementation="reference"), max(TOLERANCE[dtype], 1e-2 * (dtype == "int8")))


def program(spec, B, T, tokens, dtype):
    cache = jax.eval_shape(
        lambda: LayerCache.zeros(rows=B, kv_heads=spec.kv_heads, tokens=tokens, head_dim=spec.head_dim, dtype=dtype)
    )

    def run(q, cache, positions, window):
        return attention(q, cache, rows=None, positions=positions, scale=0.1, soft_cap=spec.soft_cap, window=window)

    return run, S((B, T, spec.heads, spec.head_dim), jnp.float32), cache, S((B, T), jnp.int32), S((), jnp.int32)


@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize(
    ("name", "B", "T", "dtype"),
    [
        ("llama_3_1_8b", 1, 1, "bfloat16"),
        pytest.param("llama_3_1_8b", 1, 1, "int8", marks=pytest.mark.slow),
        pytest.param("llama_3_1_8b", 1, 1, "float32", marks=pytest.mark.slow),
        pytest.param("llama_3_1_8b", 1, 8, "bfloat16", marks=pytest.mark.slow),
        pytest.param("llama_3_1_8b", 4, 8, "int8", marks=pytest.mark.slow),
        pytest.param("llama_2_7b", 4, 1, "float16", marks=pytest.mark.slow),
        pytest.param("gemma_2_9b", 1, 1, "bfloat16", marks=pytest.mark.slow),
        pytest.param("gemma_2_9b", 1, 4, "float32", marks=pytest.mark.slow),
        pytest.param("odd", 2, 3, "float32", marks=pytest.mark.slow),
    ],
)
def test_few_queries_compile(gpu, name, B, T, dtype):
    found = compiled(gpu, *program(SPECS[name], B, T, 8192, dtype), launches=("decode_attention", "decode_reduce"))
    by_name = {kernel.name: kernel for kernel in found.kernels}
    if dtype != "float32":
        assert by_name["decode_attention"].tensor_cores
    if name != "odd":
        assert by_name["decode_attention"].widest_load == 16


@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize(
    ("name", "T", "dtype"),
    [
        ("llama_3_1_8b", 2048, "bfloat16"),
        pytest.param("llama_3_1_8b", 999, "int8", marks=pytest.mark.slow),
        pytest.param("llama_3_1_8b", 512, "float32", marks=pytest.mark.slow),
        pytest.param("gemma_2_9b", 512, "bfloat16", marks=pytest.mark.slow),
        pytest.param("gemma_2_9b", 512, "float32", marks=pytest.mark.slow),
        pytest.param("phi_3_mini", 512, "bfloat16", marks=pytest.mark.slow),
        pytest.param("smollm2_135m", 100, "float16", marks=pytest.mark.slow),
    ],
)
def test_many_queries_compile(gpu, name, T, dtype):
    found = compiled(gpu, *program(SPECS[name], 1, T, 2048, dtype), launches=("prefill_attention",))
    if dtype != "float32":
        assert found.kernels[0].tensor_cores
