"""Native attention with everything that families have beside scores and a causal mask, alone and within half a layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_truth import SCALE, as_terms, terms_of, truth
from native_calls import close, in_each_way, jittable

from pallas_kernels.attention import AttentionTerms, attention
from pallas_kernels.attention_block import AttentionSpec, AttentionWeights, attention_block
from pallas_kernels.errors import BackendError, ShapeError
from pallas_kernels.layer_cache import LayerCache, cache_dtype
from pallas_kernels.mlp_block import MLPSpec, MLPWeights, mlp_block
from pallas_kernels.registry import choose


@pytest.fixture(autouse=True)
def needs_native(native): ...


# --- terms

# which of them, causal, window
TERMS = [
    ({"sinks": True}, True, 4),
    ({"slopes": True}, True, None),
    ({"relative": True, "sinks": True}, True, None),
    ({"lengths": True}, True, None),
    ({"lengths": True, "relative": True}, False, None),
    ({"lengths": True, "slopes": True, "sinks": True}, False, 7),
]
N, K, S, H = 6, 3, 300, 10
# tokens and first positions: a decode step with keys in several steps of a task, and a chunk
CALLS = [(1, (290, 5, 130)), (23, (250, 0, 120))]


@pytest.mark.parametrize(("which", "causal", "window"), TERMS)
@pytest.mark.parametrize(("T", "first"), CALLS)
def test_attention_alone(rng, native, which, causal, window, T, first):
    B = len(first)
    q = rng.normal(size=(B, T, N, H))
    k, v = rng.normal(size=(2, B, K, S, H))
    positions = (np.array(first)[:, None] + np.arange(T)).astype(np.int32)
    terms = terms_of(rng, B, N, S, **which)
    ends = terms.get("lengths", np.full(B, S))
    if causal:
        ends = np.minimum(ends, positions[:, -1] + 1)
    for b, end in enumerate(ends):
        k[b, :, end:] = v[b, :, end:] = np.nan
    want = truth(q, k, v, positions, 2.0, window, causal, **terms)
    wide = None if window is None else jnp.int32(window)

    def run(q, k, v, positions, terms):
        cache, rows = LayerCache(k=k, v=v), jnp.array([1, 2, 0], jnp.int32)
        more = {"soft_cap": 2.0, "window": wide, "terms": terms}
        return attention(q, cache, rows=rows, positions=positions, scale=SCALE, implementation="native", **more)

    shuffled = (jnp.asarray(a[[2, 0, 1]], jnp.float32) for a in (k, v))
    args = jnp.asarray(q, jnp.float32), *shuffled, positions, as_terms(causal, terms)
    for got in in_each_way(native, run, *args).values():
        close(got, want, 2e-6)


@pytest.mark.parametrize("cached", ["float16", "bfloat16", "int8", "fp8", "int4"])
def test_attention_alone_over_stored_caches(rng, native, cached):
    B, f = 2, lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    cache = LayerCache.zeros(rows=B, kv_heads=K, tokens=S, head_dim=H, dtype=cache_dtype(cached))
    S_ = cache.tokens
    cache = cache.encode_rows(f(B, K, S_, H), f(B, K, S_, H), jnp.array([200, 47]))
    run = lambda implementation: (
        lambda q, cache, positions: attention(
            q, cache, rows=None, positions=positions, scale=SCALE, implementation=implementation
        )
    )
    for T in (1, 5):
        args = f(B, T, N, H), cache, jnp.array([[200 - T], [47 - T]]) + jnp.arange(T, dtype=jnp.int32)
        want = jax.jit(run("reference"))(*args)
        sixteen = cached.endswith("16")  # in which the reference multiplies
        for got in in_each_way(native, run("native"), *args).values():
            close(got, want, 0.01 if sixteen else 4e-6)


def test_gradients_of_attention_alone(rng):
    f = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    q, k, v, sinks = f(1, 7, N, H), f(1, K, 7, H), f(1, K, 7, H), f(N)

    def loss(implementation):
        def run(q, k, v, sinks):
            more = {"terms": AttentionTerms(sinks=sinks), "implementation": implementation}
            y = attention(q, LayerCache(k=k, v=v), rows=None, positions=None, scale=SCALE, **more)
            return jnp.sum(jnp.sin(y))

        return jax.jit(jax.grad(run, argnums=(0, 1, 2, 3)))

    for got, want in zip(loss("native")(q, k, v, sinks), loss("reference")(q, k, v, sinks), strict=True):
        close(got, want, 1e-5)


def test_block_tables_take_another_path():
    facts = {"cache_format": "float32", "paged": True}
    with pytest.raises(BackendError, match="block tables"):
        choose("attention", "native", **facts)


# --- half a layer


def weights_of(f, embed, heads, kv_heads, head_dim, bias):
    sizes = [n * head_dim for n in (heads, kv_heads, kv_heads)]
    return AttentionWeights(
        norm=1 + f(embed) / 10,
        norm_bias=f(embed) / 10 if bias else None,
        qkv=tuple(f(n, embed) / embed**0.5 for n in sizes),
        qkv_bias=tuple(f(n) for n in sizes) if bias else (),
        out=f(embed, heads * head_dim) / 8,
        out_bias=f(embed) if bias else None,
    )


def angles_of(positions, half):
    angles = positions[..., None] / 100.0 ** (np.arange(half) / max(half, 1))
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


@pytest.mark.parametrize(("which", "causal", "window"), TERMS)
def test_attention_block(rng, native, which, causal, window):
    """Whole rows as an encoder reads them, and tokens through a cache; terms of other values are the same program."""
    f = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    B, T, D, G = 3, 21, 24, 2
    weights = weights_of(f, D, K * G, K, H, bias=True)
    spec = AttentionSpec(head_dim=H, group=G, scale=H**-0.5, eps=1e-5, norm="layer")
    wide = None if window is None else jnp.int32(window)

    def run(implementation):
        def block(x, cache, positions, angles, terms):
            more = {"residual": x, "window": wide, "terms": terms, "implementation": implementation}
            return attention_block(x, weights, cache, spec=spec, angles=angles, positions=positions, **more)

        return block

    cached = LayerCache(k=f(B, K, 40, H), v=f(B, K, 40, H))
    for cache, tokens, first, whole in ((None, T, 0, T), (cached, 1, 17, 40), (cached, 9, 8, 40)):
        positions = np.broadcast_to(first + np.arange(tokens, dtype=np.int32), (B, tokens))
        terms = as_terms(causal, terms_of(rng, B, K * G, whole, **which))
        args = f(B, tokens, D), cache, positions, angles_of(positions, 3), terms
        want, want_cache = jax.jit(run("reference"))(*args)
        for got, new in in_each_way(native, run("native"), *args).values():
            close(got, want, 4e-6)
            close(new.k, want_cache.k, 4e-6)
    compiled = jax.jit(run("native"))
    for _ in range(2):
        compiled(*args[:-1], as_terms(causal, terms_of(rng, B, K * G, whole, **which)))
    assert compiled._cache_size() == 1


def test_terms_change_what_they_are_for(rng):
    f = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    weights = weights_of(f, 16, 2, 2, 8, bias=False)
    spec = AttentionSpec(head_dim=8, group=1, scale=0.3, eps=1e-5)
    x, positions = f(1, 5, 16), np.arange(5, dtype=np.int32)[None]
    run = lambda terms: attention_block(
        x, weights, None, spec=spec, angles=None, positions=positions, terms=terms, implementation="native"
    )[0]
    plain = run(AttentionTerms())
    for terms in (
        AttentionTerms(causal=False),
        AttentionTerms(lengths=jnp.array([2])),
        AttentionTerms(sinks=f(2)),
        AttentionTerms(slopes=jnp.array([0.5, 0.25])),
        AttentionTerms(relative=f(2, 5)),
    ):
        assert np.abs(run(terms) - plain).max() > 1e-3
    with pytest.raises(ShapeError, match=r"slopes must be \[2\]"):
        run(AttentionTerms(slopes=jnp.ones(3)))
    with pytest.raises(ShapeError, match="integer attention is causal"):
        integer = dataclasses.replace(spec, integer=True)
        attention_block(x, weights, None, spec=integer, angles=None, positions=positions, terms=AttentionTerms(causal=False))


@pytest.mark.parametrize("norms", [1, 2])
def test_parallel_residual(rng, native, norms):
    """x + attention(n(x)) + mlp(m(x)) in the shape of GPT-NeoX and Falcon: layer norms, partial rotary, biases, heads of 80; m may be n."""
    f = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    B, D, heads, head_dim = 2, 160, 2, 80
    weights = weights_of(f, D, heads, heads, head_dim, bias=True)
    mlp = MLPWeights(
        norm=weights.norm if norms == 1 else 1 + f(D) / 10,
        norm_bias=weights.norm_bias if norms == 1 else f(D) / 10,
        up=(f(4 * D, D) / D**0.5,),
        up_bias=(f(4 * D),),
        down=f(D, 4 * D) / 25,
        down_bias=f(D),
    )
    spec = AttentionSpec(head_dim=head_dim, group=1, scale=head_dim**-0.5, eps=1e-5, norm="layer")
    shape = MLPSpec(activation="gelu", gated=False, eps=1e-5, norm="layer")

    def layer(implementation):
        def run(x, cache, positions, angles):
            here = {"implementation": implementation}
            y, cache = attention_block(x, weights, cache, spec=spec, angles=angles, positions=positions, residual=x, **here)
            return mlp_block(x, mlp, spec=shape, residual=y, **here), cache

        return run

    def plain(x):  # the sum as it is written, from the small operations
        parts = layer("reference")
        y = attention_block(x, weights, None, spec=spec, angles=angles, positions=positions, implementation="reference")[0]
        z = mlp_block(x, mlp, spec=shape, implementation="reference")
        close(x + y + z, parts(x, None, positions, angles)[0], 1e-6)
        return x + y + z

    T = 12
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    angles = angles_of(positions, head_dim // 8)
    x = f(B, T, D)
    want = plain(x)
    for got, _ in in_each_way(native, layer("native"), x, None, positions, angles).values():
        close(got, want, 4e-6)
    cache = LayerCache.zeros(rows=B, kv_heads=heads, tokens=T, head_dim=head_dim, dtype=jnp.float32)
    for first, end in ((0, 7), (7, 11), (11, T)):
        part = tuple(a[:, first:end] for a in angles)
        got, cache = jittable(layer("native"))(x[:, first:end], cache, positions[:, first:end], part)
        close(got, want[:, first:end], 4e-6)
