"""Hopper's attention kernel: interpreted with a watch for races against float64, and compiled for an H100 that is not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_truth import SCALE, as_terms, truth
from kernel_checks import ON_GPU, close, kernels

from pallas_kernels.attention import AttentionTerms, attention
from pallas_kernels.deviceless import compile_for
from pallas_kernels.errors import BackendError
from pallas_kernels.gpus import GPUS
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.registry import choose
from pallas_kernels.rope_cache.specs import SPECS
from pallas_kernels.target import Target, current_target
from pallas_kernels.tuning import tiles

pytestmark = pytest.mark.skipif(
    ON_GPU and (current_target().capability or (0,))[0] != 9, reason="the GPU here has not Hopper's instructions"
)
S = jax.ShapeDtypeStruct


def arrays(rng, B, T, N, K, H, tokens, dtype):
    """q, keys and values, rounded as the kernel rounds them, as float64."""
    q, k, v = (rng.normal(size=shape) for shape in ((B, T, N, H), (B, K, tokens, H), (B, K, tokens, H)))
    return tuple(np.asarray(jnp.asarray(a, dtype), np.float64) for a in (q, k, v))


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("sizes", "dtype", "starts", "options", "tile"),
    [
        # queries behind a prefix; steps of keys that are left out, seen whole and masked; a cache that no step divides
        ((1, 70, 2, 1, 64, 330), "bfloat16", (190,), {"window": 200, "soft_cap": 3.0}, {"stages": 2}),
        slow((2, 70, 2, 2, 64, 128), "float16", (0, 58), {"rows": (1, 0), "lengths": (128, 0)}, {}),
        slow((2, 64, 2, 1, 128, 128), "bfloat16", (0, 0), {"causal": False, "lengths": (77, 1)}, {"keys": 64}),
        slow((1, 200, 1, 1, 64, 256), "bfloat16", (3,), {"causal": False, "window": 20}, {"keys": 64}),
        slow((1, 128, 4, 2, 128, 256), "bfloat16", (128,), {}, {}),
        slow((1, 64, 1, 1, 256, 64), "bfloat16", (0,), {}, {}),
    ],
)
def test_queries(rng, races, sizes, dtype, starts, options, tile):
    B, T = sizes[:2]
    options = dict(options)
    q, k, v = arrays(rng, *sizes, dtype)
    positions = np.asarray(starts)[:, None] + np.arange(T)
    causal, lengths = options.get("causal", True), options.get("lengths")
    given = {} if lengths is None else {"lengths": np.asarray(lengths)}
    wanted = truth(q, k, v, positions, window=options.get("window"), causal=causal, soft_cap=options.get("soft_cap"), **given)
    place = np.asarray(options.get("rows", range(B)))
    stored = LayerCache(**{n: jnp.zeros(a.shape, dtype).at[place].set(jnp.asarray(a, dtype)) for n, a in (("k", k), ("v", v))})
    window = options.get("window")
    run = functools.partial(
        attention,
        rows=jnp.asarray(place, jnp.int32) if "rows" in options else None,
        positions=jnp.asarray(positions, jnp.int32),
        scale=SCALE,
        soft_cap=options.get("soft_cap"),
        window=None if window is None else jnp.int32(window),
        terms=as_terms(causal, given),
        implementation="mosaic",
    )
    with kernels(), tiles({"attention_mosaic": tile}):
        found = jax.jit(run)(jnp.asarray(q, jnp.float32), stored)
    if not ON_GPU:
        assert not races()
    assert found.dtype == jnp.float32
    close(found, wanted, 1e-2)
    if lengths is not None:
        assert not np.asarray(found)[np.asarray(lengths) == 0].any()


@pytest.mark.slow
def test_its_gradient(rng):
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in arrays(rng, 1, 64, 1, 1, 64, 64, "bfloat16"))

    def loss(q, k, v, name):
        out = attention(q, LayerCache(k=k, v=v), rows=None, positions=None, scale=0.2, implementation=name)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with kernels():
        found = jax.grad(loss, (0, 1, 2))(q, k, v, "mosaic")
    close(found, jax.grad(loss, (0, 1, 2))(q, k, v, "reference"), 2e-2)


def test_it_is_offered_on_hopper_only(rng):
    known = {"shape": (1, 512, 32, 128), "kv_heads": 8, "tokens": 512, "cache_dtype": "bfloat16", "soft_cap": None}
    known |= {"windowed": False, "paged": False, "gathered": False, "numbered": True, "causal": True, "terms": ()}
    hopper = Target(platform="gpu", device_kind=GPUS["h100"].device_kind)
    assert choose("attention", "mosaic", hopper, **known).name == "mosaic"
    assert choose("attention", target=hopper, **known).name == "pallas"  # it is asked for by name
    for name in ("a100", "b200"):
        with pytest.raises(BackendError, match=r"those of Hopper, compute capability 9.0, not of NVIDIA"):
            choose("attention", "mosaic", Target(platform="gpu", device_kind=GPUS[name].device_kind), **known)
    for facts, reason in (
        ({"shape": (1, 8, 32, 128)}, "64 queries of a sequence or more, not 8"),
        ({"shape": (1, 0, 32, 128)}, "nothing to attend"),
        ({"shape": (1, 512, 32, 80)}, "not of 80"),
        ({"cache_dtype": "int8"}, "not in int8"),
        ({"paged": True}, "block tables"),
        ({"terms": ("lengths", "sinks")}, "does not take sinks"),
    ):
        with pytest.raises(BackendError, match=reason):
            choose("attention", "mosaic", hopper, **(known | facts))
    q, keys = jnp.ones((1, 64, 1, 64)), jnp.ones((1, 1, 64, 64), jnp.bfloat16)
    for wish in ({"keys": 96}, {"stages": 1}, {"keys": 512, "stages": 4}):
        with kernels(), tiles({"attention_mosaic": wish}), pytest.raises(BackendError, match="a step has multiples of 64 keys"):
            attention(q, LayerCache(k=keys, v=keys), rows=None, positions=None, scale=1.0, implementation="mosaic")


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "dtype", "windowed", "lengths"),
    [("llama_3_1_8b", "bfloat16", False, False)]
    + [
        slow(name, dtype, windowed, dtype == "bfloat16")
        for name, spec in SPECS.items()
        if spec.head_dim % 64 == 0
        for dtype in ("bfloat16", "float16")
        for windowed in (False, True)
    ],
)
def test_compiles_for_hopper(name, dtype, windowed, lengths, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    spec = SPECS[name]
    q, keys = S((2, 1000, spec.heads, spec.head_dim), jnp.float32), S((2, spec.kv_heads, 2048, spec.head_dim), dtype)

    def run(q, k, v, positions, window, lengths_):
        terms = AttentionTerms(lengths=lengths_ if lengths else None)
        given = {"window": window if windowed else None, "soft_cap": spec.soft_cap, "scale": 0.1, "terms": terms}
        out_dtype = jnp.float32 if lengths else dtype
        cache = LayerCache(k=k, v=v)
        return attention(q, cache, rows=None, positions=positions, **given, out_dtype=out_dtype, implementation="mosaic")

    number = S((2, 1000), jnp.int32)
    found = compile_for("h100", run, q, keys, keys, number, S((), jnp.int32), S((2,), jnp.int32))
    assert found.launches.count("kCustomCall") == 1
    (ptx,), (report,) = (list(tmp_path.glob(f"*.{kind}")) for kind in ("ptx", "ptxas"))
    text = ptx.read_text()
    assert "wgmma.mma_async.sync.aligned.m64n" in text and "cp.async.bulk.tensor" in text and "ld.local" not in text
    assert "0 bytes spill stores, 0 bytes spill loads" in report.read_text()
