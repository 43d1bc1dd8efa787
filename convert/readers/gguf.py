"""GGUF files: metadata, and tensors as plain arrays, packed QTensors (Q4_0, Q4_1, Q8_0) or dequantised floats.

The header is parsed here: `gguf.GGUFReader` takes seconds for a vocabulary, and cannot say that a file is truncated. Type sizes
and dequantisation are the gguf package's. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import functools
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from convert.errors import TruncatedFileError, UnsupportedFormatError
from convert.names import gguf as names
from convert.readers.base import (
    BFLOAT16,
    FLOAT16,
    Checkpoint,
    FileTensor,
    LazyTensor,
    MappedFile,
    PackedFormat,
    Shard,
    cover_columns,
    row_chunks,
    shard_shape,
)
from convert.readers.gguf_tokenizer import assets_from_metadata
from convert.rules import PermuteRows, transformed
from pallas_kernels.qtensor import QTensor
from sharding.partition import Units, gather

VERSIONS = (2, 3)
Type = GGMLQuantizationType
PLAIN = {
    Type.F64: np.dtype("<f8"),
    Type.F32: np.dtype("<f4"),
    Type.F16: np.dtype("<f2"),
    Type.BF16: BFLOAT16,
    Type.I64: np.dtype("<i8"),
    Type.I32: np.dtype("<i4"),
    Type.I16: np.dtype("<i2"),
    Type.I8: np.dtype("i1"),
}
BLOCK = 32  # inputs per block of the packed types
PACKED = {
    Type.Q4_0: PackedFormat(format="int4", group=BLOCK),
    Type.Q4_1: PackedFormat(format="int4", group=BLOCK, zeros=True, zeros_dtype=FLOAT16),
    Type.Q8_0: PackedFormat(format="int8", group=BLOCK),
}
_LENGTH = struct.Struct("<Q")
_SCALARS: dict[int, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """metadata: key -> value. tensors: name -> (shape outermost first, type, offset in the file)."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType, int]]


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file: config and tokenizer from its metadata, tensors under Hugging Face names, q and k rows half-split.

    Raises TruncatedFileError, and UnsupportedFormatError for a version, tensor type, rope scaling or tokenizer not known.
    """
    file = MappedFile(path)
    header = read_header(file)
    if header.metadata.get("split.count", 1) > 1:
        raise UnsupportedFormatError(
            f"{path} is one of {header.metadata['split.count']} parts; join them with llama-gguf-split --merge"
        )
    architecture = names.architecture_of(header.metadata)
    canonical = {names.canonical_name(name, architecture): entry for name, entry in header.tensors.items()}
    raw = {name: _tensor(file, name, *entry) for name, entry in canonical.items()}
    frequencies = raw.pop("rope_freqs.weight", None)
    config = names.config_from_metadata(header.metadata, {name: t.shape for name, t in raw.items()})
    if frequencies is not None:
        if "rope_scaling" in config:
            raise UnsupportedFormatError(f"{path} has both rope_freqs.weight and rope scaling {config['rope_scaling']}")
        config["rope_scaling"] = {"rope_type": "factors", "factors": np.asarray(frequencies.read(), np.float64).tolist()}
    tensors = {name: _half_split(t, config) for name, t in raw.items()}
    assets = assets_from_metadata(header.metadata)
    file.release(0, file.size)
    return Checkpoint(path=path, format="gguf", config=config, tensors=tensors, assets=assets)


def _half_split(tensor: LazyTensor, config: Mapping[str, Any]) -> LazyTensor:
    heads = names.rotary_heads(tensor.name, config) if config["model_type"] in names.INTERLEAVED else None
    if heads is None:
        return tensor
    if not isinstance(heads, int):
        raise UnsupportedFormatError(f"{tensor.name}: layers with different numbers of heads, {heads}, are not supported")
    if tensor.shape[0] % (2 * heads):
        raise UnsupportedFormatError(f"{tensor.name} has {tensor.shape[0]} rows, which are not {heads} heads of an even size")
    return transformed(tensor, (PermuteRows(functools.partial(names.half_split_order, heads=heads)),))


class _Cursor:
    """Reads values of the header one after another, and knows where the file ends."""

    def __init__(self, file: MappedFile):
        self.file, self.at = file, 0

    def take(self, count: int) -> bytes:
        if self.at + count > self.file.size:
            raise TruncatedFileError(
                f"{self.file.path} has {self.file.size} bytes, its header alone needs at least {self.at + count}; "
                "download or copy it again"
            )
        self.at += count
        return self.file.bytes(self.at - count, count)

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> str:
        return self.take(self.u64()).decode("utf-8", "replace")

    def strings(self, count: int) -> list[str]:
        """One after another, in few steps each: a vocabulary and its merges are a hundred thousand."""
        data, at, size, out = self.file.map, self.at, self.file.size, []
        for _ in range(count):
            start = at + 8
            end = start + _LENGTH.unpack_from(data, at)[0] if start <= size else size + 1
            if end > size:
                self.at = at
                self.string()  # says what is wrong
            out.append(data[start:end].decode("utf-8", "replace"))
            at = end
        self.at = at
        return out

    def value(self, kind: int):
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            inner, count = self.u32(), self.u64()
            if inner in _SCALARS:
                dtype = _SCALARS[inner]
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            if inner == GGUFValueType.STRING:
                return self.strings(count)
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise UnsupportedFormatError(f"{self.file.path}: metadata of type {kind} at byte {self.at}; the file is damaged")
        dtype = _SCALARS[kind]
        value = np.frombuffer(self.take(dtype.itemsize), dtype)[0]
        # 1e-5 was written as the nearest float32: give the shortest number that is that float32
        return float(str(value)) if dtype == np.float32 else value.item()


def read_header(file: MappedFile) -> Header:
    """Parse everything before the data, and check that the data is all there."""
    cursor, path = _Cursor(file), file.path
    if cursor.take(4) != b"GGUF":
        raise UnsupportedFormatError(f"{path} does not start with GGUF; the file is damaged or of another kind")
    version = cursor.u32()
    if version not in VERSIONS:
        hint = "a big-endian file" if version & 0xFFFF == 0 else "convert it again with a current llama.cpp"
        raise UnsupportedFormatError(f"{path} is GGUF version {version}, not one of {VERSIONS}: {hint}")
    tensor_count, pairs = cursor.u64(), cursor.u64()
    metadata = {}
    for _ in range(pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.u32())
    entries = []
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(cursor.u64() for _ in range(cursor.u32()))[::-1]
        entries.append((name, shape, cursor.u32(), cursor.u64()))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    tensors, needed = {}, start if entries else cursor.at
    for name, shape, kind, offset in entries:
        if kind not in GGML_QUANT_SIZES:
            raise UnsupportedFormatError(f"{path}: {name} has tensor type {kind}, unknown to the gguf package; update it")
        block, size = GGML_QUANT_SIZES[Type(kind)]
        if not shape or shape[-1] % block:
            raise UnsupportedFormatError(f"{path}: {name} {shape} is not made of the blocks of {block} of {Type(kind).name}")
        tensors[name] = (shape, Type(kind), start + offset)
        needed = max(needed, start + offset + math.prod(shape) // block * size)
    if file.size < needed:
        raise TruncatedFileError(f"{path} has {file.size} bytes, its header describes {needed}; download or copy it again")
    return Header(metadata=metadata, tensors=tensors)


@functools.cache
def _can_dequantize(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _tensor(file: MappedFile, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int) -> LazyTensor:
    if kind in PLAIN:
        return FileTensor(name, shape, PLAIN[kind], file, offset)
    if kind in PACKED and len(shape) > 1:
        return PackedTensor(name, shape, kind, file, offset)
    if not _can_dequantize(kind):
        raise UnsupportedFormatError(f"{file.path}: {name} has type {kind.name}, which cannot be dequantised; use Q8_0")
    return DequantizedTensor(name, shape, kind, file, offset)


class _BlockTensor(LazyTensor):
    """A tensor of blocks along its last axis."""

    dtype = np.dtype(np.float32)

    def __init__(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, file: MappedFile, offset: int):
        self.name, self.shape, self.kind = name, shape, kind
        self._file, self._offset = file, offset
        self.block, self.block_bytes = GGML_QUANT_SIZES[kind]

    def _blocks(self, lead: Sequence[Units | None], columns: Units | None) -> np.ndarray:
        """Bytes uint8 [..., blocks, block_bytes]; `columns` are whole blocks. Padding is zero bytes, which stand for zeros."""
        units = (*lead, Units(columns.size // self.block, columns.indices) if columns else None, None)
        shape = (*self.shape[:-1], self.shape[-1] // self.block, self.block_bytes)
        return self._file.read(self._offset, np.dtype(np.uint8), shape, units)


class PackedTensor(_BlockTensor):
    """Q4_0, Q4_1 and Q8_0: the bytes of the file as a QTensor in groups of 32, nothing rounded."""

    def __init__(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, file: MappedFile, offset: int):
        super().__init__(name, shape, kind, file, offset)
        self.packed = self._packed = PACKED[kind]

    def read(self, units: Shard = None) -> QTensor:
        *lead, columns = self.shard(units)
        cover = cover_columns(columns, BLOCK, self.shape[-1]) if columns else None
        q = self._unpack(self._blocks(lead, cover.read if cover else None))
        return cover.cut(q) if cover else q

    def _unpack(self, blocks: np.ndarray) -> QTensor:
        packed = self._packed
        half = lambda at: np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0]
        values = blocks[..., 4 if packed.zeros else 2 :].reshape(*blocks.shape[:-2], -1)
        return QTensor(
            values=values.view(np.int8) if packed.format == "int8" else values,
            scales=half(0),
            zeros=half(2) if packed.zeros else None,
            format=packed.format,
            group=packed.group,
        )


class DequantizedTensor(_BlockTensor):
    """Every other block type, as float32."""

    def read(self, units: Shard = None) -> np.ndarray:
        units = self.shard(units)
        if len(self.shape) == 1:
            row = DequantizedTensor(self.name, (1, *self.shape), self.kind, self._file, self._offset)
            return row.read((None, *units))[0].copy()
        columns = units[-1]
        cover = cover_columns(columns, self.block, self.shape[-1]) if columns else None
        read, local = (cover.read, Units(cover.unit, cover.indices)) if cover else (None, None)
        out = np.empty(shard_shape(self.shape, units), np.float32)
        for place, rows in row_chunks(self.shape, units[0], math.prod(self.shape[1:]) * 4):
            blocks = self._blocks((rows, *units[1:-1]), read)
            with np.errstate(all="ignore"):  # damaged scales are reported as non-finite weights, with the tensor's name
                values = dequantize(blocks.reshape(*blocks.shape[:-2], -1), self.kind)
            out[place] = gather(values, (*[None] * (len(units) - 1), local))
        return out
