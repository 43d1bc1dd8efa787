"""The GPU kernel of rotation and cache write: interpreted against the reference, and compiled for three generations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import copies
from kernel_checks import GPU_NAMES, close, compiled, kernels

from pallas_kernels.errors import BackendError, ShapeError
from pallas_kernels.gpus import GPUS
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.registry import choose
from pallas_kernels.rope_cache import rope, rope_cache
from pallas_kernels.rope_cache.specs import SPECS
from pallas_kernels.target import Target

S = jax.ShapeDtypeStruct
TOKENS = 13


def inputs(rng, B, T, N, K, H, R):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    angles = (None, None) if R == 0 else (draw(B, T, R // 2), draw(B, T, R // 2))
    return draw(B, T, N, H), draw(B, T, K, H), draw(B, T, K, H), *angles


@pytest.mark.parametrize(
    ("sizes", "dtype", "rows", "write", "interleaved"),
    [
        ((2, 1, 4, 2, 16, 16), "float32", False, False, False),
        pytest.param((2, 5, 3, 1, 20, 12), "bfloat16", True, True, False, marks=pytest.mark.slow),
        ((2, 9, 2, 2, 16, 8), "int8", True, True, True),
        pytest.param((1, 1, 6, 3, 8, 0), "int8", True, False, False, marks=pytest.mark.slow),
        pytest.param((2, 5, 3, 1, 20, 12), "float8_e4m3fn", True, True, False, marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(rng, sizes, dtype, rows, write, interleaved):
    B, T = sizes[:2]
    cache = LayerCache.zeros(rows=B + 1, kv_heads=sizes[3], tokens=TOKENS, head_dim=sizes[4], dtype=dtype)
    cache = jax.tree.map(lambda a: a + jnp.ones((), a.dtype), cache)  # what is not written must stay
    if not rows:
        cache = jax.tree.map(lambda a: a[:B], cache)
    positions = jnp.asarray([np.arange(T) + 2, np.arange(T) + TOKENS - 3][:B], jnp.int32)  # some of the second lie past the end
    call = functools.partial(
        rope_cache,
        *inputs(rng, *sizes),
        cache,
        rows=jnp.asarray([2, 0][:B] if B > 1 else [1], jnp.int32) if rows else None,
        positions=positions if T > 1 else jnp.minimum(positions, TOKENS - 1),
        write=jnp.asarray(rng.random((B, T)) > 0.3) if write else None,
        interleaved=interleaved,
    )
    with kernels():
        found = jax.jit(functools.partial(call, implementation="pallas"))()
    wanted = call(implementation="reference")
    close(found[0], wanted[0], 1e-6)
    for name in ("k", "v"):
        steps = np.asarray(getattr(found[1], name), np.float32) - np.asarray(getattr(wanted[1], name), np.float32)
        # a value that lies between two levels may fall to either
        assert np.abs(steps).max() <= {"int8": 1, "float8_e4m3fn": 32, "bfloat16": 2e-2, "float32": 1e-6}[dtype]
        assert (steps != 0).mean() < 0.05
    close((found[1].k_scale, found[1].v_scale), (wanted[1].k_scale, wanted[1].v_scale), 1e-6)


@pytest.mark.parametrize(
    ("implementation", "T", "dtype"),
    [
        ("reference", 1, "int8"),
        ("reference", 6, "float8_e4m3fn"),
        ("pallas", 6, "int8"),
        pytest.param("pallas", 1, "float8_e4m3fn", marks=pytest.mark.slow),
        pytest.param("pallas", 6, "float32", marks=pytest.mark.slow),
    ],
)
def test_pages_are_written_in_the_order_of_a_table(rng, implementation, T, dtype):
    """As in rows of three pages each, whose tokens they are; a page that is in no table stays, and so does what lies past the last one."""
    B, K, H, page, P = 2, 2, 8, 4, 3
    tables = rng.permutation(B * P + 1)[: B * P].reshape(B, P)
    positions = jnp.asarray(np.array([[3], [P * page - T // 2 - 1]]) + np.arange(T), jnp.int32)
    given = inputs(rng, B, T, 4, K, H, 8)
    write = jnp.asarray(positions < P * page) if T > 1 else None
    new = lambda rows, tokens: jax.tree.map(
        lambda a: a + jnp.ones((), a.dtype), LayerCache.zeros(rows=rows, kv_heads=K, tokens=tokens, head_dim=H, dtype=dtype)
    )
    run = lambda cache, rows, write: jax.jit(functools.partial(rope_cache, implementation=implementation))(
        *given, cache, rows=rows, positions=positions, write=write
    )
    with kernels():
        q, paged = run(new(B * P + 1, page), jnp.asarray(tables, jnp.int32), None if T > 1 else write)
        wanted_q, wanted = run(new(B, P * page), None, write)
    np.testing.assert_array_equal(q, wanted_q)
    (unused,) = set(range(B * P + 1)) - set(tables.flat)
    for a, w in zip(jax.tree.leaves(paged), jax.tree.leaves(wanted), strict=True):
        a, w = np.asarray(a, np.float32), np.asarray(w, np.float32)
        np.testing.assert_array_equal(np.concatenate(np.moveaxis(a[tables], 1, 0), 2), w)
        assert (a[unused] == 1).all() and (a != 1).any()


def test_refusals(rng):
    given = inputs(rng, 2, 1, 2, 1, 8, 8)
    cache = lambda dtype: LayerCache.zeros(rows=4, kv_heads=1, tokens=32, head_dim=8, dtype=dtype)
    at = jnp.zeros((2, 1), jnp.int32)
    for dtype, rows, reason in (
        (jnp.int4, jnp.zeros((2, 2), jnp.int32), "an int4 cache has no block tables"),
        (jnp.float32, jnp.zeros(3, jnp.int32), r"rows \[3\] do not fit a batch of 2"),
    ):
        with pytest.raises(ShapeError, match=reason):
            rope_cache(*given, cache(dtype), rows=rows, positions=at)
    facts = {"shape": (2, 1, 2, 8), "cache_dtype": "float8_e4m3fn"}
    assert choose("rope_cache", target=Target(platform="gpu", device_kind=GPUS["h100"].device_kind), **facts).name == "pallas"
    with pytest.raises(BackendError, match=r"A100.* cannot convert to float8_e4m3fn"):
        choose("rope_cache", "pallas", Target(platform="gpu", device_kind=GPUS["a100"].device_kind), **facts)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(rng, interleaved):
    x, _, _, cos, sin = inputs(rng, 2, 3, 3, 1, 12, 8)
    call = functools.partial(rope, interleaved=interleaved)
    with kernels():
        close(call(x, cos, sin, implementation="pallas"), call(x, cos, sin, implementation="reference"), 1e-6)
        loss = lambda implementation: lambda x: (call(x, cos, sin, implementation=implementation) ** 3).sum()
        close(jax.grad(loss("pallas"))(x), jax.grad(loss("reference"))(x), 1e-5)


def test_interleaved_is_halves_in_another_order(rng):
    x, _, _, cos, sin = inputs(rng, 1, 2, 1, 1, 10, 8)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7, 8, 9])
    close(rope(x, cos, sin, interleaved=True)[..., order], rope(x[..., order], cos, sin), 1e-7)


@pytest.mark.aot
@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize(
    ("name", "tokens", "dtype"),
    [
        ("llama_3_1_8b", 1, "bfloat16"),
        pytest.param("llama_3_1_8b", 1, "int8", marks=pytest.mark.slow),
        pytest.param("llama_3_1_8b", 512, "float32", marks=pytest.mark.slow),
        pytest.param("gemma_2_9b", 1, "bfloat16", marks=pytest.mark.slow),
        pytest.param("odd", 7, "int8", marks=pytest.mark.slow),
    ],
)
def test_compiles_and_copies_no_cache(gpu, name, tokens, dtype):
    spec = SPECS[name]
    shape = lambda heads: S((1, tokens, heads, spec.head_dim), jnp.float32)
    cache = jax.eval_shape(
        lambda: LayerCache.zeros(rows=1, kv_heads=spec.kv_heads, tokens=4096, head_dim=spec.head_dim, dtype=dtype)
    )
    angles = S((1, tokens, spec.rotated // 2), jnp.float32)

    def steps(q, k, v, cos, sin, cache, positions):
        # twice, and in a loop, so that the cache is the program's own: an argument that is not donated would be copied once
        def body(_, carry):
            return rope_cache(carry[0], k, v, cos, sin, carry[1], rows=None, positions=positions)

        return jax.lax.fori_loop(0, 2, body, (q, jax.tree.map(lambda a: a + 1, cache)))

    arguments = (
        shape(spec.heads),
        shape(spec.kv_heads),
        shape(spec.kv_heads),
        angles,
        angles,
        cache,
        S((1, tokens), jnp.int32),
    )
    run = lambda *a: rope_cache(*a[:-1], rows=None, positions=a[-1])[0]
    compiled(gpu, run, *arguments, launches=("kCopy",) * len(jax.tree.leaves(cache)) + ("rope_cache",))
    from pallas_kernels.deviceless import compile_for

    assert copies(compile_for(gpu, steps, *arguments).text, {a.shape for a in jax.tree.leaves(cache)}) == []


@pytest.mark.aot
@pytest.mark.parametrize(
    ("gpu", "tokens", "dtype"),
    [
        ("h100", 1, "float8_e4m3fn"),
        pytest.param("b200", 300, "float8_e4m3fn", marks=pytest.mark.slow),
        pytest.param("a100", 1, "int8", marks=pytest.mark.slow),
    ],
)
def test_a_write_into_pages_compiles(gpu, tokens, dtype):
    spec = SPECS["llama_3_1_8b"]
    shape = lambda heads: S((4, tokens, heads, spec.head_dim), jnp.float32)
    cache = jax.eval_shape(
        lambda: LayerCache.zeros(rows=256, kv_heads=spec.kv_heads, tokens=64, head_dim=spec.head_dim, dtype=dtype)
    )
    angles = S((4, tokens, spec.rotated // 2), jnp.float32)
    run = lambda *a: rope_cache(*a[:-2], rows=a[-2], positions=a[-1])
    arguments = (*map(shape, (spec.heads, spec.kv_heads, spec.kv_heads)), angles, angles, cache)
    arguments = (*arguments, S((4, 32), jnp.int32), S((4, tokens), jnp.int32))
    compiled(gpu, run, *arguments, launches=("kCopy",) * len(jax.tree.leaves(cache)) + ("rope_cache",))
