"""Small checkpoints, written by the format's own package, and lazy tensors without a file."""

import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.numpy import save_file

from convert.readers.base import LazyTensor
from sharding.partition import gather


class ArrayTensor(LazyTensor):
    """An array as a lazy tensor that remembers the units it was asked for."""

    def __init__(self, name, array):
        self.name, self.array, self.shape, self.dtype = name, array, array.shape, array.dtype
        self.asked = []

    def read(self, units=None):
        self.asked.append(units)
        return gather(self.array, self.shard(units)) if self.shape else self.array.copy()


@pytest.fixture
def lazy():
    return ArrayTensor


@pytest.fixture
def hf_folder(tmp_path):
    """hf_folder({file: {name: array}}, index=..., **text files as dicts)"""

    def make(files, config=None, index=None, **texts):
        folder = tmp_path / "hf"
        folder.mkdir(exist_ok=True)
        for file, tensors in files.items():
            save_file(tensors, folder / file)
        texts = {"config": {"model_type": "llama"} if config is None else config, **texts}
        for name, value in texts.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return folder

    return make


LLAMA = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
}


@pytest.fixture
def gguf_file(tmp_path):
    """gguf_file({name: (float array, type or None)}, {metadata key: value or None}, arch)"""

    def make(tensors, metadata=None, arch="llama"):
        path = tmp_path / "model.gguf"
        writer = GGUFWriter(path, arch)
        for key, value in {**(LLAMA if arch == "llama" else {}), **(metadata or {})}.items():
            if value is None:
                continue
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
        for name, (array, kind) in tensors.items():
            if kind is None:
                writer.add_tensor(name, array)
                continue
            kind = GGMLQuantizationType[kind]
            data = array if array.dtype == np.uint8 else quants.quantize(array, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make
