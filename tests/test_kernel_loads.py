"""scripts/bench/kernel_loads.py: what kernels read, counted by hand, and derived for the kernels of decoding."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.attention import attention
from pallas_kernels.latent_attention import latent_attention
from pallas_kernels.launch import launch
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.qtensor import round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.tuning import tiles

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


@pytest.fixture
def loads(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import kernel_loads

    return kernel_loads


def test_loads_that_are_counted_by_hand(loads):
    def kernel(x_ref, rows_ref, count_ref, y_ref):
        row = rows_ref[pl.program_id(0)]

        def body(step, total):
            at = step * 16 + jnp.arange(16)
            return total + jnp.sum(triton.load(x_ref.at[row, pl.ds(step * 16, 16)], mask=at < 40, other=0.0))

        y_ref[pl.program_id(0)] = lax.fori_loop(0, count_ref[0], body, 0.0)

    def run(x, rows, count):
        out = jax.ShapeDtypeStruct((3,), jnp.float32)
        return launch(kernel, x, rows + 0, count, name="sums", out=out, grid=(3,), warps=1)

    x, rows = jax.ShapeDtypeStruct((8, 64), jnp.float32), np.array([5, 2, 5], np.int32)
    found = loads.reads(run, (x, rows, np.array([3], np.int32)))
    # two rows of which 40 elements are 5 sectors each; rows and count are a sector each, but no more than they have
    assert found == loads.Reads(
        unique=2 * 5 * 32 + 12 + 4, handed_on=0, issued=3 * 40 * 4 + 3 * 4 + 3 * 4, operands=8 * 64 * 4 + 12 + 4
    )
    found = loads.reads(run, (x, rows, np.array([1], np.int32)))
    assert found.unique == 2 * 2 * 32 + 12 + 4
    with pytest.raises(loads.NotDerivable, match="no kernel"):
        loads.reads(lambda x: x, (x,))


def test_what_a_kernel_hands_on_is_told_apart(loads):
    """Also where something is computed from it in between; an array that XLA makes of arguments alone is none of it."""
    copy = lambda x: launch(
        lambda x_ref, y_ref: triton.store(y_ref.at[pl.ds(0, 64)], triton.load(x_ref.at[pl.ds(0, 64)])),
        x,
        name="copy",
        out=jax.ShapeDtypeStruct((64,), x.dtype),
        grid=(1,),
        warps=1,
    )
    x = jax.ShapeDtypeStruct((64,), jnp.float32)
    assert loads.reads(lambda x: copy(copy(x) + 1), (x,)).handed_on == 256
    assert loads.reads(lambda x: copy(x + 1) + copy(x), (x,)).handed_on == 0


@pytest.mark.parametrize(
    ("dtype", "bits"), [("bfloat16", 16), pytest.param("int8", 16, marks=pytest.mark.slow), ("float32", 32)]
)
def test_latent_attention_reads_its_cache_once_and_partial_sums_in_few_bits(loads, dtype, bits):
    heads, latent, width, tokens = 32, 64, 80, 2048
    q, cache = jax.ShapeDtypeStruct((1, 1, heads, width), jnp.float32), jax.ShapeDtypeStruct((1, tokens, width), dtype)
    scales = jax.ShapeDtypeStruct((1, tokens), jnp.float32) if dtype == "int8" else None
    at = np.full((1, 1), tokens - 1, np.int32)
    run = lambda q, cache, scales: latent_attention(q, cache, values=latent, positions=at, scale=0.1, scales=scales)
    splits = 4
    with tiles({"latent_attention": {"splits": splits}}):
        found = loads.reads(run, (q, cache, scales))
    arguments = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((q, cache, scales)))
    assert found.handed_on == splits * heads * (latent * bits // 8 + 2 * 4)
    assert arguments <= found.unique - found.handed_on <= 1.01 * arguments


def test_blocks_that_pallas_cuts_do_not_show(loads):
    def run(x):
        block = pl.BlockSpec((4,), lambda i: (i,))
        kernel = functools.partial(lambda x_ref, y_ref: y_ref.__setitem__(slice(None), x_ref[:]))
        return launch(kernel, x, name="cut", out=x, grid=(2,), warps=1, in_specs=[block], out_specs=block)

    with pytest.raises(loads.NotDerivable, match="cuts"):
        loads.reads(run, (jax.ShapeDtypeStruct((8,), jnp.float32),))


@pytest.mark.parametrize("rows", [1, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_a_weight_is_read_once(loads, form, rows):
    struct = jax.ShapeDtypeStruct((1024, 2048), jnp.float32)
    group = {"int4": 128}.get(form)
    store = lambda w: w.astype(form) if form == "bfloat16" else round_to_nearest(w, format=form, group=group)
    w, x = jax.eval_shape(store, struct), jax.ShapeDtypeStruct((rows, 2048), jnp.float32)
    found = loads.reads(quant_matmul, (x, w))
    arguments = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((x, w)))
    assert 0.95 * arguments < found.unique <= 1.05 * arguments and found.issued > found.unique


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
def test_a_cache_is_read_once_as_far_as_it_is_seen(loads, dtype):
    cache = jax.eval_shape(lambda: LayerCache.zeros(rows=2, kv_heads=2, tokens=1024, head_dim=128, dtype=dtype))
    q = jax.ShapeDtypeStruct((2, 1, 8, 128), jnp.float32)
    run = lambda q, cache, at: attention(q, cache, rows=None, positions=at, scale=0.1)
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))
    full, half = (loads.reads(run, (q, cache, np.full((2, 1), at, np.int32))).unique for at in (1023, 511))
    assert 1.0 <= full / whole < 1.08 and 0.5 <= half / whole < 0.58
