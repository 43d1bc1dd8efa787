"""attention_block and mlp_block against float64: every kind of norm, norms of q and k, without rotation, windows, soft caps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention_block import AttentionSpec, AttentionWeights, attention_block
from pallas_kernels.errors import ShapeError
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.mlp_block import MLPSpec, MLPWeights, mlp_block
from pallas_kernels.norm import KINDS, layer_norm, norm, rms_norm

B, T, D, F, N, K, H = 2, 6, 20, 28, 4, 2, 8
EPS = 1e-3  # large, so that it shows
SPEC = AttentionSpec(head_dim=H, group=N // K, scale=0.3, eps=EPS)


def normed(x, scale, bias, kind):
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    return y * (1 + scale if kind == "rms_offset" else scale) + (0 if bias is None else bias)


def turned(x, cos, sin):
    """x [B, T, heads, H] rotated by angles [B, T, R/2]; the rest of each head as it is."""
    half = cos.shape[-1]
    a, b, rest = np.split(x, [half, 2 * half], -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attended(q, k, v, spec, window):
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = slice(max(0, t - window + 1), t + 1)
        scores = spec.scale * k[b, seen, n // spec.group] @ q[b, t, n]
        if spec.soft_cap is not None:
            scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // spec.group]
    return out


def attention_truth(x, w, spec, angles=None, window=T):
    n = normed(x, w.norm, w.norm_bias, spec.norm)
    q, k, v = ((n @ matrix.T + bias).reshape(B, T, -1, H) for matrix, bias in zip(w.qkv, w.qkv_bias or (0, 0, 0), strict=True))
    if w.q_norm is not None:
        q, k = normed(q, w.q_norm, None, spec.norm), normed(k, w.k_norm, None, spec.norm)
    if angles is not None:
        q, k = turned(q, *angles), turned(k, *angles)
    out = attended(q, k, v, spec, window).reshape(B, T, -1) @ w.out.T + (0 if w.out_bias is None else w.out_bias)
    return x + out, k, v


def weights_of(rng, kind, qk_norm=False, bias=False):
    vector = lambda size: rng.normal(1, 0.3, size)
    return AttentionWeights(
        norm=vector(D),
        norm_bias=vector(D) if kind == "layer" else None,
        qkv=tuple(rng.normal(0, 0.4, (heads * H, D)) for heads in (N, K, K)),
        qkv_bias=tuple(vector(heads * H) for heads in (N, K, K)) if bias else (),
        q_norm=vector(H) if qk_norm else None,
        k_norm=vector(H) if qk_norm else None,
        out=rng.normal(0, 0.2, (D, N * H)),
        out_bias=vector(D) if bias else None,
    )


def single(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def positions_of(first, last):
    return jnp.broadcast_to(jnp.arange(first, last, dtype=jnp.int32), (B, last - first))


@pytest.mark.parametrize(
    ("kind", "qk_norm", "rotary", "window", "soft_cap"),
    [
        ("rms", False, H, None, None),
        ("rms", True, H, 3, None),
        ("rms_offset", True, H // 2, 2, 1.0),
        ("layer", False, 0, None, None),
        ("layer", True, 0, 4, 0.5),
    ],
)
def test_attention_block(rng, kind, qk_norm, rotary, window, soft_cap):
    """Whole rows, and their second half through a cache that holds the first."""
    spec = dataclasses.replace(SPEC, norm=kind, soft_cap=soft_cap)
    w = weights_of(rng, kind, qk_norm, bias=kind == "layer")
    x, turns = rng.normal(size=(B, T, D)), rng.uniform(0, 3, (B, T, rotary // 2))
    angles = (np.cos(turns), np.sin(turns)) if rotary else None
    y, k, v = attention_truth(x, w, spec, angles, T if window is None else window)
    wide = None if window is None else jnp.int32(window)
    common = {"spec": spec, "window": wide}
    found, fresh = attention_block(
        single(x), single(w), None, angles=single(angles), positions=positions_of(0, T), residual=single(x), **common
    )
    np.testing.assert_allclose(found, y, atol=5e-5)
    np.testing.assert_allclose(fresh.k, np.swapaxes(k, 1, 2), atol=5e-5)
    np.testing.assert_allclose(fresh.v, np.swapaxes(v, 1, 2), atol=5e-5)

    cut, spare = T // 2, 5
    cache = LayerCache.zeros(rows=B, kv_heads=K, tokens=T + spare, head_dim=H, dtype=jnp.float32)
    for first, last in ((0, cut), (cut, T)):
        part = slice(first, last)
        found, cache = attention_block(
            single(x[:, part]),
            single(w),
            cache,
            angles=None if angles is None else single(tuple(a[:, part] for a in angles)),
            positions=positions_of(first, last),
            residual=single(x[:, part]),
            **common,
        )
        np.testing.assert_allclose(found, y[:, part], atol=5e-5)
    np.testing.assert_allclose(cache.k[:, :, :T], fresh.k, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
def test_mlp_block(rng, kind, gated):
    vector = lambda size: rng.normal(1, 0.3, size)
    parts = 2 if gated else 1
    w = MLPWeights(
        norm=vector(D),
        norm_bias=vector(D) if kind == "layer" else None,
        up=tuple(rng.normal(0, 0.3, (F, D)) for _ in range(parts)),
        up_bias=tuple(vector(F) for _ in range(parts)),
        down=rng.normal(0, 0.2, (D, F)),
        down_bias=vector(D),
    )
    x = rng.normal(size=(B, T, D))
    parts_of = [normed(x, w.norm, w.norm_bias, kind) @ m.T + b for m, b in zip(w.up, w.up_bias, strict=True)]
    act = parts_of[0] / (1 + np.exp(-parts_of[0]))
    y = x + (act * parts_of[1] if gated else act) @ w.down.T + w.down_bias
    spec = MLPSpec(activation="silu", gated=gated, eps=EPS, norm=kind)
    np.testing.assert_allclose(mlp_block(single(x), single(w), spec=spec, residual=single(x)), y, atol=5e-5)


def test_norm_is_the_one_that_is_named(rng):
    x, scale, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 7), 7, 7))
    same = np.testing.assert_array_equal
    same(norm(x, scale, kind="rms", eps=EPS), rms_norm(x, scale, eps=EPS))
    same(norm(x, scale, kind="rms_offset", eps=EPS), rms_norm(x, scale, eps=EPS, unit_offset=True))
    same(norm(x, scale, bias, kind="layer", eps=EPS), layer_norm(x, scale, bias, eps=EPS))
    with pytest.raises(ShapeError, match="'batch' is not one of"):
        norm(x, scale, kind="batch", eps=EPS)
    with pytest.raises(ShapeError, match="'rms' has no bias"):
        norm(x, scale, bias, kind="rms", eps=EPS)


def test_refusals(rng):
    x, w = jnp.ones((B, T, D)), single(weights_of(rng, "rms"))
    run = lambda weights, spec: attention_block(x, weights, None, spec=spec, angles=None, positions=positions_of(0, T))
    with pytest.raises(ShapeError, match="'group' is not one of"):
        run(w, dataclasses.replace(SPEC, norm="group"))
    with pytest.raises(ShapeError, match="q_norm and k_norm come together"):
        run(dataclasses.replace(w, q_norm=jnp.ones(H)), SPEC)
    with pytest.raises(ShapeError, match="'group' is not one of"):
        mlp = MLPWeights(norm=jnp.ones(D), up=(jnp.ones((F, D)),), up_bias=(), down=jnp.ones((D, F)), down_bias=None)
        mlp_block(x, mlp, spec=MLPSpec(activation="relu", gated=False, eps=EPS, norm="group"))
