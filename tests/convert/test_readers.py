"""Opening, sniffing, safetensors folders, shards of plain tensors, truncation, memory."""

import json
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from convert.errors import (
    CheckpointNotFoundError,
    ConversionError,
    MissingTensorError,
    TruncatedFileError,
    UnsupportedFormatError,
)
from convert.readers import open_checkpoint
from convert.readers.base import CHUNK_BYTES, MappedFile, cover_columns
from sharding.partition import Units, gather

RNG = np.random.default_rng(0)
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int16, np.int32, np.int64, np.bool_]


def test_mixed_dtypes_in_one_file(hf_folder):
    arrays = {f"t{i}": RNG.integers(0, 2, (5, 6)).astype(dtype) for i, dtype in enumerate(DTYPES)}
    arrays |= {
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float16),
        "vector": np.arange(7, dtype=np.float32),
    }
    checkpoint = open_checkpoint(hf_folder({"model.safetensors": arrays}))
    assert checkpoint.format == "safetensors"
    assert checkpoint.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = checkpoint.tensors[name]
        assert (tensor.name, tensor.shape, tensor.dtype, tensor.packed) == (name, array.shape, array.dtype, None)
        value = tensor.read()
        assert value.dtype == array.dtype and value.flags.owndata
        np.testing.assert_array_equal(value, array)
        assert tensor.nbytes == array.nbytes


SHARDS = [
    (None, None),
    (Units(4, (1, 2)), None),
    (None, Units(8, (0, 1, 2))),
    (Units(4, (2, -1, 0)), Units(8, (4, -1))),
    (Units(1, (-1, -1)), Units(16, (1,))),
    (Units(3, (5, 5)), Units(4, (9, 0, 3))),
]


@pytest.mark.parametrize("units", SHARDS)
def test_shards_equal_those_of_the_whole_array(hf_folder, units):
    array = RNG.standard_normal((18, 40)).astype(ml_dtypes.bfloat16)
    tensor = open_checkpoint(hf_folder({"model.safetensors": {"w": array}})).tensors["w"]
    value = tensor.read(units)
    np.testing.assert_array_equal(value, gather(array, units))
    value[...] = 0  # the result is not the file
    np.testing.assert_array_equal(tensor.read(units), gather(array, units))


def test_shards_over_several_chunks(hf_folder):
    array = RNG.standard_normal((5000, 1000)).astype(np.float32)
    assert array.nbytes > 2 * CHUNK_BYTES
    tensor = open_checkpoint(hf_folder({"model.safetensors": {"w": array}})).tensors["w"]
    units = (Units(1, (*range(0, 5000, 2), -1, *range(4999, 0, -2), -1)), Units(50, (3, -1, 19)))
    np.testing.assert_array_equal(tensor.read(units), gather(array, units))
    np.testing.assert_array_equal(tensor.read(), array)


def test_three_axes(hf_folder):
    array = RNG.standard_normal((4, 6, 10)).astype(np.float16)
    tensor = open_checkpoint(hf_folder({"model.safetensors": {"w": array}})).tensors["w"]
    units = (Units(2, (1, -1)), Units(3, (1,)), Units(5, (-1, 0)))
    np.testing.assert_array_equal(tensor.read(units), gather(array, units))


def test_wrong_number_of_units(hf_folder):
    tensor = open_checkpoint(hf_folder({"model.safetensors": {"w": np.zeros((2, 2), np.float32)}})).tensors["w"]
    with pytest.raises(ConversionError, match=r"w: 1 units for the shape \(2, 2\)"):
        tensor.read((None,))


def test_cover_columns_reads_the_fewest_groups():
    cover = cover_columns(Units(16, (3, -1, 8)), 32, 320)
    assert (cover.read, cover.indices) == (Units(32, (1, 4)), (1, -1, 2))
    cover = cover_columns(Units(64, (2,)), 32, 320)
    assert (cover.read, cover.indices) == (Units(64, (2,)), (0,))
    cover = cover_columns(Units(192, (1,)), 32, 640)  # 640 is no multiple of 192
    assert (cover.read, cover.indices) == (Units(192, (1,)), (0,))
    cover = cover_columns(Units(48, (2,)), 32, 160)  # the second 96 go past the end
    assert (cover.read, cover.indices) == (Units(160, (0,)), (2,))
    cover = cover_columns(Units(48, (1,)), 32, 96)  # lcm 96: units straddle groups
    assert (cover.read, cover.indices) == (Units(96, (0,)), (1,))


def test_shards_of_an_index(hf_folder):
    a, b = np.ones((2, 3), np.float32), np.zeros((4,), np.float16)
    folder = hf_folder(
        {"model-1.safetensors": {"a": a}, "model-2.safetensors": {"b": b}},
        index={"a": "model-1.safetensors", "b": "model-2.safetensors"},
    )
    tensors = open_checkpoint(folder).tensors
    np.testing.assert_array_equal(tensors["a"].read(), a)
    np.testing.assert_array_equal(tensors["b"].read(), b)


def test_index_that_names_missing_files(hf_folder):
    index = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors", "d": "m-3.safetensors"}
    folder = hf_folder({"m-1.safetensors": {"a": np.ones(2, np.float32)}}, index=index)
    with pytest.raises(MissingTensorError, match=r"m-2.safetensors is absent; the index puts 2 tensors in it") as error:
        open_checkpoint(folder)
    assert len(error.value.problems) == 2


def test_index_that_names_missing_tensors(hf_folder):
    folder = hf_folder({"m.safetensors": {"a": np.ones(2, np.float32)}}, index={"a": "m.safetensors", "b": "m.safetensors"})
    with pytest.raises(MissingTensorError, match="b is named by"):
        open_checkpoint(folder)


def test_several_files_without_an_index(hf_folder):
    one = {"a": np.ones(2, np.float32)}
    with pytest.raises(UnsupportedFormatError, match=r"2 safetensors files and no model.safetensors.index.json"):
        open_checkpoint(hf_folder({"x.safetensors": one, "y.safetensors": one}))


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_truncated_file_is_refused_when_opened(hf_folder, keep):
    folder = hf_folder({"model.safetensors": {"w": np.ones((8, 8), np.float32)}})
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    with pytest.raises(TruncatedFileError, match=re.escape(str(file))) as error:
        open_checkpoint(folder)
    assert f"{len(whole[:keep])} bytes" in str(error.value)
    if keep == -1:
        assert str(len(whole)) in str(error.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, "w has dtype F4"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "does not take the bytes 0..4"),
        ({"w": {"dtype": "F32"}}, "not that of a safetensors file"),
        ([1], "not that of a safetensors file"),
    ],
)
def test_damaged_header(hf_folder, header, message):
    folder, text = hf_folder({}), json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(UnsupportedFormatError, match=re.escape(message)):
        open_checkpoint(folder)


def test_not_a_checkpoint(tmp_path, hf_folder):
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedFormatError, match=r"safe_serialization=True.*pytorch_model.bin"):
        open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedFormatError, match="not a GGUF file"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    folder = hf_folder({"model.safetensors": {"w": np.ones(2, np.float32)}})
    with pytest.raises(UnsupportedFormatError, match="give its folder"):
        open_checkpoint(folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedFormatError, match=r"config.json is not valid JSON"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedFormatError, match=r"has no config.json"):
        open_checkpoint(folder)


def test_text_assets(hf_folder):
    folder = hf_folder(
        {"model.safetensors": {"w": np.ones(2, np.float32)}},
        config={"model_type": "llama", "eos_token_id": [2, 3], "pad_token_id": None},
        tokenizer={"version": "1.0"},
        tokenizer_config={"eos_token": {"content": "</s>", "lstrip": False}, "chat_template": "old"},
        special_tokens_map={"bos_token": "<s>", "eos_token": "overridden"},
    )
    (folder / "chat_template.jinja").write_text("new")
    assets = open_checkpoint(folder).assets
    assert json.loads(assets.tokenizer_json) == {"version": "1.0"}
    assert assets.config == {"eos_token": "</s>", "bos_token": "<s>", "chat_template": "new"}
    assert assets.generation_config == {"eos_token_id": [2, 3]}
    assert assets.folder == folder


def resident(path):
    """Bytes of a mapped file that are in this process's memory."""
    total, inside = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = line.rstrip().endswith(str(path))
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) << 10
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_only_what_is_needed_is_mapped_and_given_back(hf_folder, monkeypatch):
    array = RNG.standard_normal((4096, 2048)).astype(np.float32)  # 32 MiB
    folder = hf_folder({"model.safetensors": {"w": array}})
    file, tensor = folder / "model.safetensors", open_checkpoint(folder).tensors["w"]
    tensor.read()
    assert resident(file) < 1 << 20  # the header and rounding
    monkeypatch.setattr(MappedFile, "release", lambda *_: None)
    tensor.read((Units(64, (3, 40)), None))
    assert 1 << 20 <= resident(file) < 10 << 20  # 1 MiB of rows, and the large pages that the system maps around them
    tensor.read()
    assert resident(file) >= 32 << 20  # so that the first assertion could have failed


def test_importing_readers_is_light():
    code = (
        "import sys, convert.load, convert.native, convert.readers.gguf, convert.readers.native, convert.rules;"
        "from jax._src import xla_bridge;"
        "assert not xla_bridge._backends, 'a backend was started';"
        "print([m for m in ('orbax', 'transformers', 'torch', 'flax', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
