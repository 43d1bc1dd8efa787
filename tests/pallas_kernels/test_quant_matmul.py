"""quant_matmul and quantize_activations against float64, each implementation, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.errors import BackendError, QuantizationError, ShapeError
from pallas_kernels.qtensor import ActivationQuant, QTensor, concatenate, dequantize, repack, round_to_nearest, take
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul.specs import SPECS, TINY
from pallas_kernels.quantize import dequantize_activations, quantize_activations
from pallas_kernels.quantize.specs import SPECS as ACTIVATION_SPECS
from pallas_kernels.registry import choose
from pallas_kernels.target import Target

IMPLEMENTATIONS = ("reference", "xla")
FORMS = {
    "int8": {"format": "int8"},
    "int8-32": {"format": "int8", "group": 32},
    "int4-32": {"format": "int4", "group": 32},
    "int4-64-zeros": {"format": "int4", "group": 64, "symmetric": False},
    "int4-16": {"format": "int4", "group": 16},
}
ACTIVATIONS = {
    "float": None,
    "groups": ActivationQuant(),
    "token": ActivationQuant(group=None),
    "odd": ActivationQuant(group=40),
}


def make(rng, name, form, activation=None):
    spec = SPECS[name]
    w = rng.standard_normal((spec.outputs, spec.inputs)).astype(np.float32)
    return round_to_nearest(w, **FORMS[form], activation=ACTIVATIONS[activation] if activation else None)


def on_device(q):
    return jax.tree.map(jnp.asarray, q)


def rounded(x, quant):
    """float64 inputs as an INT8 matmul sees them; the scales are those of float32 arithmetic."""
    out = np.zeros(x.shape)
    size = quant.group or x.shape[-1]
    for at in range(0, x.shape[-1], size):
        part = x[..., at : at + size]
        scale = np.abs(part).max(-1, keepdims=True) / np.float32(127)
        out[..., at : at + size] = np.rint(part / np.where(scale == 0, 1, scale)).astype(np.float64) * scale.astype(np.float64)
    return out


def oracle(x, q):
    """float64 product of the inputs as they were rounded and the exact weights."""
    if q.activation is not None:
        # which way XLA rounds a value half way between two levels is not the matter here
        x = dequantize_activations(*jax.jit(quantize_activations, static_argnums=1)(x, q.activation), q.activation)
    return np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64).T


def assert_close(got, want, x, w, tolerance=4e-7):
    """Within the rounding of float32 sums: relative to |x| |w|, since one output may be small beside its terms."""
    w = np.asarray(dequantize(w) if isinstance(w, QTensor) else w, np.float64)
    size = np.linalg.norm(np.asarray(x, np.float64), axis=-1, keepdims=True) * np.linalg.norm(w, axis=-1)
    error = np.abs(np.asarray(got, np.float64) - want) / size
    assert error.max() < tolerance, error.max()


CASES = [(form, activation) for form in FORMS for activation in ("float", "groups")]
CASES += [("int8", "token"), ("int8", "odd"), ("int4-64-zeros", "token"), ("int4-32", "odd")]


@pytest.mark.parametrize(
    ("implementation", "form", "activation"),
    [("xla", *case) for case in CASES] + [("reference", *case) for case in CASES if case[0] in ("int8", "int4-64-zeros")],
)
def test_quantised(rng, implementation, form, activation):
    run = jax.jit(lambda x, q: quant_matmul(x, q, implementation=implementation))
    names = [n for n in TINY if SPECS[n].inputs % (FORMS[form].get("group") or 1) == 0]
    # one row, and one of several counts on a weight picked anew in each run
    for lead in ((1,), ((2, 1), (5,), (40,))[rng.integers(3)]):
        q = make(rng, str(rng.choice(names)), form, activation)
        x = (rng.standard_normal((*lead, q.shape[1])) * 3).astype(np.float32)
        got = run(jnp.asarray(x), on_device(q))
        assert got.shape == (*lead, q.shape[0]) and got.dtype == jnp.float32
        assert_close(got, oracle(x, q), x, q)


@pytest.mark.parametrize("form", ["int8-32", "int4-64-zeros"])
def test_a_weight_of_several_chunks_that_do_not_divide(rng, form):
    q = make(rng, "odd.over_a_chunk", form)
    x = rng.standard_normal((2, q.shape[1])).astype(np.float32)
    run = jax.jit(functools.partial(quant_matmul, implementation="xla"))
    assert_close(run(jnp.asarray(x), on_device(q)), oracle(x, q), x, q)


@pytest.mark.parametrize("rows", [1, 33])
def test_outliers_among_the_inputs(rng, rows):
    q = make(rng, "odd.7x384", "int8", "groups")
    x = rng.standard_normal((rows, 384)).astype(np.float32)
    x[:, 5] *= 1000
    # three int8 digits hold 2^-24 of the largest input, on each of 384 inputs: float32 sums lose a fifth of that here
    largest = np.abs(x).max(-1, keepdims=True) * np.ones_like(x) / np.sqrt(384)
    got = quant_matmul(jnp.asarray(x), on_device(q), implementation="xla")
    assert_close(got, oracle(x, q), largest, q, 4e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_float_weights(rng, implementation, dtype, rows):
    for name in ("odd.42x256", "odd.1x64"):
        spec = SPECS[name]
        w = jnp.asarray(rng.standard_normal((spec.outputs, spec.inputs)), dtype)
        x = jnp.asarray(rng.standard_normal((rows, spec.inputs)), dtype)
        bias = jnp.asarray(rng.standard_normal(spec.outputs), dtype)
        want = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
        got = quant_matmul(x, w, implementation=implementation)
        assert got.dtype == jnp.float32
        # a single output may be small beside its terms
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.sqrt(spec.inputs))
        got = quant_matmul(x, w, bias=bias, implementation=implementation)
        np.testing.assert_allclose(got, want + np.asarray(bias, np.float64), rtol=1e-5, atol=1e-5 * np.sqrt(spec.inputs))


@pytest.mark.parametrize("form", ["int4-32", "int8-32"])
def test_many_bfloat16_rows_may_take_a_bfloat16_copy_of_the_weight(rng, form):
    q = make(rng, "odd.42x256", form)
    x = jnp.asarray(rng.standard_normal((64, 256)), jnp.bfloat16)
    # weights rounded to 8 bits: up to 2^-9 each, at random, so that the sum errs by 2^-9 / sqrt(3) / sqrt(256) and outliers
    assert_close(quant_matmul(x, on_device(q)), oracle(x, q), x, q, 1e-3)


@pytest.mark.parametrize("layout", ["cpu32", "gpu"])
def test_other_layouts(rng, layout):
    q = on_device(round_to_nearest(rng.standard_normal((64, 128)).astype(np.float32), format="int4", group=32))
    x = jnp.asarray(rng.standard_normal((2, 128)), jnp.float32)
    # the same float32 dot of the same weights in another compiled form
    want = quant_matmul(x, q, implementation="xla")
    np.testing.assert_allclose(quant_matmul(x, repack(q, layout), implementation="reference"), want, rtol=1e-5, atol=1e-5)
    if layout == "cpu32":  # turned back
        np.testing.assert_array_equal(quant_matmul(x, repack(q, layout), implementation="xla"), want)
        return
    with pytest.raises(BackendError, match="canonical layout"):
        quant_matmul(x, repack(q, layout), implementation="xla")


def test_groups_that_packing_blocks_cut_fall_back_to_the_reference(rng):
    q = round_to_nearest(rng.standard_normal((4, 96)).astype(np.float32), format="int4", group=48)
    x = rng.standard_normal((2, 96)).astype(np.float32)
    assert_close(quant_matmul(jnp.asarray(x), on_device(q)), oracle(x, q), x, q)


def test_what_a_gpu_takes():
    gpu = Target(platform="gpu", device_kind="NVIDIA A100-SXM4-40GB")
    weight = {"outputs": 8, "inputs": 64, "group": None, "layout": "canonical", "activation": None, "zeros": None}
    facts = {**weight, "format": "int8", "rows": 32}
    assert choose("quant_matmul", target=gpu, **facts).name == "pallas"
    assert choose("quant_matmul", target=gpu, **{**facts, "format": "nf4", "group": 64}).name == "pallas"
    assert choose("quant_matmul", target=gpu, **{**facts, "format": "int4_ordered", "group": 64}).name == "reference"
    assert choose("quant_matmul", target=gpu, **{**facts, "format": "bfloat16", "rows": 1}).name == "pallas"
    assert choose("quant_matmul", target=gpu, **{**facts, "format": "bfloat16"}).name == "xla"
    assert choose("quant_matmul", target=gpu, **{**facts, "format": "float32", "rows": 1}).name == "xla"
    with pytest.raises(BackendError, match="not for gpu"):
        choose("quant_matmul", "xla", gpu, **facts)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_passes_straight_through_rounded_inputs(rng, form, implementation):
    q = make(rng, "odd.42x256", form, "groups")
    x, out = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 256), (3, 42)))
    got = jax.grad(lambda x: jnp.sum(quant_matmul(x, on_device(q), implementation=implementation) * out))(x)
    np.testing.assert_allclose(got, np.asarray(out, np.float64) @ dequantize(q).astype(np.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 3])
def test_gradient_of_a_float_weight(rng, implementation, rows):
    x, w, out = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((rows, 256), (42, 256), (rows, 42)))
    dx, dw = jax.grad(lambda x, w: jnp.sum(quant_matmul(x, w, implementation=implementation) * out), (0, 1))(x, w)
    np.testing.assert_allclose(dx, np.asarray(out, np.float64) @ np.asarray(w, np.float64), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, np.asarray(out, np.float64).T @ np.asarray(x, np.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
@pytest.mark.parametrize("activation", ["groups", "token"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_split_inputs_sum_to_the_whole(rng, implementation, activation):
    q = on_device(make(rng, "odd.42x256", "int8", activation))
    x = jnp.asarray(rng.standard_normal((3, 256)), jnp.float32)
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    cut, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    # scales per channel are whole on each shard
    specs = q.replace(values=cut, scales=whole)
    largest = lambda m: jax.lax.pmax(m, "tensor")

    def body(x, q):
        return jax.lax.psum(quant_matmul(x, q, max_over_shards=largest, implementation=implementation), "tensor")

    split = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(cut, specs), out_specs=whole, check_vma=False))
    assert_close(split(x, q), oracle(x, q), x, q)


@pytest.mark.parametrize("name", ACTIVATION_SPECS)
def test_quantize_activations(rng, name):
    spec = ACTIVATION_SPECS[name]
    quant = ActivationQuant(group=spec.group)
    x = rng.standard_normal((2, 3, spec.inputs)).astype(np.float32)
    x[0, 0, : spec.group or 8] = 0
    levels, scales = quantize_activations(jnp.asarray(x), quant)
    groups = 1 if spec.group is None else -(-spec.inputs // spec.group)
    assert levels.shape == x.shape and levels.dtype == jnp.int8
    assert scales.shape == (2, 3, groups) and scales.dtype == jnp.float32
    # XLA may divide by 127 as a product with its reciprocal: a value half way between levels may go the other way
    step = np.repeat(np.asarray(scales, np.float64), spec.group or spec.inputs, -1)[..., : spec.inputs]
    assert (np.abs(dequantize_activations(levels, scales, quant) - x) <= step * 0.50001).all()
    assert np.abs(np.asarray(levels, int)).max() <= 127
    np.testing.assert_allclose(dequantize_activations(levels, scales, quant), rounded(x, quant), atol=1.01 * step.max())


def test_activation_extremes():
    tiny = jnp.full((1, 64), 1e-44, jnp.float32)
    levels, scales = quantize_activations(tiny, ActivationQuant())
    assert np.isfinite(scales).all() and np.abs(np.asarray(levels, int)).max() <= 127
    levels, scales = quantize_activations(jnp.asarray([[3e38, -3e38]], jnp.float32), ActivationQuant())
    np.testing.assert_array_equal(levels, [[127, -127]])


def test_max_over_shards_is_for_one_scale_a_token_only():
    x = jnp.ones((2, 64), jnp.float32)
    twice = lambda m: 2 * m
    np.testing.assert_allclose(quantize_activations(x, ActivationQuant(group=None), twice)[1], 2 / 127)
    np.testing.assert_allclose(quantize_activations(x, ActivationQuant(), twice)[1], 1 / 127)


def test_wrong_arguments_are_refused():
    x = jnp.ones((2, 64))
    with pytest.raises(ShapeError, match="same I"):
        quant_matmul(x, jnp.ones((4, 65)))
    with pytest.raises(ShapeError, match="QTensor"):
        quant_matmul(x, jnp.ones((4, 64), jnp.int8))
    with pytest.raises(ShapeError, match=r"bias must be \[4\]"):
        quant_matmul(x, jnp.ones((4, 64)), bias=jnp.ones(5))
    with pytest.raises(ShapeError, match="float"):
        quantize_activations(jnp.ones((2, 64), jnp.int32), ActivationQuant())


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_inputs_at_a_static_scale(rng, format):
    """What lies beyond the range of the scale is cut off; shards keep it, and what takes scales from the inputs refuses it."""
    kind, top = ("fp8", 448.0) if format == "fp8" else ("int8", 127.0)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    scale = np.float32(np.abs(x).max() / 2 / top)
    plain = round_to_nearest(
        rng.standard_normal((32, 64)).astype(np.float32), format=format, group=32 if format == "int4" else None
    )
    q = plain.replace(activation=ActivationQuant(group=None, format=kind, static=True), input_scale=np.full((1, 1), scale))
    levels = np.clip(x / scale, -top, top)
    levels = levels.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) if kind == "fp8" else np.rint(levels)
    expected = (levels * scale).astype(np.float64) @ dequantize(q).astype(np.float64).T
    np.testing.assert_allclose(jax.jit(quant_matmul)(jnp.asarray(x), on_device(q)), expected, rtol=1e-4, atol=1e-4)
    rows = take(q, axis=-2, unit=16, indices=[1])
    np.testing.assert_allclose(quant_matmul(jnp.asarray(x), on_device(rows)), expected[:, 16:], rtol=1e-4, atol=1e-4)
    halves = [
        quant_matmul(jnp.asarray(x[:, 32 * i : 32 * i + 32]), on_device(take(q, axis=-1, unit=32, indices=[i]))) for i in (0, 1)
    ]
    np.testing.assert_allclose(halves[0] + halves[1], expected, rtol=1e-4, atol=1e-4)
    for other in ("pallas", "native"):
        with pytest.raises(BackendError):
            quant_matmul(jnp.asarray(x), on_device(q), implementation=other)
    with pytest.raises(QuantizationError, match="not joined"):
        concatenate([q, q])
    with pytest.raises(QuantizationError, match="static scale is one for all"):
        ActivationQuant(group=64, static=True)
