"""attention through cuDNN: what it refuses, what it asks of JAX, checked with JAX's own formula in the library's place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_truth import SCALE, as_terms, truth
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from kernel_checks import close

from pallas_kernels.attention import AttentionTerms, attention
from pallas_kernels.deviceless import compile_for, lower_for
from pallas_kernels.errors import BackendError
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.registry import choose
from pallas_kernels.target import Target

GPU = Target(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
OLD = Target(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")
FACTS = {
    "shape": (1, 8, 4, 128),
    "tokens": 8,
    "cache_dtype": "bfloat16",
    "soft_cap": None,
    "windowed": False,
    "paged": False,
    "gathered": False,
    "numbered": True,
    "causal": True,
    "terms": ("lengths",),
}


def test_it_is_taken_only_by_name():
    assert choose("attention", target=GPU, **FACTS).name == "pallas"
    assert choose("attention", "cudnn", GPU, **FACTS).name == "cudnn"


@pytest.mark.parametrize(
    ("facts", "target", "reason"),
    [
        ({}, Target(platform="cpu", device_kind="cpu"), "made for gpu"),
        ({"shape": (1, 8, 4, 256)}, OLD, "at most 128"),
        ({"shape": (1, 8, 4, 20)}, GPU, "multiple of 8, not of 20"),
        ({"cache_dtype": "int8"}, GPU, "not in int8"),
        ({"soft_cap": 30.0, "windowed": True}, GPU, "a soft cap, a window that is an array"),
        ({"paged": True}, GPU, "block tables"),
        ({"numbered": False}, GPU, r"positions=None"),
        ({"terms": ("lengths", "sinks")}, GPU, "take sinks"),
    ],
)
def test_what_it_cannot_do_is_refused_and_not_replaced(facts, target, reason):
    with pytest.raises(BackendError, match=reason):
        choose("attention", "cudnn", target, **{**FACTS, **facts})


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_asked_of_jax(rng, monkeypatch, causal):
    """Its formula computes what the operation means from the same arguments; a sequence without keys gives 0."""
    B, T, N, K, H = 3, 9, 4, 2, 16
    q, k, v = (rng.normal(size=(B, n, T, H)) for n in (N, K, K))
    q, lengths = np.swapaxes(q, 1, 2), np.array([9, 4, 0])
    half = lambda a: jnp.asarray(a, jnp.bfloat16)
    exact = lambda a: np.asarray(half(a), np.float64)
    positions = np.broadcast_to(np.arange(T), (B, T))
    wanted = truth(exact(q), exact(k), exact(v), positions, causal=causal, lengths=lengths)

    def stand_in(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return jax_attention(*args, implementation="xla", **kwargs)

    jax_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr("pallas_kernels.registry.current_target", lambda: GPU)
    found = attention(
        half(q),
        LayerCache(k=half(k), v=half(v)),
        rows=None,
        positions=None,
        scale=SCALE,
        terms=as_terms(causal, {"lengths": lengths}),
        implementation="cudnn",
    )
    assert found.dtype == jnp.float32
    close(found, wanted, 1e-2)


@pytest.mark.aot
def test_a_program_calls_it(monkeypatch):
    """Compiled for a GPU that is not here; what the library makes of its part does not show."""
    run = functools.partial(attention, rows=None, positions=None, scale=SCALE, implementation="cudnn")
    q, cache = (
        jnp.ones((1, 16, 4, 64), jnp.bfloat16),
        LayerCache.zeros(rows=1, kv_heads=2, tokens=16, head_dim=64, dtype="bfloat16"),
    )
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (q, cache))
    grad = jax.grad(lambda q, cache: run(q, cache, terms=AttentionTerms()).sum())
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    text = lower_for("h100", grad, *shapes).as_text()
    assert text.count("__cudnn$fmhaSoftmax") == 2  # forward and backward
    launches = compile_for("h100", run, *shapes).launches
    assert launches.count("kCuDnn") == 1 and launches.count("wrapped_transpose") == 2  # of keys and values

    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(cudnn, "check_cudnn_version", missing)
    with pytest.raises(BackendError, match="cuDNN is not detected"):
        lower_for("h100", run, *shapes)
