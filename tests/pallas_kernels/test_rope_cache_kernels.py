"""The GPU kernel of rotation and cache write: interpreted against the reference, and compiled for three generations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import copies
from kernel_checks import GPU_NAMES, close, compiled, kernels

from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.rope_cache import rope, rope_cache
from pallas_kernels.rope_cache.specs import SPECS

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
        assert np.abs(steps).max() <= (1 if dtype == "int8" else 2e-2 if dtype == "bfloat16" else 1e-6)
        assert (steps != 0).mean() < 0.05
    close((found[1].k_scale, found[1].v_scale), (wanted[1].k_scale, wanted[1].v_scale), 1e-6)


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
