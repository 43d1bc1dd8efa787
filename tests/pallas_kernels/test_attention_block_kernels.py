"""attention_block made of GPU kernels against its reference: with a cache and without, its gradient, and a small model's greedy tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import close, kernels

from pallas_kernels.attention_block import AttentionSpec, AttentionWeights, attention_block
from pallas_kernels.layer_cache import LayerCache

B, D, K, G, H = 2, 24, 2, 2, 8
ROWS = (G + 2) * K * H


def weights(rng, kind: str, full: bool) -> AttentionWeights:
    draw = lambda *shape, scale=0.3: jnp.asarray(rng.normal(0, scale, shape), jnp.float32)
    return AttentionWeights(
        norm=1 + draw(D),
        norm_bias=draw(D) if kind == "layer" else None,
        qkv=(draw(ROWS, D),) if full else (draw(G * K * H, D), draw(K * H, D), draw(K * H, D)),
        qkv_bias=(draw(ROWS),) if full else (),
        q_norm=1 + draw(H) if full else None,
        k_norm=1 + draw(H) if full else None,
        out=draw(D, G * K * H),
        out_bias=draw(D) if full else None,
    )


def arguments(rng, kind: str, full: bool, T: int, first: int):
    spec = AttentionSpec(head_dim=H, group=G, scale=0.3, eps=1e-5, norm=kind, soft_cap=2.0 if full else None)
    angle = rng.normal(size=(B, T, H // 2))
    return {
        "spec": spec,
        "angles": (jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)) if full else None,
        "positions": jnp.broadcast_to(first + jnp.arange(T, dtype=jnp.int32), (B, T)),
        "window": jnp.int32(3) if full else None,
    }


@pytest.mark.parametrize(
    ("kind", "full", "T", "dtype"),
    [
        pytest.param("rms_offset", True, 1, "int8", marks=pytest.mark.slow),
        pytest.param("rms", True, 1, "float8_e4m3fn", marks=pytest.mark.slow),
        ("layer", False, 5, "float32"),
    ],
)
def test_with_a_cache(rng, kind, full, T, dtype):
    w, given = weights(rng, kind, full), arguments(rng, kind, full, T, 4)
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    shape = {"rows": B + 1, "kv_heads": K, "tokens": 11, "head_dim": H}
    cache = LayerCache.zeros(**shape, dtype=dtype)
    if dtype == "float32":
        cache = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), cache)
    call = functools.partial(attention_block, rows=jnp.array([2, 0], jnp.int32), residual=x, **given)
    with kernels():
        found = jax.jit(functools.partial(call, implementation="pallas"))(x, w, cache)
    wanted = call(x, w, cache, implementation="reference")
    # a level of a key may round to its neighbour
    close(found[0], wanted[0], 1e-5 if dtype == "float32" else 1e-2)
    steps = np.abs(np.asarray(found[1].k, np.float32) - np.asarray(wanted[1].k, np.float32))
    assert steps.max() <= {"float32": 1e-5, "int8": 1, "float8_e4m3fn": 32}[dtype]


def test_without_one_and_its_gradient(rng):
    w, given = weights(rng, "rms", True), arguments(rng, "rms", True, 4, 0)
    x = jnp.asarray(rng.normal(size=(B, 4, D)), jnp.float32)

    def loss(name, x, w):
        y, cache = attention_block(x, w, None, residual=x, **given, implementation=name)
        return (y**2).sum() + cache.v.sum(), (y, cache)

    run = lambda name: jax.jit(jax.value_and_grad(functools.partial(loss, name), argnums=(0, 1), has_aux=True))(x, w)
    with kernels():
        found = run("pallas")
    close(found, run("reference"), 1e-4)


def test_one_shard_of_two_leads(rng):
    """Partial sums of shards, the residual and the output's bias in one of them; the same program whoever leads."""
    w, given = weights(rng, "rms", True), arguments(rng, "rms", True, 4, 0)
    x = jnp.asarray(rng.normal(size=(B, 4, D)), jnp.float32)

    def both(name):
        part = jax.jit(lambda lead: attention_block(x, w, None, residual=x, lead=lead, **given, implementation=name)[0])
        return part(jnp.array(True)), part(jnp.array(False))

    with kernels():
        found = both("pallas")
    wanted = both("reference")
    close(found, wanted, 1e-5)
    close(wanted[0] - wanted[1], x + w.out_bias, 1e-5)


def test_a_fresh_cache_of_fewer_bits(rng):
    """It holds what a cache of that dtype would, and its rounded keys are attended."""
    w, given = weights(rng, "rms", False), arguments(rng, "rms", False, 5, 0)
    given["spec"] = dataclasses.replace(given["spec"], fresh="bfloat16")
    x = jnp.asarray(rng.normal(size=(B, 5, D)), jnp.float32)
    with kernels():
        y, fresh = jax.jit(functools.partial(attention_block, implementation="pallas", **given))(x, w, None)
    assert fresh.k.dtype == fresh.v.dtype == jnp.bfloat16
    cache = LayerCache.zeros(rows=B, kv_heads=K, tokens=5, head_dim=H, dtype=jnp.bfloat16)
    wanted = attention_block(x, w, cache, **given, implementation="reference")
    close((y, fresh), wanted, 1e-2)
