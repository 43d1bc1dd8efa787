"""The GPU kernels of attention: interpreted against the reference, unused keys poisoned, and compiled for three generations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_truth import SCALE, as_terms, terms_of, truth
from kernel_checks import GPU_NAMES, close, compiled, kernels

from pallas_kernels.attention import AttentionTerms, attention
from pallas_kernels.deviceless import compile_for
from pallas_kernels.errors import BackendError
from pallas_kernels.gpus import GPUS
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.registry import using
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
        pytest.param((2, 1, 6, 3, 8, 70), "float32", (0, 69), {}, {"keys": 16, "splits": 2}, marks=pytest.mark.slow),
        ((2, 1, 6, 3, 8, 70), "float32", (33, 65), {"window": 5, "soft_cap": 1.5}, {"keys": 16, "splits": 4}),
        ((2, 3, 4, 1, 20, 50), "bfloat16", (7, 40), {"window": NEVER}, {"keys": 32, "splits": 1}),
        ((3, 1, 2, 2, 16, 33), "int8", (31, 2, 16), {"soft_cap": 3.0, "rows": (2, 0, 1)}, {"keys": 16, "splits": 2}),
        pytest.param((1, 4, 8, 1, 16, 40), "float16", (11,), {"window": 3}, {}, marks=pytest.mark.slow),
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


EVERY = {"lengths": True, "sinks": True, "slopes": True, "relative": True}


@pytest.mark.parametrize(
    ("sizes", "starts", "causal", "window", "which", "tile"),
    [
        ((3, 1, 6, 3, 8, 70), (0, 69, 33), True, None, EVERY, {"keys": 16, "splits": 4}),
        pytest.param(
            (3, 2, 4, 1, 20, 50),
            (7, 40, 3),
            True,
            9,
            {"sinks": True, "slopes": True},
            {"keys": 16, "splits": 2},
            marks=pytest.mark.slow,
        ),
        ((3, 37, 4, 2, 8, 60), (0, 20, 5), True, None, EVERY, {"queries": 16, "keys": 16}),
        ((3, 23, 3, 1, 20, 40), (0, 3, 9), False, None, EVERY, {"queries": 16, "keys": 16}),
        pytest.param(
            (2, 23, 3, 1, 16, 40),
            (0, 3),
            False,
            4,
            {"lengths": True, "relative": True},
            {"queries": 32, "keys": 16},
            marks=pytest.mark.slow,
        ),
        pytest.param((1, 33, 2, 1, 16, 70), (0,), False, None, {}, {"queries": 32, "keys": 16}, marks=pytest.mark.slow),
    ],
)
def test_terms(rng, sizes, starts, causal, window, which, tile):
    B, T, N, K, H, tokens = sizes
    q = rng.normal(size=(B, T, N, H)) * 2
    k, v = rng.normal(size=(2, B, K, tokens, H))
    given = terms_of(rng, B, N, tokens, **which)
    positions = np.asarray(starts)[:, None] + np.arange(T)
    wanted = truth(q, k, v, positions, window=window, causal=causal, **given)
    ends = given.get("lengths", np.full(B, tokens))
    for b, end in enumerate(np.minimum(ends, positions.max(1) + 1) if causal else ends):
        k[b, :, end:] = v[b, :, end:] = np.nan
    q, k, v = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
    with kernels(), tiles({"attention": {"splits": 1} | tile}):
        run = functools.partial(attention, rows=None, scale=SCALE, implementation="pallas")
        wide = None if window is None else jnp.int32(window)
        found = jax.jit(run)(
            q,
            LayerCache(k=k, v=v),
            positions=jnp.asarray(positions, jnp.int32),
            window=wide,
            terms=as_terms(causal, given),
        )
    close(found, wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "dtype", "tile"),
    [(1, "int8", {"splits": 4}), (40, "float32", {"queries": 32, "splits": 1})],
)
def test_pages_are_read_in_the_order_of_a_table(rng, T, dtype, tile):
    """Three sequences, eight pages of 16 tokens each; pages of no table are poisoned."""
    q, _, cache, positions = case(rng, 3, T, 4, 2, 8, 64, dtype, (0, 63 - T, 9))
    wanted = attention(q, cache, rows=None, positions=positions, scale=SCALE, implementation="reference")
    order = rng.permutation(24)
    table = jnp.asarray(order[:12].reshape(3, 4), jnp.int32)

    def paged(a):
        pages = jnp.moveaxis(a.reshape(*a.shape[:2], 4, 16, *a.shape[3:]), 2, 1).reshape(12, a.shape[1], 16, *a.shape[3:])
        whole = jnp.full((24, *pages.shape[1:]), 127 if a.dtype == jnp.int8 else jnp.nan, a.dtype)
        return whole.at[order[:12]].set(pages)

    with kernels(), tiles({"attention": tile | {"keys": 32}}):  # a step ends with its page all the same
        run = functools.partial(attention, scale=SCALE, implementation="pallas")
        found = jax.jit(run)(q, jax.tree.map(paged, cache), rows=table, positions=positions)
    close(found, wanted, 1e-5 if dtype == "float32" else 1e-4)


def test_an_fp8_cache_is_read_as_it_is(rng):
    q, _, cache, positions = case(rng, 2, 1, 4, 2, 16, 40, "float32", (39, 7))
    to = lambda a: a.astype(jnp.float8_e4m3fn)
    scale = jnp.asarray(rng.uniform(0.5, 2, (2, 2, 40)), jnp.float32)
    cache = LayerCache(k=to(cache.k), v=to(cache.v), k_scale=scale, v_scale=scale)
    with kernels():
        found = jax.jit(functools.partial(attention, rows=None, scale=SCALE, implementation="pallas"))(
            q, cache, positions=positions
        )
    close(found, attention(q, cache, rows=None, positions=positions, scale=SCALE, implementation="reference"), 1e-4)


@pytest.mark.parametrize(
    ("sizes", "starts", "causal", "window", "soft_cap", "which", "dtype"),
    [
        pytest.param((1, 2, 2, 1, 8, 20), (9,), True, None, None, {}, "float32", marks=pytest.mark.slow),
        ((2, 21, 4, 2, 20, 40), (0, 19), True, 6, 1.5, {"slopes": True}, "float32"),
        pytest.param(
            (2, 21, 4, 2, 8, 40),
            (0, -3),
            True,
            None,
            None,
            {"sinks": True, "relative": True},
            "float32",
            marks=pytest.mark.slow,
        ),
        ((2, 21, 4, 2, 16, 40), (0, 5), False, None, None, EVERY, "float32"),
        pytest.param(
            (2, 21, 2, 2, 8, 40), (0, 5), False, 4, None, {"lengths": True, "relative": True}, "float32", marks=pytest.mark.slow
        ),
        pytest.param((2, 21, 4, 2, 16, 40), (3, 0), True, None, None, {}, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_gradients(rng, sizes, starts, causal, window, soft_cap, which, dtype):
    q, _, cache, positions = case(rng, *sizes, dtype, starts)
    B, T, N, _, H, tokens = sizes
    terms = as_terms(causal, terms_of(rng, B, N, tokens, **which))
    weights = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)

    def loss(name, given):
        q, k, v, floats = given
        out = attention(
            q,
            LayerCache(k=k, v=v),
            rows=None,
            positions=positions,
            scale=SCALE,
            soft_cap=soft_cap,
            window=None if window is None else jnp.int32(window),
            terms=AttentionTerms(causal=causal, lengths=terms.lengths, **floats),
            implementation=name,
        )
        return (out * weights).sum()

    given = (q, cache.k, cache.v, {name: getattr(terms, name) for name in terms.given if name != "lengths"})
    small = {"queries": 16, "keys": 16}
    with kernels(), tiles({"attention": small, "attention_backward": small}):
        found = jax.jit(jax.grad(functools.partial(loss, "pallas")))(given)
    close(found, jax.jit(jax.grad(functools.partial(loss, "reference")))(given), 1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.slow
def test_gradients_through_rows_pages_and_scales(rng):
    """Keys and values that were gathered or scaled get theirs by the transpose of that."""
    q, _, cache, positions = case(rng, 2, 3, 4, 2, 8, 48, "int8", (9, 40))
    paged = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(2, 2, 3, 16, *a.shape[3:]), 2, 1).reshape(6, 2, 16, *a.shape[3:]), cache
    )
    for given, rows in ((cache, jnp.array([1, 0])), (paged, jnp.array([[0, 1, 2], [3, 4, 5]]))):

        def loss(name, q, scale, given=given, rows=rows):
            own = LayerCache(k=given.k, v=given.v, k_scale=scale, v_scale=given.v_scale)
            return jnp.sin(attention(q, own, rows=rows, positions=positions, scale=SCALE, implementation=name)).sum()

        with kernels():
            found = jax.jit(jax.grad(functools.partial(loss, "pallas"), (0, 1)))(q, given.k_scale)
        close(found, jax.grad(functools.partial(loss, "reference"), (0, 1))(q, given.k_scale), 1e-3)


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
        pytest.param(
            (2, 40, 4, 2, 16, 48), "bfloat16", (0, 3), {"soft_cap": 2.0}, {"queries": 64, "keys": 32}, marks=pytest.mark.slow
        ),
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


def program(spec, B, T, tokens, dtype, windowed=True):
    cache = jax.eval_shape(
        lambda: LayerCache.zeros(rows=B, kv_heads=spec.kv_heads, tokens=tokens, head_dim=spec.head_dim, dtype=dtype)
    )

    def run(q, cache, positions, window=None):
        return attention(q, cache, rows=None, positions=positions, scale=0.1, soft_cap=spec.soft_cap, window=window)

    args = S((B, T, spec.heads, spec.head_dim), jnp.float32), cache, S((B, T), jnp.int32)
    return run, *args, *([S((), jnp.int32)] if windowed else [])


@pytest.mark.aot
@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize(
    ("name", "B", "T", "dtype"),
    [
        ("llama_3_1_8b", 1, 1, "bfloat16"),
        pytest.param("llama_3_1_8b", 1, 8, "bfloat16", marks=pytest.mark.slow),
        pytest.param("llama_3_1_8b", 4, 8, "int8", marks=pytest.mark.slow),
        pytest.param("llama_2_7b", 4, 1, "float16", marks=pytest.mark.slow),
        pytest.param("gemma_2_9b", 1, 4, "float32", marks=pytest.mark.slow),
        pytest.param("odd", 2, 3, "float32", marks=pytest.mark.slow),
    ],
)
def test_few_queries_compile(gpu, name, B, T, dtype):
    # 4 sequences of 32 heads fill an A100 without cutting any of them
    parts = ("decode_attention",) if (name, gpu) == ("llama_2_7b", "a100") else ("decode_attention", "decode_reduce")
    found = compiled(gpu, *program(SPECS[name], B, T, 8192, dtype), launches=parts)
    by_name = {kernel.name: kernel for kernel in found.kernels}
    if dtype != "float32":
        assert by_name["decode_attention"].tensor_cores
    if name != "odd":
        assert by_name["decode_attention"].widest_load == 16


@pytest.mark.aot
@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize(
    ("name", "T", "dtype"),
    [
        ("llama_3_1_8b", 2048, "bfloat16"),
        pytest.param("llama_3_1_8b", 512, "float32", marks=pytest.mark.slow),
        pytest.param("gemma_2_9b", 512, "float32", marks=pytest.mark.slow),
        pytest.param("phi_3_mini", 512, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_many_queries_compile(gpu, name, T, dtype):
    found = compiled(gpu, *program(SPECS[name], 1, T, 2048, dtype, windowed=False), launches=("prefill_attention",))
    if dtype != "float32":
        assert found.kernels[0].tensor_cores


def compiled_kernels(gpu, run, *args):
    """The attention kernels of a program that has others too, by name; none of them spills."""
    found = {kernel.name: kernel for kernel in compile_for(gpu, run, *args).kernels if "attention" in kernel.name}
    for kernel in found.values():
        assert kernel.spilled == 0 and kernel.registers * kernel.threads <= 65536, kernel
        assert kernel.shared <= GPUS[gpu].shared, kernel
    return found


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "T", "dtype", "which", "causal", "gpu"),
    [("llama_3_1_8b", 2048, "bfloat16", (), True, "h100")]
    + [
        pytest.param(*case, gpu, marks=pytest.mark.slow)
        for gpu in GPU_NAMES
        for case in (
            ("llama_3_1_8b", 512, "bfloat16", ("sinks", "slopes"), True),
            ("smollm2_135m", 512, "bfloat16", ("lengths", "relative"), False),
            ("odd", 33, "float16", ("sinks", "relative"), True),
        )
    ],
)
def test_gradients_compile(name, T, dtype, which, causal, gpu):
    spec = SPECS[name]
    shapes = {"lengths": (1,), "sinks": (spec.heads,), "slopes": (spec.heads,), "relative": (spec.heads, 257)}
    given = {n: S(shapes[n], jnp.int32 if n == "lengths" else jnp.float32) for n in which}

    def run(q, k, v, given):
        cache, terms = LayerCache(k=k, v=v), AttentionTerms(causal=causal, **given)
        return attention(q, cache, rows=None, positions=None, scale=0.1, soft_cap=spec.soft_cap, terms=terms).sum()

    keys = S((1, spec.kv_heads, T, spec.head_dim), dtype)
    found = compiled_kernels(
        gpu, jax.grad(run, (0, 1, 2)), S((1, T, spec.heads, spec.head_dim), jnp.float32), keys, keys, given
    )
    assert set(found) == {"prefill_attention", "attention_dq", "attention_dkv"}
    if dtype != "float32":
        assert all(kernel.tensor_cores for kernel in found.values())


@pytest.mark.aot
@pytest.mark.parametrize(
    ("gpu", "T", "tokens", "dtype"),
    [
        ("h100", 1, 64, "float8_e4m3fn"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("b200", 4, None, "float8_e4m3fn"),
                ("h100", 1, None, "float8_e4m3fn"),
                ("h100", 512, None, "float8_e4m3fn"),
                ("b200", 512, 64, "float8_e4m3fn"),
                ("a100", 1, 32, "int8"),
                ("b200", 4, 16, "int8"),
                ("a100", 512, 128, "int8"),
            )
        ),
    ],
)
def test_pages_and_8_bits_compile(gpu, T, tokens, dtype):
    """Four sequences; tokens: of a page, None for a row each."""
    spec = SPECS["llama_3_1_8b"]
    rows, of_page = (4, 8192) if tokens is None else (4 * 8192 // tokens, tokens)
    cache = jax.eval_shape(
        lambda: LayerCache.zeros(rows=rows, kv_heads=spec.kv_heads, tokens=of_page, head_dim=spec.head_dim, dtype=dtype)
    )
    tables = None if tokens is None else S((4, 8192 // tokens), jnp.int32)
    run = lambda q, cache, positions, tables: attention(q, cache, rows=tables, positions=positions, scale=0.1)
    few = ("decode_attention", "decode_reduce")
    q = S((4, T, spec.heads, spec.head_dim), jnp.float32)
    found = compiled(gpu, run, q, cache, S((4, T), jnp.int32), tables, launches=few if T <= 16 else ("prefill_attention",))
    own = next(kernel for kernel in found.kernels if kernel.name in (few[0], "prefill_attention"))
    assert own.tensor_cores and own.widest_load == 16


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPU_NAMES)
@pytest.mark.parametrize(
    ("T", "causal", "paged"),
    [
        (1, True, True),
        (512, True, True),
        (512, False, False),
    ],
)
def test_everything_at_once_compiles(gpu, T, causal, paged):
    spec = SPECS["llama_3_1_8b"]
    shapes = {"lengths": (4,), "sinks": (spec.heads,), "slopes": (spec.heads,), "relative": (spec.heads, 257)}
    given = {n: S(shape, jnp.int32 if n == "lengths" else jnp.float32) for n, shape in shapes.items()}
    rows, tokens = (256, 64) if paged else (4, 2048)
    cache = jax.eval_shape(
        lambda: LayerCache.zeros(rows=rows, kv_heads=spec.kv_heads, tokens=tokens, head_dim=spec.head_dim, dtype="bfloat16")
    )

    def run(q, cache, rows, given):
        terms = AttentionTerms(causal=causal, **given)
        return attention(q, cache, rows=rows if paged else None, positions=None, scale=0.1, terms=terms)

    found = compiled_kernels(gpu, run, S((4, T, spec.heads, spec.head_dim), jnp.float32), cache, S((4, 32), jnp.int32), given)
    assert ("decode_attention" if T == 1 else "prefill_attention") in found


@pytest.mark.aot
@pytest.mark.slow
def test_the_gradient_keeps_no_array_of_all_scores():
    """Neither the program nor its arguments hold one of T^2 elements a head, in the loop over distances either."""
    T = 1024
    spec = SPECS["smollm2_135m"]

    def run(q, k, v, slopes):
        terms = AttentionTerms(slopes=slopes)
        return attention(q, LayerCache(k=k, v=v), rows=None, positions=None, scale=0.1, window=jnp.int32(64), terms=terms).sum()

    keys = S((1, spec.kv_heads, T, spec.head_dim), jnp.bfloat16)
    q = S((1, T, spec.heads, spec.head_dim), jnp.float32)
    text = compile_for("h100", jax.grad(run, (0, 1, 2, 3)), q, keys, keys, S((spec.heads,), jnp.float32)).text
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"\w+\[([\d,]+)\]", text)]
    assert max(sizes) <= T * spec.heads * spec.head_dim
    with_reference = jax.grad(functools.partial(run), (0, 1, 2, 3))
    with using({"attention": "reference"}):
        text = compile_for("h100", with_reference, q, keys, keys, S((spec.heads,), jnp.float32)).text
    assert f"{T},{T}" in text


def test_pages_that_it_does_not_read_are_refused():
    cache = LayerCache.zeros(rows=4, kv_heads=1, tokens=24, head_dim=16, dtype="float32")
    q, table = jnp.ones((2, 1, 2, 16)), jnp.zeros((2, 2), jnp.int32)
    with kernels(), pytest.raises(BackendError, match="powers of two tokens, not of 24"):
        attention(q, cache, rows=table, positions=jnp.zeros((2, 1), jnp.int32), scale=1.0, implementation="pallas")
