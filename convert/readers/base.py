"""Lazy tensors: a name, a shape and a way to read any shard of it, and the memory map that they read from."""

import abc
import dataclasses
import functools
import json
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from convert.errors import ConversionError, TruncatedFileError, UnsupportedFormatError
from pallas_kernels import qtensor
from pallas_kernels.qtensor import ActivationQuant, QTensor
from pallas_kernels.value_formats import VALUE_FORMATS, ValueFormat
from sharding.partition import Units, gather

# What a read maps or holds beside its result. Pieces of it stay in the second-level cache, and below the size from which malloc takes fresh
# pages from the system for every array: with 8 MB, page faults were more than half of the time of loading.
CHUNK_BYTES = 1 << 20
FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

type Shard = Sequence[Units | None] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """How a packed tensor is stored: the meta fields and part dtypes of the QTensor that `read` returns.

    zeros: whether it has zeros. scale_dtype, zeros_dtype: of the parts; zeros_dtype is None without zeros. Raises
    QuantizationError for a format that does not exist.
    """

    format: str
    group: int | None
    zeros: bool = False
    scale_dtype: np.dtype = FLOAT16
    zeros_dtype: np.dtype | None = None
    activation: ActivationQuant | None = None

    def __post_init__(self):
        qtensor.value_format(self.format)

    @property
    def kind(self) -> ValueFormat:
        return VALUE_FORMATS[self.format]

    @property
    def ordered(self) -> bool:
        """Whether an array of its own names the group of each input."""
        return self.format == "int4_ordered"

    def parts(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every part of a whole tensor of logical shape `shape`."""
        *lead, inputs = shape
        scales = (*lead, inputs // (self.group or inputs))
        out = {
            "values": ((*lead, inputs // 2 if self.kind.nibbles else inputs), self.kind.dtype),
            "scales": (scales, self.scale_dtype),
        }
        if self.zeros_dtype is not None:
            out["zeros"] = (scales, self.zeros_dtype)
        if self.ordered:
            out["order"] = ((*lead[:-1], 1, inputs), np.dtype(np.int32))
        if self.activation is not None and self.activation.static:
            out["input_scale"] = ((*lead[:-1], 1, 1), np.dtype(np.float32))
        return out

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a whole tensor of logical shape `shape`."""
        return sum(math.prod(part) * dtype.itemsize for part, dtype in self.parts(shape).values())

    def blank(self, shape: Sequence[int]) -> QTensor:
        """A QTensor of zeros in this form."""
        return self.tensor(**{name: np.zeros(*part) for name, part in self.parts(shape).items()})

    def tensor(self, **parts: Any) -> QTensor:
        """The QTensor of these parts."""
        return QTensor(**parts, format=self.format, group=self.group, activation=self.activation)

    @classmethod
    def of(cls, q: QTensor) -> "PackedFormat":
        """The form of a QTensor."""
        return cls(
            format=q.format,
            group=q.group,
            zeros=q.zeros is not None,
            scale_dtype=np.dtype(q.scales.dtype),
            zeros_dtype=None if q.zeros is None else np.dtype(q.zeros.dtype),
            activation=q.activation,
        )


class LazyTensor(abc.ABC):
    """A tensor of a checkpoint that is read when asked for.

    name: its name in the checkpoint, canonical. shape: logical shape. dtype: what `read` gives; for a packed tensor float32,
    what it stands for. packed: None, or the format of the QTensor that `read` gives.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    packed: PackedFormat | None = None

    @abc.abstractmethod
    def read(self, units: Shard = None) -> np.ndarray | QTensor:
        """Read the shard that `units` describes (one entry per axis, None = all of it); padding (-1) is zero.

        Returns a numpy array that owns its memory, or a canonical numpy QTensor. Columns of a packed tensor are cut as
        `qtensor.take` does it: units that are no multiple of a group repeat its scale.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor as `read` returns it."""
        return math.prod(self.shape) * self.dtype.itemsize if self.packed is None else self.packed.nbytes(self.shape)

    def shard(self, units: Shard) -> tuple[Units | None, ...]:
        """`units` as a tuple with one entry per axis. Raises ConversionError where their number is another."""
        units = (None,) * len(self.shape) if units is None else tuple(units)
        if len(units) != len(self.shape):
            raise ConversionError(f"{self.name}: {len(units)} units for the shape {self.shape}; give one per axis")
        return units

    def __repr__(self):
        return f"<{type(self).__name__} {self.name} {self.shape} {self.packed or self.dtype}>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerAssets:
    """What a checkpoint says about text.

    tokenizer_json: the `tokenizers` library's JSON, or None. config: as tokenizer_config.json (bos_token, eos_token, pad_token,
    add_bos_token, add_eos_token, chat_template, ...). generation_config: as generation_config.json. folder: where files for
    slow tokenizers lie, or None.
    """

    tokenizer_json: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint; no weight is read yet.

    config: keys of Hugging Face's config.json; of a native checkpoint the stored model configuration. tensors: by canonical
    Hugging Face name; of a native checkpoint by module path.
    """

    path: Path
    format: Literal["safetensors", "gguf", "native"]
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    assets: TokenizerAssets


def shard_shape(shape: Sequence[int], units: Sequence[Units | None]) -> tuple[int, ...]:
    """Shape of the shard that `units` cuts out of `shape`."""
    return tuple(size if unit is None else unit.length for size, unit in zip(shape, units, strict=True))


def row_chunks(shape: Sequence[int], unit: Units | None, row_bytes: int) -> Iterator[tuple[slice, Units]]:
    """Cut axis 0 of a shard into pieces of about CHUNK_BYTES: (their place in the result, what to read)."""
    rows = shape[0] if unit is None else unit.length
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    if unit is not None and 0 < rows <= step:
        yield slice(0, rows), unit
        return
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        elements = range(start, stop) if unit is None else unit.elements[start:stop].tolist()
        yield slice(start, stop), Units(1, tuple(elements))


@dataclasses.dataclass(frozen=True)
class ColumnCover:
    """The fewest whole groups of columns that hold a shard. read: what to read; indices: the shard's units within that."""

    read: Units
    unit: int
    indices: tuple[int, ...]

    def cut(self, q: QTensor) -> QTensor:
        """The shard, out of a QTensor that holds the columns of `read`."""
        return qtensor.take(q, axis=-1, unit=self.unit, indices=self.indices)


def cover_columns(unit: Units, group: int, inputs: int) -> ColumnCover:
    """Which groups to read of an axis of `inputs` elements in groups of `group`, so that `unit` can be cut out of them."""
    size = math.lcm(unit.size, group)
    per = size // unit.size
    blocks = sorted({i // per for i in unit.indices if i >= 0}) or [0]  # a shard of nothing but padding still needs a shape
    if (blocks[-1] + 1) * size > inputs:  # whole groups of whole units would go past the end: read the whole axis
        return ColumnCover(Units(inputs, (0,)), unit.size, unit.indices)
    rank = {block: r for r, block in enumerate(blocks)}
    indices = tuple(-1 if i < 0 else rank[i // per] * per + i % per for i in unit.indices)
    return ColumnCover(Units(size, tuple(blocks)), unit.size, indices)


class MappedFile:
    """A read-only memory map whose pages are given back after each read, so that resident memory does not grow by the file."""

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        if self.size == 0:
            raise TruncatedFileError(f"{path} is empty (0 bytes); download or copy it again")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def map(self) -> mmap.mmap:
        """All of it, for who reads many small pieces."""
        return self._map

    def bytes(self, offset: int, count: int) -> bytes:
        return self._map[offset : offset + count]

    def array(self, offset: int, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
        """A view on the file: copy what is kept, then call `release`."""
        return np.frombuffer(self._map, np.uint8, math.prod(shape) * dtype.itemsize, offset).view(dtype).reshape(shape)

    def release(self, offset: int, count: int) -> None:
        """Give the pages of a byte range back to the system; they stay in its page cache."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
            return
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        stop = min(-(-(offset + count) // mmap.PAGESIZE) * mmap.PAGESIZE, self.size)
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def read(self, offset: int, dtype: np.dtype, shape: Sequence[int], units: Sequence[Units | None]) -> np.ndarray:
        """Copy a shard of the array at `offset`, rows in pieces of about CHUNK_BYTES."""
        if not shape:
            return self.array(offset, dtype, ()).copy()
        source, row_bytes = self.array(offset, dtype, shape), math.prod(shape[1:]) * dtype.itemsize
        out = np.empty(shard_shape(shape, units), dtype)
        for place, rows in row_chunks(shape, units[0], row_bytes):
            real = rows.elements[rows.elements >= 0]
            first, last = (int(real.min()), int(real.max()) + 1) if real.size else (0, 0)
            cut = rows.as_slice()
            piece = source[np.maximum(rows.elements, 0) if cut is None else cut]
            out[place] = gather(piece, (None, *units[1:]))
            if real.size < rows.length:
                out[place][rows.elements < 0] = 0
            self.release(offset + first * row_bytes, (last - first) * row_bytes)
        return out


class FileTensor(LazyTensor):
    """A plain array that lies in one piece in a mapped file."""

    def __init__(self, name: str, shape: Sequence[int], dtype: np.dtype, file: MappedFile, offset: int):
        self.name, self.shape, self.dtype = name, tuple(shape), np.dtype(dtype)
        self._file, self._offset = file, offset

    def read(self, units: Shard = None) -> np.ndarray:
        return self._file.read(self._offset, self.dtype, self.shape, self.shard(units))

    def seen_as(self, shape: Sequence[int], dtype: np.dtype) -> "FileTensor":
        """The same bytes as another array. Raises ConversionError where it takes another number of bytes."""
        if math.prod(shape) * dtype.itemsize != self.nbytes:
            raise ConversionError(f"{self.name} has {self.nbytes} bytes, not those of {dtype} {tuple(shape)}")
        return FileTensor(self.name, shape, dtype, self._file, self._offset)


SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where the file does not exist. Raises UnsupportedFormatError for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UnsupportedFormatError(f"{path} is not valid JSON ({error}); download or copy it again") from error
    if not isinstance(value, dict):
        raise UnsupportedFormatError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def read_assets(folder: Path, model_config: Mapping[str, Any] | None = None) -> TokenizerAssets:
    """The text files of a folder; ids of the model's config.json stand in for a missing generation_config.json."""
    config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    for key in SPECIAL_TOKENS:  # an AddedToken written out as a dict
        if isinstance(config.get(key), dict):
            config[key] = config[key].get("content")
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text("utf-8")
    tokenizer = folder / "tokenizer.json"
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    defaults = {key: value for key in ids if (value := (model_config or {}).get(key)) is not None}
    return TokenizerAssets(
        tokenizer_json=tokenizer.read_text("utf-8") if tokenizer.is_file() else None,
        config=config,
        generation_config=read_json(folder / "generation_config.json") or defaults,
        folder=folder,
    )


@functools.cache
def dtype_named(name: str) -> np.dtype:
    """The numpy dtype of a name, those of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, name))
