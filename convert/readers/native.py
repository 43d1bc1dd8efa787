"""Native checkpoints, as `convert.native` writes them: arrays are opened one by one through tensorstore, without Orbax.

Orbax keeps them in an OCDBT store as zarr arrays of moderate chunks, so that a shard reads its chunks and not the whole array.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from convert.errors import ConversionError, NativeFormatError
from convert.readers import DESCRIPTION, FORMAT_VERSION, PARAMS
from convert.readers.base import (
    Checkpoint,
    LazyTensor,
    PackedFormat,
    Shard,
    cover_columns,
    dtype_named,
    read_assets,
    read_json,
    shard_shape,
)
from pallas_kernels.qtensor import ActivationQuant, QTensor
from sharding.partition import Units


def open_native(folder: Path) -> Checkpoint:
    """Open a native folder. Raises NativeFormatError for an unknown format_version or a damaged description."""
    try:
        description = read_json(folder / DESCRIPTION)
    except ConversionError as error:
        raise NativeFormatError(str(error)) from error
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise NativeFormatError(
            f"{folder / DESCRIPTION} has format_version {version!r}, not {FORMAT_VERSION}; convert the original again"
        )
    if not (folder / PARAMS).is_dir():
        raise NativeFormatError(f"{folder} has no folder {PARAMS}; the checkpoint is incomplete, copy or convert it again")
    store = _Store(folder / PARAMS)
    try:
        tensors = {path: _tensor(store, path, entry) for path, entry in description["tensors"].items()}
        config = dict(description["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NativeFormatError(f"{folder / DESCRIPTION} is damaged ({error!r}); copy or convert it again") from error
    return Checkpoint(path=folder, format="native", config=config, tensors=tensors, assets=read_assets(folder))


class _Store:
    """The arrays of one Orbax folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})  # what is read is not kept a second time

    def read(self, name: str, shape: tuple[int, ...], dtype: np.dtype, units: Sequence[Units | None]) -> np.ndarray:
        """A shard of one array. Raises NativeFormatError where the array is absent, cut off, or not as described."""
        base = {"driver": "file", "path": f"{self.folder}/"}
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        try:
            array = ts.open(spec, read=True, open=True, context=self._context).result()
            if (array.shape, array.dtype.numpy_dtype) != (shape, dtype):
                raise NativeFormatError(
                    f"{self.folder}: {name} is {array.dtype.numpy_dtype} {array.shape}, {DESCRIPTION} says {dtype} {shape}"
                )
            return _read_shard(array, shape, dtype, units)
        except ConversionError:
            raise
        except ValueError as error:  # tensorstore's own
            raise NativeFormatError(
                f"{self.folder}: {name} cannot be read; copy or convert the checkpoint again\n{error}"
            ) from error


def _read_shard(array: ts.TensorStore, shape: tuple[int, ...], dtype: np.dtype, units: Sequence[Units | None]) -> np.ndarray:
    slices = [slice(None) if unit is None else unit.as_slice() for unit in units]
    if None not in slices:
        return array[tuple(slices)].read().result() if shape else array.read().result()
    # scattered units: read the real elements of every axis, then put them among the zeros
    real = [np.arange(size) if unit is None else unit.elements for size, unit in zip(shape, units, strict=True)]
    places = [np.flatnonzero(elements >= 0) for elements in real]
    out = np.zeros(shard_shape(shape, units), dtype)
    if all(place.size for place in places):
        index = tuple(elements[place] for elements, place in zip(real, places, strict=True))
        out[np.ix_(*places)] = array.oindex[index].read().result()
    return out


def _tensor(store: _Store, path: str, entry: Mapping[str, Any]) -> LazyTensor:
    shape, dtype = tuple(entry["shape"]), dtype_named(entry["dtype"])
    if "format" not in entry:
        return _NativeTensor(store, path, shape, dtype)
    activation, zeros = entry["activation"], entry["zeros"]
    packed = PackedFormat(
        format=entry["format"],
        group=entry["group"],
        zeros=zeros is not None,
        scale_dtype=dtype_named(entry["scales"]),
        zeros_dtype=zeros and dtype_named(zeros),
        activation=activation and ActivationQuant(**activation),
    )
    return _NativeQTensor(store, path, shape, packed)


class _NativeTensor(LazyTensor):
    def __init__(self, store: _Store, name: str, shape: tuple[int, ...], dtype: np.dtype):
        self.name, self.shape, self.dtype = name, shape, dtype
        self._store = store

    def read(self, units: Shard = None) -> np.ndarray:
        return self._store.read(self.name, self.shape, self.dtype, self.shard(units))


class _NativeQTensor(LazyTensor):
    def __init__(self, store: _Store, name: str, shape: tuple[int, ...], packed: PackedFormat):
        self.name, self.shape, self.dtype, self.packed = name, shape, np.dtype(np.float32), packed
        self._store, self._packed = store, packed

    def read(self, units: Shard = None) -> QTensor:
        *lead, columns = self.shard(units)
        packed, inputs = self._packed, self.shape[-1]
        cover = cover_columns(columns, packed.group, inputs) if columns and packed.group else None
        read = cover.read if cover else None
        parts = {}
        for part in packed.parts(self.shape):
            by_group = packed.ordered and part in ("scales", "zeros")  # those of all groups: a shard may need any of them
            parts[part] = self._part(part, lead, None if by_group else columns if part == "values" and not cover else read)
        q = packed.tensor(**parts)
        return cover.cut(q) if cover else q

    def _part(self, part: str, lead: list[Units | None], columns: Units | None) -> np.ndarray:
        """One part; `columns` are in inputs of the logical weight, and are whole groups where there are groups."""
        shape, dtype = self._packed.parts(self.shape)[part]
        per = self.shape[-1] // shape[-1]
        if part == "input_scale":  # one for all inputs
            columns = None
        stored = Units(columns.size // per, columns.indices) if columns else None
        if part in ("order", "input_scale"):  # one row for all outputs
            lead = [*lead[:-1], None]
        if self._packed.format == "fp8" and part == "values":  # stored as bytes
            return self._store.read(f"{self.name}/{part}", shape, np.dtype(np.uint8), (*lead, stored)).view(dtype)
        return self._store.read(f"{self.name}/{part}", shape, dtype, (*lead, stored))
