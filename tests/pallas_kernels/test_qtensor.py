"""QTensor: every way between its forms is lossless, and its floats are those of a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import QuantizationError, ShapeError
from pallas_kernels.qtensor import (
    ActivationQuant,
    QTensor,
    concatenate,
    cpu32_rows,
    dequantize,
    levels,
    pack_int4,
    regroup,
    repack,
    round_to_nearest,
    take,
    unpack_int4,
)

FORMS = [
    {"format": "int8"},
    {"format": "int8", "group": 32},
    {"format": "int8", "group": 6},
    {"format": "int4", "group": 16},
    {"format": "int4", "group": 32},
    {"format": "int4", "group": 64, "symmetric": False},
    {"format": "int4", "group": 96},
    {"format": "int4", "group": 128, "symmetric": False},
]
IDS = ["-".join(str(v) for v in form.values()) for form in FORMS]
forms = pytest.mark.parametrize("form", FORMS, ids=IDS)


def weight(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def same(a: QTensor, b: QTensor):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def by_hand(q: QTensor):
    """float64 weights of a canonical QTensor, nibble by nibble."""
    lead, (outputs, inputs) = q.shape[:-2], q.shape[-2:]
    w = np.zeros(q.shape)
    group, block = q.group or inputs, min(q.group or 32, 32)
    for at in np.ndindex(*lead, outputs):
        for i in range(inputs):
            if q.format == "int8":
                level, offset = float(q.values[(*at, i)]), 0
            else:
                j = i % block
                byte = int(q.values[(*at, i // block * (block // 2) + j % (block // 2))])
                level, offset = (byte >> 4 if j >= block // 2 else byte & 15), 8
            scale = float(q.scales[(*at, i // group)])
            if q.zeros is None:
                w[(*at, i)] = (level - offset) * scale
            elif np.issubdtype(q.zeros.dtype, np.integer):
                w[(*at, i)] = (level - float(q.zeros[(*at, i // group)])) * scale
            else:
                w[(*at, i)] = level * scale + float(q.zeros[(*at, i // group)])
    return w


@forms
def test_values_are_those_of_the_oracle(rng, form):
    q = round_to_nearest(weight(rng, 2, 3, 384), **form)
    np.testing.assert_allclose(dequantize(q), by_hand(q), rtol=1e-6, atol=1e-6)


@forms
def test_rounding_is_to_the_nearest_level(rng, form):
    w = weight(rng, 5, 384)
    q = round_to_nearest(w, **form)
    step = np.repeat(q.scales.astype(np.float64), q.group or 384, -1)
    # scales are stored in float16: what they lose shows at the ends of the range, 8 steps or 15 away
    assert (np.abs(dequantize(q) - w) <= step * (0.5 + 16 * 2**-11)).all()
    assert q.shape == w.shape and q.nbytes <= w.nbytes / 2


def test_integer_zero_points(rng):
    values = rng.integers(0, 16, (4, 64), dtype=np.uint8)
    zeros = rng.integers(0, 16, (4, 2), dtype=np.uint8)
    q = QTensor(values=pack_int4(values, 32), scales=weight(rng, 4, 2), zeros=zeros, format="int4", group=32)
    np.testing.assert_allclose(dequantize(q), by_hand(q), rtol=1e-6)


@pytest.mark.parametrize("group", [2, 16, 32, 64, 128])
def test_pack_unpack(rng, group):
    for _ in range(5):
        values = rng.integers(0, 16, (*rng.integers(1, 4, 2), group * rng.integers(1, 5)), dtype=np.uint8)
        np.testing.assert_array_equal(unpack_int4(pack_int4(values, group), group), values)
        np.testing.assert_array_equal(pack_int4(jnp.asarray(values), group), pack_int4(values, group))


def test_packing_is_ggufs_order():
    packed = pack_int4(np.arange(32, dtype=np.uint8)[None] % 16, 32)
    np.testing.assert_array_equal(packed[0], [j | j << 4 for j in range(16)])


@forms
@pytest.mark.parametrize("layout", ["cpu32", "gpu"])
def test_repack_there_and_back(rng, form, layout):
    for lead in ((), (3,), (2, 1)):
        q = round_to_nearest(weight(rng, *lead, 64, 384), **form, activation=ActivationQuant())
        there = repack(q, layout)
        assert there.shape == q.shape and there.nbytes == q.nbytes
        same(repack(there, "canonical"), q)
        np.testing.assert_array_equal(dequantize(there), dequantize(q))
        same(repack(repack(there, "gpu" if layout == "cpu32" else "cpu32"), "canonical"), q)


def test_cpu32_streams_the_outputs_of_a_block():
    q = QTensor(values=np.arange(64 * 8, dtype=np.int16).astype(np.int8).reshape(64, 8), scales=np.ones((64, 1)), format="int8")
    packed = repack(q, "cpu32").values
    assert packed.shape == (2, 2, 32, 4)
    np.testing.assert_array_equal(packed[1, 0, 5], q.values[32 + 5, :4])
    with pytest.raises(QuantizationError, match="whole words"):
        repack(round_to_nearest(np.ones((32, 42), np.float32), format="int8"), "cpu32")


@forms
def test_cpu32_fills_its_last_block(rng, form):
    for lead in ((), (2,)):
        q = round_to_nearest(weight(rng, *lead, 37, 384), **form)
        there = repack(q, "cpu32")
        assert there.shape == q.shape and there.values.shape[len(lead)] == 2
        assert not np.asarray(there.scales).reshape(*lead, 2, -1, 32)[..., 1, :, 5:].any()
        same(repack(there, "canonical"), q)
        same(jax.jit(lambda q: repack(repack(q, "cpu32"), "canonical"))(q), q)
        if not lead:
            index = rng.integers(0, 37, (2, 3))
            same(cpu32_rows(there, index), jax.tree.map(lambda a, index=index: a[index], q))


@forms
def test_take_outputs(rng, form):
    q = round_to_nearest(weight(rng, 2, 12, 384), **form)
    whole = dequantize(q)
    for _ in range(4):
        unit = int(rng.choice([1, 2, 3, 4, 6]))
        units = rng.integers(-1, 12 // unit, rng.integers(1, 6))
        want = np.concatenate(
            [whole[:, u * unit : (u + 1) * unit] * (u >= 0) if u >= 0 else 0 * whole[:, :unit] for u in units], 1
        )
        np.testing.assert_array_equal(dequantize(take(q, axis=-2, unit=unit, indices=units)), want)


@forms
@pytest.mark.parametrize("unit", [2, 16, 32, 48, 64, 96, 128])
def test_take_inputs(rng, form, unit):
    q = round_to_nearest(weight(rng, 3, 384), **form)
    whole = dequantize(q)
    for _ in range(3):
        units = rng.integers(-1, 384 // unit, rng.integers(1, 6))
        want = np.concatenate([whole[:, u * unit : (u + 1) * unit] if u >= 0 else 0 * whole[:, :unit] for u in units], 1)
        cut = take(q, axis=-1, unit=unit, indices=units)
        assert cut.shape == want.shape
        np.testing.assert_array_equal(dequantize(cut), want)


def test_take_refuses_what_it_cannot_cut(rng):
    q = round_to_nearest(weight(rng, 4, 64), format="int4", group=32)
    with pytest.raises(ShapeError, match="axis 0"):
        take(q, axis=0, unit=1, indices=[0])
    with pytest.raises(QuantizationError, match="no even divisor"):
        take(q, axis=-1, unit=1, indices=[0])


@forms
def test_regroup_changes_no_value(rng, form):
    q = round_to_nearest(weight(rng, 3, 384), **form)
    for group in (2, 16, 32, 64):
        if q.group is not None and q.group % group == 0:
            smaller = regroup(q, group)
            assert smaller.group == group and smaller.scales.shape[-1] == 384 // group
            np.testing.assert_array_equal(dequantize(smaller), dequantize(q))
    if q.group is not None:
        with pytest.raises(QuantizationError, match="cannot be cut"):
            regroup(q, 10)


@forms
def test_concatenate(rng, form):
    parts = [round_to_nearest(weight(rng, n, 384), **form) for n in (1, 5, 2)]
    np.testing.assert_array_equal(dequantize(concatenate(parts)), np.concatenate([dequantize(p) for p in parts]))
    with pytest.raises(QuantizationError, match="one format"):
        concatenate([parts[0], parts[1].replace(activation=ActivationQuant())])


@forms
def test_the_same_under_jit(rng, form):
    w = weight(rng, 4, 384)
    q, traced = round_to_nearest(w, **form), jax.jit(lambda w: round_to_nearest(w, **form))(w)
    # XLA may divide with one rounding more: a level may differ by one where a value lies half way
    assert np.abs(levels(q).astype(int) - np.asarray(levels(traced)).astype(int)).max() <= 1
    device = jax.tree.map(jnp.asarray, q)
    np.testing.assert_array_equal(jax.jit(dequantize)(device), dequantize(q))
    same(
        jax.tree.map(np.asarray, jax.jit(lambda q: take(q, axis=-1, unit=64, indices=[1, -1]))(device)),
        take(q, axis=-1, unit=64, indices=[1, -1]),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    w = np.ones((2, 32), np.float32)
    w[1, 7] = bad
    for form in FORMS[:1] + FORMS[4:6]:
        form = {**form, "group": 32 if form.get("group") else None}
        with pytest.raises(QuantizationError, match="NaN or infinity"):
            round_to_nearest(w, **form)


def test_groups_of_zeros_stay_zero():
    for form in FORMS:
        q = round_to_nearest(np.zeros((2, 384), np.float32), **form)
        assert (dequantize(q) == 0).all() and np.isfinite(q.scales).all()


@pytest.mark.parametrize(
    ("form", "match"),
    [
        ({"format": "int2"}, "not one of"),
        ({"format": "int4"}, "needs a group"),
        ({"format": "int4", "group": 31}, "even"),
        ({"format": "int8", "symmetric": False}, "symmetric"),
        ({"format": "int4", "group": 256}, "does not divide 384.*choose one of"),
    ],
)
def test_forms_that_do_not_exist(form, match):
    with pytest.raises(QuantizationError, match=match):
        round_to_nearest(np.ones((2, 384), np.float32), **form)


def test_values_beyond_the_scales_dtype():
    with pytest.raises(QuantizationError, match="scale_dtype=float32"):
        round_to_nearest(np.full((1, 32), 1e6, np.float32), format="int4", group=32)


def test_activation_quant_is_checked():
    with pytest.raises(QuantizationError, match="bits 4"):
        ActivationQuant(bits=4)
    with pytest.raises(QuantizationError, match="group 0"):
        ActivationQuant(group=0)
