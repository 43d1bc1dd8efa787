"""From lazy tensors to arrays in the form that is kept: cast, quantised, checked for NaN, in pieces that hold little memory.

Every wrapper is a LazyTensor again, so that a shard of it reads only what it needs. A result is filled piece by piece: beside
it a read holds about CHUNK_BYTES of float32, never the whole tensor.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from convert.errors import NonFiniteWeightError
from convert.readers.base import LazyTensor, PackedFormat, Shard, cover_columns, dtype_named, row_chunks, shard_shape
from pallas_kernels import qtensor
from pallas_kernels.errors import QuantizationError
from pallas_kernels.qtensor import ActivationQuant, QTensor
from pallas_kernels.value_formats import FP8_NAN, MX_NAN
from sharding.partition import Units

type Progress = Callable[[int, int, str], None]  # done bytes, total bytes, name of what was just done


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How weights are quantised by rounding to the nearest level.

    format: int8, int4, fp8, nf4 or mxfp4. group: inputs per scale, None for one per output channel (int8 and fp8). symmetric: False
    stores a minimum per group (int4 only). activation: how inputs are quantised in matmuls, or None. scale_dtype: of the scales, or
    None for the format's own. Raises QuantizationError for what does not exist.
    """

    format: str
    group: int | None = None
    symmetric: bool = True
    activation: ActivationQuant | None = None
    scale_dtype: str | None = None

    def __post_init__(self):
        qtensor.check_format(self.format, self.group, self.symmetric)


def check_finite(array: np.ndarray, name: str) -> np.ndarray:
    """`array` itself. Raises NonFiniteWeightError, with the tensor's name, for NaN or infinity in it; integers pass."""
    if _is_float(array.dtype) and not all(map(math.isfinite, _extremes(array))):
        bad = ~np.isfinite(array.astype(np.float32))
        raise NonFiniteWeightError(
            f"{name} holds {int(bad.sum())} NaN or infinite values among {array.size}; the checkpoint is damaged: get it again"
        )
    return array


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or (dtype.kind == "V" and dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"))


def _extremes(array: np.ndarray) -> tuple[float, ...]:
    """The least and the largest value, which carry NaN and infinity on; nothing of an empty array."""
    # the dtypes of ml_dtypes reduce slowly, so they go through float32
    wide = array if array.dtype.kind in "fiu" else array.astype(np.float32)
    return (float(wide.min()), float(wide.max())) if array.size else ()


def _check_parts(q: QTensor, name: str) -> QTensor:
    if q.format == "mxfp4":
        bad = q.scales == MX_NAN
    elif q.format == "fp8":
        bad = (q.values.view(np.uint8) & FP8_NAN) == FP8_NAN
    else:
        bad = np.zeros(0, bool)
    if bad.any():
        raise NonFiniteWeightError(
            f"{name} holds {int(bad.sum())} NaN among its {bad.size} {'scales' if q.format == 'mxfp4' else 'values'}; "
            "the checkpoint is damaged: get it again"
        )
    check_finite(np.asarray(q.scales), f"{name} (scales)")
    if q.zeros is not None:
        check_finite(np.asarray(q.zeros), f"{name} (zeros)")
    if q.input_scale is not None:
        check_finite(np.asarray(q.input_scale), f"{name} (input scale)")
    return q


def _float_pieces(t: LazyTensor, units: Sequence[Units | None]) -> Iterator[tuple[slice | tuple, np.ndarray]]:
    """A shard as checked float pieces along its first axis: (place in the result, values). Packed tensors are dequantised."""
    if not t.shape:
        yield (), check_finite(np.asarray(t.read(units)), t.name)
        return
    # at most float32, and half of CHUNK_BYTES each because dequantising holds several arrays of a piece
    row_bytes = math.prod(shard_shape(t.shape, units)[1:]) * 8
    for place, rows in row_chunks(t.shape, units[0], row_bytes):
        piece = t.read((rows, *units[1:]))
        if isinstance(piece, QTensor):
            piece = qtensor.dequantize(_check_parts(piece, t.name))
        yield place, check_finite(piece, t.name)


class _Wrapper(LazyTensor):
    def __init__(self, source: LazyTensor):
        self.name, self.shape = source.name, source.shape
        self._source = source


class _Cast(_Wrapper):
    def __init__(self, source: LazyTensor, dtype: np.dtype):
        super().__init__(source)
        self.dtype = dtype
        self._limit = float(ml_dtypes.finfo(dtype).max)

    def read(self, units: Shard = None) -> np.ndarray:
        units = self.shard(units)
        out = np.empty(shard_shape(self.shape, units), self.dtype)
        for place, piece in _float_pieces(self._source, units):
            largest = max(map(abs, _extremes(piece)), default=0.0)
            if largest > self._limit:
                raise NonFiniteWeightError(
                    f"{self.name} holds values up to {largest:g}, {self.dtype.name} only up to {self._limit:g}; use another"
                )
            out[place] = piece
        return out


class _Checked(_Wrapper):
    """As it is, checked for NaN."""

    def __init__(self, source: LazyTensor):
        super().__init__(source)
        self.dtype, self.packed = source.dtype, source.packed

    def read(self, units: Shard = None) -> np.ndarray | QTensor:
        value = self._source.read(units)
        return _check_parts(value, self.name) if isinstance(value, QTensor) else check_finite(value, self.name)


class _WithActivation(_Wrapper):
    def __init__(self, source: LazyTensor, packed: PackedFormat):
        super().__init__(source)
        self.dtype, self.packed = source.dtype, packed
        self._activation = packed.activation

    def read(self, units: Shard = None) -> QTensor:
        value = self._source.read(units)
        assert isinstance(value, QTensor)  # a packed source
        return _check_parts(value, self.name).replace(activation=self._activation, input_scale=None)


class _Quantized(_Wrapper):
    dtype = np.dtype(np.float32)

    def __init__(self, source: LazyTensor, spec: QuantSpec):
        super().__init__(source)
        if len(source.shape) < 2:
            raise QuantizationError(f"{source.name} has shape {source.shape}; only matrices are quantised")
        if source.shape[-1] % (spec.group or 1):
            raise QuantizationError(
                f"{source.name}: groups of {spec.group} do not divide its {source.shape[-1]} inputs; "
                f"choose one of {qtensor.divisors(source.shape[-1])}"
            )
        self._spec = spec
        scale = np.dtype(spec.scale_dtype or qtensor.default_scale_dtype(spec.format))
        self.packed = self._packed = PackedFormat(
            format=spec.format,
            group=spec.group,
            zeros=not spec.symmetric,
            scale_dtype=scale,
            zeros_dtype=None if spec.symmetric else scale,
            activation=spec.activation,
        )

    def read(self, units: Shard = None) -> QTensor:
        *lead, columns = self.shard(units)
        spec, inputs, scale = self._spec, self.shape[-1], self._packed.scale_dtype
        # the logical tensor is quantised, so that every mesh holds the same bytes: a scale sees all of its inputs
        cover = cover_columns(columns, spec.group or inputs, inputs) if columns else None
        read = (*lead, cover.read if cover else None)
        shape = shard_shape(self.shape, read)
        parts = {part: np.empty(*layout) for part, layout in self._packed.parts(shape).items()}
        for place, piece in _float_pieces(self._source, read):
            try:
                with np.errstate(over="ignore"):  # a value too large for the scales is raised as an error
                    q = qtensor.round_to_nearest(
                        piece, format=spec.format, group=spec.group, symmetric=spec.symmetric, scale_dtype=scale
                    )
            except QuantizationError as error:
                raise QuantizationError(f"{self.name}: {error}") from error
            for part, array in parts.items():
                array[place] = getattr(q, part)
        for axis, unit in enumerate(lead):  # padding holds the same bytes however a shard was made, as in qtensor.take
            for array in parts.values():
                if unit is not None:
                    array[(slice(None),) * axis + (unit.elements < 0,)] = 0
        whole = self._packed.tensor(**parts)
        return cover.cut(whole) if cover else whole


def as_float(t: LazyTensor) -> LazyTensor:
    """`t` in its own float dtype, checked; a packed tensor dequantised to float32."""
    return _Cast(t, np.dtype(np.float32)) if t.packed else checked(t)


def cast(t: LazyTensor, dtype: np.dtype | str | type) -> LazyTensor:
    """`t` in another float dtype, dequantised where it is packed.

    Reading raises NonFiniteWeightError for NaN, infinity, and values that overflow `dtype`.
    """
    return _Cast(t, dtype_named(dtype) if isinstance(dtype, str) else np.dtype(dtype))


def checked(t: LazyTensor) -> LazyTensor:
    """`t` as it is; reading raises NonFiniteWeightError for NaN or infinity, in a packed tensor's scales and zeros too."""
    return _Checked(t)


def quantized(t: LazyTensor, spec: QuantSpec) -> LazyTensor:
    """`t` rounded to the nearest levels of `spec`; reading gives a QTensor.

    The logical tensor is quantised: a column shard of a per-channel weight reads whole rows, of a group-wise one its groups.
    Raises QuantizationError for a tensor that is no matrix, or whose inputs the group does not divide.
    """
    return _Quantized(t, spec)


def with_activation(t: LazyTensor, activation: ActivationQuant | None) -> LazyTensor:
    """A packed tensor as it is, its inputs quantised as `activation` says. Raises QuantizationError if it is not packed."""
    if t.packed is None:
        raise QuantizationError(f"{t.name} is not packed; use quantized(t, QuantSpec(..., activation=...))")
    if activation is not None and activation.static:
        raise QuantizationError(f"{t.name}: a static scale of inputs comes from a text; use jaxinfer quantize")
    return _WithActivation(t, dataclasses.replace(t.packed, activation=activation))


def materialize(tensors: Mapping[str, LazyTensor], progress: Progress | None = None) -> dict[str, np.ndarray | QTensor]:
    """Read every tensor whole, checked for NaN: {path: array or QTensor}. `progress(done, total, path)` counts result bytes."""
    total, done = sum(t.nbytes for t in tensors.values()), 0
    out = {}
    for path, tensor in tensors.items():
        out[path] = (tensor if isinstance(tensor, _Wrapper) else checked(tensor)).read()
        done += tensor.nbytes
        if progress:
            progress(done, total, path)
    return out
