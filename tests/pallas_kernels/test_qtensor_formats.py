"""Formats beside INT8 and INT4: their values, their cuts and joins, and that a matmul with them is the reference's or refused."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.errors import BackendError, QuantizationError
from pallas_kernels.qtensor import (
    ActivationQuant,
    QTensor,
    check_format,
    concatenate,
    dequantize,
    levels,
    pack_int4,
    regroup,
    repack,
    round_to_nearest,
    take,
    unpack_int4,
)
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quantize import dequantize_activations, quantize_activations
from pallas_kernels.value_formats import E2M1, NF4

INPUTS = 192


def weight(rng, *shape):
    return (rng.standard_normal(shape) * 0.1).astype(np.float32)


def ordered(rng, outputs, group=32, zeros=True):
    """int4 with its inputs' groups in a random order."""
    count = INPUTS // group
    return QTensor(
        values=pack_int4(rng.integers(0, 16, (outputs, INPUTS), dtype=np.uint8), group),
        scales=rng.uniform(0.01, 0.1, (outputs, count)).astype(np.float16),
        zeros=rng.integers(0, 16, (outputs, count), dtype=np.uint8) if zeros else None,
        format="int4_ordered",
        group=group,
        order=rng.permutation(np.arange(INPUTS) // group)[None].astype(np.int32),
    )


def bytes_with_zeros(rng, outputs, group=64):
    return QTensor(
        values=rng.integers(0, 256, (outputs, INPUTS), dtype=np.uint8),
        scales=rng.uniform(0.001, 0.01, (outputs, INPUTS // group)).astype(np.float32),
        zeros=rng.integers(100, 156, (outputs, INPUTS // group), dtype=np.uint8),
        format="uint8",
        group=group,
    )


MAKE = {
    "fp8": lambda rng, n: round_to_nearest(weight(rng, n, INPUTS), format="fp8"),
    "fp8-64": lambda rng, n: round_to_nearest(weight(rng, n, INPUTS), format="fp8", group=64),
    "nf4": lambda rng, n: round_to_nearest(weight(rng, n, INPUTS), format="nf4", group=64),
    "nf4-96": lambda rng, n: round_to_nearest(weight(rng, n, INPUTS), format="nf4", group=96),
    "mxfp4": lambda rng, n: round_to_nearest(weight(rng, n, INPUTS), format="mxfp4", group=32),
    "uint8": bytes_with_zeros,
    "ordered": ordered,
    "ordered-symmetric": lambda rng, n: ordered(rng, n, zeros=False),
}
every = pytest.mark.parametrize("name", MAKE)


def by_hand(q):
    """float64 weights [O, I], one by one."""
    w = np.zeros(q.shape)
    n = np.asarray(levels(q))
    group = q.group or q.shape[1]
    for o, i in np.ndindex(*q.shape):
        g = i // group if q.order is None else int(q.order[0, i])
        v, s = n[o, i], q.scales[o, g]
        if q.format == "mxfp4":
            sign, exponent, mantissa = int(v) >> 3, int(v) >> 1 & 3, int(v) & 1
            magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
            w[o, i] = (-1) ** sign * magnitude * 2.0 ** (int(s) - 127)
        elif q.format == "nf4":
            w[o, i] = float(NF4[v]) * float(s)
        elif q.format == "fp8":
            w[o, i] = float(v) * float(s)
        else:
            w[o, i] = (float(v) - (8 if q.zeros is None else float(q.zeros[o, g]))) * float(s)
    return w


@every
def test_values_are_those_of_the_oracle(rng, name):
    q = MAKE[name](rng, 5)
    np.testing.assert_allclose(dequantize(q), by_hand(q), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(jax.jit(dequantize)(jax.tree.map(jnp.asarray, q)), dequantize(q))


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({"format": "fp8"}, np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)),
        ({"format": "fp8", "group": 32}, np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)),
        ({"format": "nf4", "group": 64}, NF4.astype(np.float64)),
        ({"format": "mxfp4", "group": 32}, E2M1.astype(np.float64)),
    ],
)
def test_rounding_is_to_the_nearest(rng, options, grid):
    w = weight(rng, 4, INPUTS)
    q = round_to_nearest(w, **options)
    scales = 2.0 ** (q.scales.astype(np.float64) - 127) if q.format == "mxfp4" else q.scales.astype(np.float64)
    step = np.repeat(scales, INPUTS // scales.shape[-1], -1)
    nearest = np.nanmin(np.abs(np.clip(w / step, np.nanmin(grid), np.nanmax(grid))[..., None] - grid), -1)
    inside = np.abs(w / step) <= np.nanmax(grid)
    assert inside.mean() > 0.9
    error = np.abs(dequantize(q) / step - w / step)
    # float32 division: half a unit in the last place of the largest level
    np.testing.assert_allclose(error[inside], nearest[inside], atol=np.nanmax(grid) * 2.0**-22)
    traced = jax.jit(lambda w: dequantize(round_to_nearest(w, **options)))(w)
    same = np.isclose(traced, dequantize(q), rtol=1e-6, atol=0)  # XLA may divide with one rounding more
    assert same.mean() > 0.98


def test_ties_go_to_the_even_mantissa():
    w = np.zeros((1, 32), np.float32)
    w[0, :8] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    w[0, 8:16] = -w[0, :8]
    q = round_to_nearest(w, format="mxfp4", group=32)
    assert q.scales[0, 0] == 127
    np.testing.assert_array_equal(dequantize(q)[0, :8], [6, 0, 1, 1, 2, 2, 4, 4])
    np.testing.assert_array_equal(dequantize(q)[0, 8:16], [-6, 0, -1, -1, -2, -2, -4, -4])


def test_zeros_stay_zero():
    for options in ({"format": "fp8"}, {"format": "nf4", "group": 64}, {"format": "mxfp4", "group": 32}):
        zeros = np.zeros((2, INPUTS), np.float32)
        assert (dequantize(round_to_nearest(zeros, **options)) == 0).all()
    traced = jax.jit(lambda w: dequantize(round_to_nearest(w, format="mxfp4", group=32)))(zeros)
    assert (traced == 0).all()


@every
def test_take(rng, name):
    q = MAKE[name](rng, 12)
    whole = dequantize(q)
    for unit, indices in ((3, [2, -1, 0]), (1, [11, 4, -1])):
        want = np.concatenate([whole[u * unit : (u + 1) * unit] if u >= 0 else 0 * whole[:unit] for u in indices])
        np.testing.assert_array_equal(dequantize(take(q, axis=-2, unit=unit, indices=indices)), want)
    for unit, indices in ((64, [2, -1, 0]), (32, [1]), (8, [5, -1, 23]), (6, [3, 31])):
        want = np.concatenate([whole[:, u * unit : (u + 1) * unit] if u >= 0 else 0 * whole[:, :unit] for u in indices], 1)
        cut = take(q, axis=-1, unit=unit, indices=indices)
        assert cut.shape == want.shape
        np.testing.assert_array_equal(dequantize(cut), want)
    traced = jax.jit(lambda q: take(q, axis=-1, unit=6, indices=[3, 31]))(jax.tree.map(jnp.asarray, q))
    jax.tree.map(np.testing.assert_array_equal, traced, cut)


@every
def test_join_and_regroup(rng, name):
    q = MAKE[name](rng, 8)
    parts = [take(q, axis=-2, unit=1, indices=part) for part in ([0, 1, 2], [3], [4, 5, 6, 7])]
    jax.tree.map(np.testing.assert_array_equal, concatenate(parts), q)
    if q.group:
        np.testing.assert_array_equal(dequantize(regroup(q, 16)), dequantize(q))
    if q.order is None:
        gpu = repack(q, "gpu")
        assert gpu.shape == q.shape
        np.testing.assert_array_equal(dequantize(gpu), dequantize(q))


def test_a_stack_of_ordered_weights(rng):
    parts = [ordered(rng, 6) for _ in range(3)]
    stack = jax.tree.map(lambda *a: np.stack(a), *parts)
    np.testing.assert_array_equal(dequantize(stack), np.stack([dequantize(p) for p in parts]))


def test_what_ordered_weights_refuse(rng):
    q = ordered(rng, 32)
    with pytest.raises(QuantizationError, match="canonical layout only"):
        repack(q, "cpu32")
    with pytest.raises(QuantizationError, match="same groups"):
        concatenate([q, ordered(rng, 4)])


@every
def test_matmuls_take_the_reference(rng, name):
    q, x = MAKE[name](rng, 7), rng.standard_normal((3, INPUTS)).astype(np.float32)
    device = jax.tree.map(jnp.asarray, q)
    y = jax.jit(lambda x, q: quant_matmul(x, q))(x, device)
    np.testing.assert_allclose(y, x.astype(np.float64) @ by_hand(q).T, rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendError, match=f"not {q.format}, which the reference does"):
        quant_matmul(x, device, implementation="xla")


@pytest.mark.parametrize("group", [None, 64])
def test_fp8_inputs(rng, group):
    quant = ActivationQuant(format="fp8", group=group)
    x = rng.standard_normal((4, INPUTS)).astype(np.float32)
    q = round_to_nearest(weight(rng, 6, INPUTS), format="fp8", activation=quant)
    values, scales = quantize_activations(x, quant)
    assert values.dtype == jnp.float8_e4m3fn and scales.shape == (4, 1 if group is None else 3)
    seen = np.asarray(dequantize_activations(values, scales, quant), np.float64)
    spread = np.abs(seen - x) / np.repeat(np.abs(x.reshape(4, -1, group or INPUTS)).max(-1), group or INPUTS, -1)
    assert spread.max() <= 2**-4 and np.isfinite(seen).all()  # half a step of the largest binade
    y = quant_matmul(x, jax.tree.map(jnp.asarray, q))
    np.testing.assert_allclose(y, seen @ by_hand(q).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": "uint8"}, "from checkpoints only"),
        ({"format": "int4_ordered", "group": 32}, "from checkpoints only"),
        ({"format": "fp7"}, "not one of"),
        ({"format": "nf4", "group": None}, "needs a group"),
        ({"format": "mxfp4", "group": 64}, "groups of 32, not 64"),
        ({"format": "fp8", "group": None, "symmetric": False}, "fp8 is symmetric"),
    ],
)
def test_forms_that_do_not_exist(options, match):
    with pytest.raises(QuantizationError, match=match):
        check_format(**({"group": None} | options))


def test_other_refusals(rng):
    with pytest.raises(QuantizationError, match="fp8 inputs meet fp8 weights only"):
        round_to_nearest(weight(rng, 2, 32), format="int8", activation=ActivationQuant(format="fp8"))
    with pytest.raises(QuantizationError, match="activation format 'int4'"):
        ActivationQuant(format="int4")
    with pytest.raises(QuantizationError, match="exponents of a byte"):
        round_to_nearest(weight(rng, 2, 32), format="mxfp4", group=32, scale_dtype=np.float16)
    per_channel = bytes_with_zeros(rng, 3, group=INPUTS).replace(group=None)
    with pytest.raises(QuantizationError, match="it needs groups"):
        take(per_channel, axis=-1, unit=32, indices=[0, -1])
    with pytest.raises(QuantizationError, match="'int3' is not one of"):
        assert QTensor(values=np.zeros((2, 2)), scales=np.ones((2, 1)), format="int3").shape


def test_a_format_of_one_byte_is_never_unpacked(rng):
    q = MAKE["nf4"](rng, 3)
    assert unpack_int4(q.values, q.group).shape == q.shape == levels(q).shape
    assert levels(MAKE["fp8"](rng, 3)).dtype == ml_dtypes.float8_e4m3fn
