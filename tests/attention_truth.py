"""What attention means, one query at a time in float64, and random terms to test it with."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import AttentionTerms

SCALE = 0.4


def truth(q, k, v, positions, soft_cap=None, window=None, causal=True, lengths=None, sinks=None, slopes=None, relative=None):
    """One query at a time, in float64, over the keys that it sees and no others."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[1]
    for b, t, n in np.ndindex(q.shape[:3]):
        p = positions[b, t]
        keys = np.arange(k.shape[2] if lengths is None else lengths[b])
        if causal:
            keys = keys[keys <= p]
        if window is not None:
            keys = keys[np.abs(p - keys) < window]
        scores = SCALE * k[b, n // group, keys] @ q[b, t, n]
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        if slopes is not None:
            scores = scores - slopes[n] * np.abs(p - keys)
        if relative is not None:
            reach = relative.shape[1] // 2
            scores = scores + relative[n, np.clip(keys - p, -reach, reach) + reach]
        if sinks is not None:
            scores = np.append(scores, sinks[n])
        if scores.size:
            weights = np.exp(scores - scores.max())
            out[b, t, n] = (weights / weights.sum())[: keys.size] @ v[b, n // group, keys]
    return out


def terms_of(rng, batch, heads, tokens, **which):
    """Numpy arrays of terms, those that are asked for."""
    drawn = {
        "lengths": np.array([tokens, tokens // 3, 0][:batch], np.int32),
        "sinks": rng.normal(size=heads),
        "slopes": np.abs(rng.normal(size=heads)) / 4,
        "relative": rng.normal(size=(heads, 7)),
    }
    return {name: drawn[name] for name in which if which[name]}


def as_terms(causal, given) -> AttentionTerms:
    """The same in JAX's arrays."""
    arrays = {name: jnp.asarray(a, jnp.int32 if name == "lengths" else jnp.float32) for name, a in given.items()}
    return AttentionTerms(causal=causal, **arrays)
