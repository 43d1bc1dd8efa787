"""Hugging Face folders: config.json and safetensors files, single or sharded by an index.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.errors import MissingTensorError, TruncatedFileError, UnsupportedFormatError
from convert.formats import unpacked
from convert.readers.base import BFLOAT16, Checkpoint, FileTensor, LazyTensor, MappedFile, read_assets, read_json

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
HEADER_LIMIT = 100 << 20  # the safetensors library refuses longer headers too
INDEX = "model.safetensors.index.json"


def open_safetensors(folder: Path) -> Checkpoint:
    """Open a folder with config.json and model.safetensors, or shards with an index, or any one *.safetensors file.

    Quantised matrices are packed tensors under their plain names, see convert.formats; the config then has no quantization_config.
    """
    if not (folder / "config.json").is_file():
        raise UnsupportedFormatError(f"{folder} has no config.json, so its architecture is unknown; add the file")
    config = read_json(folder / "config.json")
    tensors: dict[str, LazyTensor] = {}
    for file in _weight_files(folder):
        tensors |= read_header(file)
    absent = sorted(read_json(folder / INDEX).get("weight_map", {}).keys() - tensors.keys())
    if absent:
        raise MissingTensorError([f"{name} is named by {INDEX} but is in none of its files" for name in absent], str(folder))
    config, tensors = unpacked(config, tensors, str(folder / "config.json"))
    return Checkpoint(path=folder, format="safetensors", config=config, tensors=tensors, assets=read_assets(folder, config))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UnsupportedFormatError(f"{folder / INDEX} has no weight_map; download or copy it again")
        files = sorted(set(weight_map.values()))
        missing = [
            f"{file} is absent; the index puts {sum(f == file for f in weight_map.values())} tensors in it"
            for file in files
            if not (folder / file).is_file()
        ]
        if missing:
            raise MissingTensorError(missing, str(folder))
        return [folder / file for file in files]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(f.name for f in files[:8])
        raise UnsupportedFormatError(f"{folder} holds {len(files)} safetensors files and no {INDEX}: {names}; add the index")
    return files


def read_header(path: Path) -> dict[str, LazyTensor]:
    """The lazy tensors of one file. Raises TruncatedFileError where the file is shorter than its header says."""
    file = MappedFile(path)
    if file.size < 8:
        raise TruncatedFileError(f"{path} has {file.size} bytes, a safetensors file at least 8; download or copy it again")
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > HEADER_LIMIT:
        raise UnsupportedFormatError(f"{path}: a header of {length} bytes, over {HEADER_LIMIT}: this is not a safetensors file")
    start = 8 + length
    if file.size < start:
        raise TruncatedFileError(f"{path} has {file.size} bytes, its header alone needs {start}; download or copy it again")
    try:
        header = json.loads(file.bytes(8, length))
        header.pop("__metadata__", None)
        entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        needed = start + max((end for *_, end in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedFormatError(f"{path}: the header is not that of a safetensors file ({error!r})") from error
    if file.size < needed:
        raise TruncatedFileError(f"{path} has {file.size} bytes, its header describes {needed}; download or copy it again")
    tensors: dict[str, LazyTensor] = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in DTYPES:
            raise UnsupportedFormatError(f"{path}: {name} has dtype {dtype}, not one of {', '.join(DTYPES)}")
        if not 0 <= begin <= end or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise UnsupportedFormatError(f"{path}: {name} {shape} {dtype} does not take the bytes {begin}..{end} of its header")
        tensors[name] = FileTensor(name, shape, DTYPES[dtype], file, start + begin)
    return tensors
