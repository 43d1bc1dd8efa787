"""Casting and quantising lazily: same bytes for every shard, NaN refused by name, little memory."""

import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from convert.errors import NonFiniteWeightError
from convert.load import QuantSpec, as_float, cast, checked, materialize, quantized, with_activation
from convert.readers.base import CHUNK_BYTES
from pallas_kernels import qtensor
from pallas_kernels.errors import QuantizationError
from pallas_kernels.qtensor import ActivationQuant
from sharding.partition import Units, gather

RNG = np.random.default_rng(3)
SPECS = [
    QuantSpec(format="int8"),
    QuantSpec(format="int8", group=32),
    QuantSpec(format="int4", group=64, activation=ActivationQuant()),
    QuantSpec(format="int4", group=32, symmetric=False),
    QuantSpec(format="int4", group=128),
    QuantSpec(format="int8", group=32, scale_dtype="float16"),
    QuantSpec(format="fp8", activation=ActivationQuant(format="fp8", group=None)),
    QuantSpec(format="nf4", group=64),
    QuantSpec(format="mxfp4", group=32),
]
SHARDS = [
    (None, None),
    (Units(3, (2, 0)), None),
    (None, Units(64, (1, 3))),
    (Units(1, (4, -1)), Units(128, (1, -1))),
    (None, Units(16, (5, 2, -1))),
    (Units(3, (-1,)), Units(96, (1, 0))),
]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def oracle_take(q, units):
    for axis, unit in zip((-2, -1), units, strict=True):
        if unit is not None:
            q = qtensor.take(q, axis=axis, unit=unit.size, indices=unit.indices)
    return q


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("units", SHARDS)
def test_quantized_shards_hold_the_bytes_of_the_whole(lazy, spec, units):
    array = RNG.standard_normal((9, 384)).astype(np.float32)
    whole = qtensor.round_to_nearest(array, **vars(spec))
    tensor = quantized(lazy("w", array), spec)
    shard, truth = tensor.read(units), oracle_take(whole, units)
    same(shard, truth)
    assert shard.activation == spec.activation == tensor.packed.activation
    assert tensor.nbytes == whole.nbytes
    assert (tensor.packed.scale_dtype, tensor.packed.zeros) == (whole.scales.dtype, whole.zeros is not None)
    floats = cast(tensor, np.float32).read(units)  # a packed tensor that is dequantised
    np.testing.assert_array_equal(floats, gather(qtensor.dequantize(whole), units))


def test_what_a_column_shard_reads(lazy):
    source = lazy("w", RNG.standard_normal((4, 384)).astype(np.float32))
    units = (None, Units(64, (5, 1)))
    quantized(source, QuantSpec(format="int4", group=32)).read(units)
    assert {asked[1] for asked in source.asked} == {Units(64, (1, 5))}
    source.asked.clear()
    quantized(source, QuantSpec(format="int8")).read(units)
    assert {asked[1].length for asked in source.asked} == {384}  # a scale per channel sees the whole row


def test_experts_are_quantised_one_by_one(lazy):
    array = RNG.standard_normal((3, 8, 64)).astype(np.float32)
    tensor = quantized(lazy("w", array), QuantSpec(format="int4", group=32))
    same(tensor.read(), qtensor.round_to_nearest(array, format="int4", group=32))
    shard = tensor.read((Units(1, (2,)), Units(4, (1,)), Units(32, (1,))))
    same(shard, qtensor.round_to_nearest(array[2:, 4:, 32:], format="int4", group=32))


@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16", np.float64])
def test_cast(lazy, source, target):
    array = RNG.standard_normal((6, 10)).astype(source)
    dtype = ml_dtypes.bfloat16 if target == "bfloat16" else np.dtype(target)
    tensor = cast(lazy("w", array), target)
    units = (Units(2, (2, -1)), Units(5, (1,)))
    assert tensor.dtype == dtype and tensor.read().dtype == dtype
    np.testing.assert_array_equal(tensor.read(units), gather(array.astype(dtype), units))
    scalar = cast(lazy("s", np.array(2.5, source)), target).read()
    assert scalar.shape == () and scalar == 2.5
    assert as_float(lazy("w", array)).dtype == source


def test_errors_of_quantizing(lazy):
    matrix = lazy("w", np.ones((4, 96), np.float32))
    with pytest.raises(QuantizationError, match=r"w: groups of 64 do not divide its 96 inputs; choose one of \[16, 32\]"):
        quantized(matrix, QuantSpec(format="int4", group=64))
    with pytest.raises(QuantizationError, match=r"norm has shape \(96,\); only matrices"):
        quantized(lazy("norm", np.ones(96)), QuantSpec(format="int8"))
    with pytest.raises(QuantizationError, match="int4 needs a group"):
        QuantSpec(format="int4")
    with pytest.raises(QuantizationError, match="w is not packed"):
        with_activation(matrix, ActivationQuant())
    big = lazy("big", np.full((2, 64), 1e7, np.float32))
    with pytest.raises(QuantizationError, match="big: values up to 1e"):
        quantized(big, QuantSpec(format="int4", group=32)).read()


def test_with_activation(lazy):
    packed = quantized(lazy("w", np.ones((4, 64), np.float32)), QuantSpec(format="int8"))
    tensor = with_activation(packed, ActivationQuant(group=32))
    same(tensor.read().replace(activation=None), packed.read())
    assert tensor.read((Units(2, (0,)), None)).activation == tensor.packed.activation == ActivationQuant(group=32)
    assert with_activation(tensor, None).read().activation is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_not_finite(lazy, bad, dtype):
    array = np.zeros((4, 64), dtype)
    array[3, 5] = bad
    source = lazy("model.layers.3.w", array)
    wrapped = [checked(source), as_float(source), cast(source, "float16"), quantized(source, QuantSpec(format="int8"))]
    for tensor in wrapped:
        with pytest.raises(NonFiniteWeightError, match=r"model.layers.3.w holds 1 NaN or infinite"):
            tensor.read()
    with pytest.raises(NonFiniteWeightError):
        materialize({"path": source})
    wrapped[0].read((Units(1, (0, 1)), None))  # a shard without it
    assert checked(lazy("ids", np.array([1, 2]))).read().tolist() == [1, 2]


def test_not_finite_scales(lazy):
    q = qtensor.round_to_nearest(np.ones((2, 64), np.float32), format="int4", group=32, symmetric=False)
    packed = quantized(lazy("w", np.ones((2, 64), np.float32)), QuantSpec(format="int4", group=32, symmetric=False))
    for part in ("scales", "zeros"):
        damaged = getattr(q, part).copy()
        damaged[1, 0] = np.nan
        packed.read = lambda units=None, part=part, damaged=damaged: q.replace(**{part: damaged})
        for tensor in (checked(packed), as_float(packed), with_activation(packed, None)):
            with pytest.raises(NonFiniteWeightError, match=rf"w \({part}\) holds 1 NaN"):
                tensor.read()


def test_overflow(lazy):
    source = lazy("w", np.array([[1.0, 70000.0]], np.float32))
    with pytest.raises(NonFiniteWeightError, match="w holds values up to 70000, float16 only up to 65504"):
        cast(source, "float16").read()
    assert cast(source, "bfloat16").read()[0, 1] == 70144


def test_materialize(lazy):
    a, b = np.ones((2, 3), np.float32), RNG.standard_normal((4, 64)).astype(np.float32)
    seen = []
    tensors = {"a": cast(lazy("A", a), "float16"), "b": quantized(lazy("B", b), QuantSpec(format="int8"))}
    values = materialize(tensors, lambda *call: seen.append(call))
    assert values["a"].dtype == np.float16 and values["b"].format == "int8"
    total = 12 + 4 * 64 + 4 * 4
    assert seen == [(12, total, "a"), (total, total, "b")]


@pytest.mark.parametrize("make", [lambda t: cast(t, "bfloat16"), lambda t: quantized(t, QuantSpec(format="int4", group=32))])
def test_memory_beside_the_result(hf_folder, make):
    """A whole tensor in float32 is never held: only pieces of it beside the result."""
    from convert.readers import open_checkpoint

    array = RNG.standard_normal((24576, 1024), np.float32).astype(np.float16)  # 96 MiB as float32
    source = open_checkpoint(hf_folder({"model.safetensors": {"w": array}})).tensors["w"]
    del array
    tensor = make(source)
    tracemalloc.start()
    try:
        tensor.read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - tensor.nbytes < 5 * CHUNK_BYTES < 24576 * 1024 * 4 // 2
