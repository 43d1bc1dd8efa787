"""The native CPU kernels against the references: every format, cache, instruction set and number of threads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import copies
from jax.sharding import Mesh, PartitionSpec
from native_calls import as_bfloat16, close, in_each_way, in_tiles, jittable, same_levels

from pallas_kernels.attention_block import AttentionSpec, AttentionWeights, attention_block
from pallas_kernels.cpu import library
from pallas_kernels.errors import BackendError
from pallas_kernels.layer_cache import LayerCache, cache_dtype
from pallas_kernels.mlp_block import ACTIVATIONS, MLPSpec, MLPWeights, mlp_block
from pallas_kernels.norm import KINDS
from pallas_kernels.qtensor import ActivationQuant, QTensor, dequantize, repack, round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul.fused import Norm, fused_matmul
from pallas_kernels.registry import choose
from pallas_kernels.target import Target


@pytest.fixture(autouse=True)
def needs_native(native): ...


FORMS = {
    "float32": None,
    "bfloat16": None,
    "int8": {"format": "int8", "activation": ActivationQuant(group=64)},
    "int8-32": {"format": "int8", "group": 32, "activation": ActivationQuant(group=32)},
    "int8-64-token": {"format": "int8", "group": 64, "activation": ActivationQuant(group=None)},
    "int8-float": {"format": "int8"},
    "int4-32": {"format": "int4", "group": 32, "activation": ActivationQuant(group=64)},
    "int4-32-zeros": {"format": "int4", "group": 32, "symmetric": False, "activation": ActivationQuant(group=32)},
    "int4-64-zeros-token": {"format": "int4", "group": 64, "symmetric": False, "activation": ActivationQuant(group=None)},
    "int4-128": {"format": "int4", "group": 128, "activation": ActivationQuant(group=32)},
    "int4-64-float": {"format": "int4", "group": 64},
    "int4-32-zeros-float": {"format": "int4", "group": 32, "symmetric": False},
}
SIZES = {"odd": (37, 384), "long": (70, 2176), "one": (1, 128)}
ROWS = (1, 2, 7, 64, 100)


def make_weight(rng, form, outputs, inputs):
    w = rng.standard_normal((outputs, inputs)).astype(np.float32)
    if FORMS[form] is None:
        return jnp.asarray(w, form)
    return jax.tree.map(jnp.asarray, round_to_nearest(w, **FORMS[form]))


def make_inputs(rng, w, rows):
    """Inputs whose rounding is not in doubt: whole levels where they become int8, with the largest level in every group."""
    if not isinstance(w, QTensor) or w.activation is None:
        x = rng.standard_normal((rows, w.shape[1])).astype(np.float32)
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) if isinstance(w, QTensor) else x
    levels = rng.integers(-126, 127, (rows, w.shape[1]))
    levels[:, ::32] = 127
    return (levels * np.float32(0.01)).astype(np.float32)


def reference_matmul(x, w, bias, name=None):
    """name: of an instruction set, which may take a weight of levels as bfloat16."""
    if isinstance(w, QTensor):
        tiles, w = in_tiles(name, w, len(x)), dequantize(w)
        if tiles:
            x, w = as_bfloat16(x), as_bfloat16(w)
    elif w.dtype == jnp.bfloat16:
        x = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).T + np.asarray(bias, np.float64)


@pytest.mark.parametrize("form", FORMS)
def test_quant_matmul(rng, native, form):
    for size, (outputs, inputs) in SIZES.items():
        w = make_weight(rng, form, outputs, inputs)
        bias = jnp.asarray(rng.standard_normal(outputs), jnp.float32)
        rows = ROWS if size == "odd" else (1, 64)
        for m in rows:
            x = make_inputs(rng, w, m)
            weights = np.asarray(dequantize(w) if isinstance(w, QTensor) else w, np.float64)
            scale = np.linalg.norm(x, axis=-1, keepdims=True) * np.linalg.norm(weights, axis=-1)
            sets = native.instruction_sets if (size, m) in {("odd", 7), ("odd", 100)} else native.instruction_sets[:1]
            run = lambda x, w, b: quant_matmul(x, w, bias=b, implementation="native")
            for name, got in in_each_way(native, run, x, w, bias, sets=sets).items():
                error = (np.abs(np.asarray(got, np.float64) - reference_matmul(x, w, bias, name)) / scale).max()
                # inputs of 16 bits; in tiles a weight may fall to the other side of a half
                limit = 2e-5 if form.endswith("-float") or in_tiles(name, w, m) else 4e-7
                assert error < limit, (name, size, m, error)


@pytest.mark.parametrize("form", [form for form, kind in FORMS.items() if kind])
def test_blocks(rng, native, form):
    """The layout cpu32 and the canonical one give the same bits, and so does a row alone and among others."""
    for outputs, inputs in ((37, 384), (64, 2176)):
        w = make_weight(rng, form, outputs, inputs)
        x = jnp.asarray(make_inputs(rng, w, 11))
        run = lambda x, w: quant_matmul(x, w, implementation="native")
        for name in native.instruction_sets if outputs == 37 else native.instruction_sets[:1]:
            call = jittable(run, threads=2, instruction_set=name)
            want = np.asarray(call(x, w))
            np.testing.assert_array_equal(call(x, repack(w, "cpu32")), want, err_msg=name)
            np.testing.assert_array_equal(call(x[:1], repack(w, "cpu32")), want[:1], err_msg=name)
            np.testing.assert_array_equal(call(x[:6], w), want[:6], err_msg=name)


def test_odd_outputs_and_inputs(rng, native):
    """Sizes that fill no vector, of floats: quantised inputs come in groups."""
    for outputs, inputs, dtype in ((1, 1, "float32"), (42, 257, "float32"), (33, 31, "bfloat16")):
        w = jnp.asarray(rng.standard_normal((outputs, inputs)), dtype)
        for m in (1, 33):
            x = rng.standard_normal((m, inputs)).astype(np.float32)
            want = reference_matmul(x, w, 0.0)
            for got in in_each_way(native, lambda x, w: quant_matmul(x, w, implementation="native"), x, w).values():
                close(got, want, 2e-6)


def test_zeros_and_extremes(native):
    """A group of zeros has scale 0; levels of -128 and inputs of -127 do not overflow 16 bits."""
    w = QTensor(
        values=jnp.full((5, 128), -128, jnp.int8),
        scales=jnp.ones((5, 1), jnp.float32),
        format="int8",
        activation=ActivationQuant(group=64),
    )
    x = np.full((2, 128), -1.27, np.float32)
    x[1, :64] = 0
    for got in in_each_way(native, lambda x, w: quant_matmul(x, w, implementation="native"), x, w).values():
        close(got, x.astype(np.float64) @ np.full((128, 5), -128.0), 1e-6)


def test_integer_zeros(rng, native):
    """AWQ and GPTQ keep a zero point per group."""
    q = round_to_nearest(
        rng.standard_normal((9, 256)).astype(np.float32), format="int4", group=64, activation=ActivationQuant(group=64)
    )
    q = jax.tree.map(jnp.asarray, q.replace(zeros=rng.integers(0, 16, q.scales.shape).astype(np.uint8)))
    for m in (1, 40):
        x = make_inputs(rng, q, m)
        for layout in ("canonical", "cpu32"):
            run = lambda x, w: quant_matmul(x, w, implementation="native")
            for name, got in in_each_way(native, run, x, repack(q, layout)).items():
                close(got, reference_matmul(x, q, 0.0, name), 2e-5 if in_tiles(name, q, m) else 2e-6)


# --- attention_block

# embed, kv heads, queries per kv head, head_dim, half of the rotated part, norm, q/k norm, soft cap, window
SHAPES = {
    "llama": (64, 2, 3, 16, 8, "rms", False, None, None),
    "odd-partial": (42, 1, 1, 10, 3, "layer", False, None, None),
    "gemma": (96, 2, 2, 80, 40, "rms_offset", True, 30.0, 7),
    "many-queries": (64, 1, 9, 64, 32, "rms", True, None, 150),
    "no-rotation": (64, 3, 2, 64, 0, "layer", False, None, None),
}
QUICK = (("llama", "fp8"), ("gemma", "int4"))  # of the caches of fewer bits, what is tested by default
# batch, tokens, first position
CALLS = {
    "first": (1, 1, 0),
    "deep": (1, 1, 200),
    "batch": (2, 1, 37),
    "few": (3, 2, 5),
    "chunk": (1, 40, 3),
    "rows": (2, 33, 0),
}
TOLERANCES = {
    None: (2e-6, 1e-5),
    "float32": (2e-6, 1e-5),
    "float16": (3e-3, 0.01),
    "bfloat16": (0.02, 0.05),
    "int8": (0.02, 1.01),
    "fp8": (0.02, 33.0),  # a level, the largest being 448
    "int4": (1e-5, None),
}
CACHED_TOKENS = 260


def attention_case(rng, shape, call, cached):
    embed, kv_heads, group, head_dim, half, norm, qk_norm, soft_cap, window = SHAPES[shape]
    batch, tokens, first = CALLS[call]
    f = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    heads = kv_heads * group
    columns = (heads + 2 * kv_heads) * head_dim
    weights = AttentionWeights(
        norm=1 + f(embed) / 10,
        norm_bias=f(embed) if norm == "layer" else None,
        qkv=(f(columns, embed) / 8,)
        if head_dim == 16
        else tuple(f(n * head_dim, embed) / 8 for n in (heads, kv_heads, kv_heads)),
        qkv_bias=() if shape == "llama" else tuple(f(n * head_dim) for n in (heads, kv_heads, kv_heads)),
        q_norm=f(head_dim) if qk_norm else None,
        k_norm=f(head_dim) if qk_norm else None,
        out=f(embed, heads * head_dim) / 8,
        out_bias=f(embed) if norm == "layer" else None,
    )
    spec = AttentionSpec(head_dim=head_dim, group=group, scale=head_dim**-0.5, eps=1e-5, norm=norm, soft_cap=soft_cap)
    positions = first + np.arange(tokens)[None] + 3 * np.arange(batch)[:, None]
    cache = rows = None
    if cached is None:
        positions = np.broadcast_to(np.arange(tokens), (batch, tokens))
    else:
        held = batch + 1
        empty = LayerCache.zeros(
            rows=held, kv_heads=kv_heads, tokens=CACHED_TOKENS, head_dim=head_dim, dtype=cache_dtype(cached)
        )
        rows = rng.permutation(held)[:batch]
        lengths = np.zeros(held, np.int32)
        lengths[rows] = positions[:, 0]
        shape = (*empty.k.shape[:3], head_dim)
        cache = empty.encode_rows(f(*shape), f(*shape), jnp.asarray(lengths))
        rows = jnp.asarray(rows, jnp.int32)
    angles = positions[..., None] / 100.0 ** (np.arange(half) / max(half, 1))
    operands = {
        "angles": (jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)) if half else None,
        "positions": jnp.asarray(positions, jnp.int32),
        "rows": rows,
        "residual": f(batch, tokens, embed) if shape != "odd-partial" else None,
        "window": None if window is None else jnp.int32(window),
        "write": None,
    }
    if cached == "int8" and tokens > 1:
        operands["write"] = jnp.asarray(rng.random((batch, tokens)) < 0.8)
    if cached == "int4" and tokens > 1:  # which drops the last ones only
        operands["write"] = jnp.asarray(np.arange(tokens) < rng.integers(1, tokens + 1, (batch, 1)))
    return spec, f(batch, tokens, embed), weights, cache, operands


def run_attention(spec, implementation):
    return lambda x, weights, cache, operands: attention_block(
        x, weights, cache, spec=spec, implementation=implementation, **operands
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_block_after_bfloat16_weights(rng, native, shape):
    """Many queries meet keys and values in bfloat16 then, where the CPU has its products."""
    spec, x, weights, cache, operands = attention_case(rng, shape, "rows", None)
    args = (x, dataclasses.replace(weights, qkv=tuple(w.astype(jnp.bfloat16) for w in weights.qkv)), cache, operands)
    want, _ = run_attention(spec, "reference")(*args)
    for got, _ in in_each_way(native, run_attention(spec, "native"), *args).values():
        close(got, want, 0.02)
    # a fresh cache that is kept in bfloat16 is written so, and gradients go through it
    spec = dataclasses.replace(spec, fresh="bfloat16")
    for got, fresh in in_each_way(native, run_attention(spec, "native"), *args).values():
        assert fresh.k.dtype == fresh.v.dtype == jnp.bfloat16
        close(got, want, 0.02)
    if shape == "llama":
        slope = lambda name: jax.grad(lambda x: run_attention(spec, name)(x, *args[1:])[0].sum())(x)
        close(slope("native"), slope("reference"), 0.02)


@pytest.mark.parametrize(
    ("shape", "cached"),
    [
        pytest.param(
            shape, cached, marks=pytest.mark.slow if cached in ("fp8", "int4") and (shape, cached) not in QUICK else ()
        )
        for shape in SHAPES
        for cached in TOLERANCES
    ],
)
def test_attention_block(rng, native, shape, cached):
    # two kinds of calls each, so that every kind meets every shape and every cache
    turn = list(SHAPES).index(shape) + 2 * list(TOLERANCES).index(cached)
    calls = [call for call, (_, _, first) in CALLS.items() if cached is not None or first == 0]
    for number, call in enumerate((calls[turn % len(calls)], calls[(turn + 1) % len(calls)])):
        spec, *args = attention_case(rng, shape, call, cached)
        want, want_cache = jax.jit(run_attention(spec, "reference"))(*args)
        sets = native.instruction_sets if number else native.instruction_sets[:1]
        output, held = TOLERANCES[cached]
        for got, cache in in_each_way(native, run_attention(spec, "native"), *args, sets=sets).values():
            if cached == "int4":
                # a level whose rounding is in doubt moves results: they are compared with those of the levels that were chosen
                same_levels(cache, want_cache, args[-1])
                unwritten = args[-1] | {"write": jnp.zeros(args[0].shape[:2], bool)}
                want, _ = jax.jit(run_attention(spec, "reference"))(*args[:2], cache, unwritten)
            close(got, want, output)
            if cached == "int4":
                continue
            for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(want_cache), strict=True):
                assert np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max() < held


def test_unused_cache_is_not_read(rng, native):
    """Keys past the newest one, and rows that are not asked for, may hold anything."""
    for call in ("deep", "few", "chunk"):
        spec, x, weights, cache, operands = attention_case(rng, "llama", call, "float32")
        end = int(operands["positions"].max()) + 1
        used = np.zeros((cache.rows, 1, cache.tokens, 1), bool)
        used[np.asarray(operands["rows"]), :, :end] = True
        clean, poisoned = (
            LayerCache(k=jnp.where(used, cache.k, filling), v=jnp.where(used, cache.v, filling)) for filling in (0, jnp.nan)
        )
        run = run_attention(spec, "native")
        for name, (got, _) in in_each_way(native, run, x, weights, poisoned, operands).items():
            want, _ = jittable(run, threads=1, instruction_set=name)(x, weights, clean, operands)
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_decode_continues_prefill(rng, native):
    """Tokens one by one, in chunks and all at once give the same."""
    spec, x, weights, _, operands = attention_case(rng, "llama", "chunk", None)
    cos, sin = operands["angles"]
    T = x.shape[1]
    whole, fresh = jittable(run_attention(spec, "native"))(x, weights, None, operands)
    cache = LayerCache.zeros(rows=1, kv_heads=2, tokens=64, head_dim=16, dtype=jnp.float32)
    steps = []
    for begin, end in [(0, 1), (1, 18), (18, 33), *((t, t + 1) for t in range(33, T))]:
        part = operands | {name: operands[name][:, begin:end] for name in ("positions", "residual")}
        part["angles"] = (cos[:, begin:end], sin[:, begin:end])
        y, cache = jittable(run_attention(spec, "native"))(x[:, begin:end], weights, cache, part)
        steps.append(y)
    close(jnp.concatenate(steps, 1), whole, 2e-6)
    close(cache.k[:, :, :T], fresh.k, 2e-6)


@pytest.mark.parametrize("form", [name for name in FORMS if not name.startswith("float")])
def test_blocks_with_stored_weights(rng, native, form):
    """Half layers in each weight format equal the reference on the same stored weights, within the rounding of the inputs."""
    spec, x, _, _, operands = attention_case(rng, "no-rotation", "few", None)
    stored = make_weight(rng, form, 8 * 64, 128), make_weight(rng, form, 128, 4 * 64)
    weights = AttentionWeights(
        norm=jnp.ones(128), norm_bias=jnp.zeros(128), qkv=stored[:1], qkv_bias=(), out=stored[1], out_bias=None
    )
    x, operands = jnp.asarray(rng.standard_normal((*x.shape[:2], 128)), jnp.float32), operands | {"residual": None}
    mlp = MLPWeights(
        norm=jnp.ones(128),
        up=(make_weight(rng, form, 512, 128),),
        up_bias=(),
        down=make_weight(rng, form, 128, 256),
        down_bias=None,
    )
    shape = MLPSpec(activation="silu", gated=True, eps=1e-5)

    def both(implementation):
        def run(x, weights, mlp, operands):
            y, _ = attention_block(x, weights, None, spec=spec, implementation=implementation, **operands)
            return y, mlp_block(x, mlp, spec=shape, implementation=implementation)

        return run

    wants = jax.jit(both("reference"))(x, weights, mlp, operands)
    # an input that rounds to the next level, or to bfloat16, moves an output by about one step of one input
    tolerance = 5e-3 if form.endswith("-float") else 3e-2
    for gots in in_each_way(native, both("native"), x, weights, mlp, operands, sets=native.instruction_sets[:1]).values():
        for got, want in zip(gots, wants, strict=True):
            close(got, want, tolerance)


# --- mlp_block


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_block(rng, native, activation):
    f = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    turn = list(ACTIVATIONS).index(activation)
    for number, (kind, parts, gated) in enumerate(zip(KINDS, (2, 1, 1), (True, True, False), strict=True)):
        for (embed, width), rows in (((42, 37), (1, 1)), ((48, 80), (3, 30)))[(number + turn) % 2 :][:1]:
            ups = [2 * width] if gated and parts == 1 else [width] * parts
            weights = MLPWeights(
                norm=f(embed),
                norm_bias=f(embed) if kind == "layer" else None,
                up=tuple(f(n, embed) / 8 for n in ups),
                up_bias=tuple(f(n) for n in ups),
                down=f(embed, width) / 8,
                down_bias=f(embed),
            )
            spec = MLPSpec(activation=activation, gated=gated, eps=1e-5, norm=kind)
            run = lambda implementation, spec=spec: (
                lambda x, w, r: mlp_block(x, w, spec=spec, residual=r, implementation=implementation)
            )
            args = f(*rows, embed), weights, f(*rows, embed)
            want = jax.jit(run("reference"))(*args)
            for got in in_each_way(native, run("native"), *args).values():
                close(got, want, 4e-6)


def test_many_rows(rng, native):
    """More rows than go through a matmul together."""
    f = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    weights = MLPWeights(norm=f(32), up=(f(48, 32), f(48, 32)), up_bias=(), down=f(32, 48), down_bias=None)
    spec = MLPSpec(activation="silu", gated=True, eps=1e-5)
    x = f(2, 300, 32)
    for y in in_each_way(
        native, lambda x: mlp_block(x, weights, spec=spec, implementation="native"), x, sets=native.instruction_sets[:1]
    ).values():
        close(y, mlp_block(x, weights, spec=spec, implementation="reference"), 4e-6)


# --- argmax


def test_a_donated_cache_is_updated_in_place(rng):
    spec, x, weights, cache, operands = attention_case(rng, "llama", "batch", "int8")
    run = jax.jit(run_attention(spec, "native"), donate_argnums=2)
    text = run.lower(x, weights, cache, operands).compile().as_text()
    assert not copies(text, {cache.k.shape, cache.k_scale.shape}), "the program copies the cache"
    kept = jax.tree.map(jnp.copy, cache)
    pointer = cache.k.unsafe_buffer_pointer()
    y, new = run(x, weights, cache, operands)
    assert new.k.unsafe_buffer_pointer() == pointer
    # without donation XLA copies first, and the caller's cache stays as it was
    again, _ = jax.jit(run_attention(spec, "native"))(x, weights, kept, operands)
    np.testing.assert_array_equal(y, again)


def test_gradients(rng):
    spec, x, weights, cache, operands = attention_case(rng, "gemma", "few", "float32")
    w = make_weight(rng, "int8", 24, 64)

    def loss(implementation):
        def run(x, weights, residual, table):
            y, new = attention_block(
                x, weights, cache, spec=spec, implementation=implementation, **(operands | {"residual": residual})
            )
            mlp = MLPWeights(norm=weights.norm, up=(weights.qkv[0],), up_bias=(), down=table, down_bias=None)
            z = mlp_block(y, mlp, spec=MLPSpec(activation="gelu", gated=False, eps=1e-5), implementation=implementation)
            head = quant_matmul(z[..., :64], w, implementation=implementation)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(z)) + jnp.sum(head**2) + jnp.sum(new.k**2)

        return jax.jit(jax.grad(run, argnums=(0, 1, 2, 3)))

    table = jnp.asarray(rng.standard_normal((64, weights.qkv[0].shape[0])), jnp.float32) / 8
    args = x, weights, operands["residual"], table
    for got, want in zip(jax.tree.leaves(loss("native")(*args)), jax.tree.leaves(loss("reference")(*args)), strict=True):
        # through the rounded inputs of the INT8 head, whose levels may differ by one
        close(got, want, 1e-2)


def test_vmap(rng):
    spec, x, weights, cache, operands = attention_case(rng, "llama", "batch", "float32")
    some = jnp.stack([x, -x, 2 * x])
    run = run_attention(spec, "native")
    both = jax.jit(jax.vmap(lambda x: run(x, weights, cache, operands)))(some)
    for i in range(3):
        y, new = run(some[i], weights, cache, operands)
        np.testing.assert_array_equal(both[0][i], y)
        np.testing.assert_array_equal(both[1].k[i], new.k)


def test_on_several_devices_at_once(rng):
    """Each device calls from a thread of its own; nobody waits for another one's workers."""
    w = make_weight(rng, "int8", 160, 128)
    x = jnp.asarray(make_inputs(rng, w, 8))
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("d",))
    with library.options(threads=2):
        run = jax.jit(
            jax.shard_map(
                lambda x: quant_matmul(x, w, implementation="native"),
                mesh=mesh,
                in_specs=PartitionSpec("d"),
                out_specs=PartitionSpec("d"),
                check_vma=False,
            )
        )
        got = [np.asarray(run(x)) for _ in range(20)]
        want = np.asarray(quant_matmul(x[:2], w, implementation="native"))
    for y in got:
        np.testing.assert_array_equal(y[:2], want)
        np.testing.assert_array_equal(y, got[0])


# --- what is refused


def test_refusals(rng):
    x = jnp.zeros((1, 96))
    for w, words in (
        (jnp.zeros((3, 80), jnp.float16), "float16"),
        (repack(make_weight(rng, "int4-32", 32, 96), "gpu"), "layouts canonical and cpu32"),
        (round_to_nearest(np.ones((3, 80), np.float32), format="int4", group=16), "groups of 32"),
        (
            round_to_nearest(np.ones((3, 80), np.float32), format="int8", activation=ActivationQuant(group=40)),
            "multiple of 32 inputs",
        ),
    ):
        with pytest.raises(BackendError, match=words):
            quant_matmul(x[:, : w.shape[1]], w, implementation="native")
    token = round_to_nearest(np.ones((3, 80), np.float32), format="int8", activation=ActivationQuant(group=None))
    with pytest.raises(BackendError, match="collective"):
        quant_matmul(x[:, :80], token, max_over_shards=lambda a: a, implementation="native")
    with pytest.raises(BackendError, match="for CPUs"):
        choose("argmax", "native", Target(platform="gpu", device_kind="NVIDIA H100"), shape=(1, 2), dtype=jnp.dtype("float32"))


@pytest.mark.parametrize("kind", ["rms", "rms_offset", "layer"])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int4-64-float"])
def test_fused_matmul(rng, native, kind, form):
    """Norm, bias and residual in the call of a matmul, and its gradients: as from the small operations."""
    w = make_weight(rng, form, 42, 128)
    vector = lambda n: jnp.asarray(rng.standard_normal(n), jnp.float32)
    scale, shift, bias = vector(128), vector(128) if kind == "layer" else None, vector(42)

    def run(x, residual, scale, implementation=None):
        last = Norm(kind=kind, eps=1e-5, scale=scale, bias=shift)
        return fused_matmul(x, (w,), biases=(bias,), norm=last, residual=residual, implementation=implementation)

    for shape in ((1,), (2, 5), (40,)):
        x, residual = vector((*shape, 128)), vector((*shape, 42))
        for name, got in in_each_way(native, functools.partial(run, implementation="native"), x, residual, scale).items():
            # where inputs are rounded some fall to the other side of a half
            limit = 1e-2 if form == "bfloat16" or in_tiles(name, w, x.size // 128) else 3e-5
            close(got, run(x, residual, scale, "reference"), limit)
    gradients = lambda implementation: jax.grad(lambda *a: jnp.sum(run(*a, implementation) ** 2), argnums=(0, 1, 2))(
        x, residual, scale
    )
    for got, want in zip(gradients("native"), gradients("reference"), strict=True):
        close(got, want, 1e-2 if form == "bfloat16" else 1e-3)


def test_fused_matmul_takes_one_weight_without_activation(rng, native):
    w, x = jnp.asarray(rng.standard_normal((8, 64)), jnp.float32), jnp.ones((1, 64))
    for given in ({"activation": "silu"}, {"gated": True}, {"weights": (w, w)}):
        with pytest.raises(BackendError, match="one weight"):
            fused_matmul(x, given.pop("weights", (w,)), **given, implementation="native")


def test_what_native_refuses_takes_another_path(rng):
    w = round_to_nearest(rng.standard_normal((3, 80)).astype(np.float32), format="int4", group=16)
    x = rng.standard_normal((2, 80)).astype(np.float32)
    close(quant_matmul(x, jax.tree.map(jnp.asarray, w)), reference_matmul(x, w, 0.0), 1e-5)
