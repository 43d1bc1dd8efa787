"""Packed checkpoints: what the reader makes of each format is what an independent writer put into it, whole and in shards."""

import json
from pathlib import Path

import numpy as np
import packed_writers
import pytest
from packed_writers import FORMATS, compressed
from safetensors.numpy import save_file

from convert.errors import ConversionError, MissingTensorError, NonFiniteWeightError, UnsupportedFormatError
from convert.formats import METHODS
from convert.load import cast, checked, materialize
from convert.native import save_native
from convert.readers import open_checkpoint
from convert.readers.base import PackedFormat, TokenizerAssets
from convert.rules import PermuteRows, Rows, transformed
from pallas_kernels.qtensor import ActivationQuant, dequantize
from sharding.partition import Units, gather

MODULE = "model.layers.0.self_attn.q_proj"
SHAPE = (40, 96)
SHARDS = [
    (Units(8, (3, 0)), None),
    (None, Units(32, (1,))),
    (None, Units(8, (7, 2, -1))),
    (Units(1, (39, -1, 4)), Units(48, (1, -1))),
    (Units(5, (-1, 7)), Units(6, (15, 0))),
    (Units(20, (1,)), Units(2, (-1, 3))),
]
every = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture
def opened(tmp_path):
    """opened(name): the matrix of a folder in this format, and the floats it stands for."""

    def make(name, shape=SHAPE):
        tensors = {f"{MODULE}.weight": np.zeros(shape), "model.norm.weight": np.ones(8, np.float32)}
        truth = packed_writers.write_folder(tmp_path / name, {"model_type": "llama"}, tensors, name)
        checkpoint = open_checkpoint(tmp_path / name)
        assert set(checkpoint.tensors) == set(tensors) and "quantization_config" not in checkpoint.config
        return checkpoint.tensors[f"{MODULE}.weight"], truth[f"{MODULE}.weight"]

    return make


@every
def test_a_matrix_is_what_was_written(opened, name):
    tensor, truth = opened(name)
    q = tensor.read()
    assert tensor.shape == q.shape == truth.shape and PackedFormat.of(q) == tensor.packed
    assert {
        part: (a.shape, a.dtype)
        for part in ("values", "scales", "zeros", "order", "input_scale")
        if (a := getattr(q, part)) is not None
    } == (tensor.packed.parts(tensor.shape))
    assert q.nbytes == tensor.nbytes < truth.nbytes / 2
    np.testing.assert_array_equal(dequantize(q), truth)
    np.testing.assert_array_equal(cast(tensor, np.float32).read(), truth)


@every
@pytest.mark.parametrize("units", SHARDS)
def test_shards_are_cut_on_the_packed_form(opened, name, units):
    tensor, truth = opened(name)
    cut = checked(tensor).read(units)
    np.testing.assert_array_equal(dequantize(cut), gather(truth, units))


@pytest.mark.parametrize("name", ["gptq", "gptq_act_order", "awq", "int4", "fp8_blocks", "nf4_nested"])
def test_pieces_join_where_a_matrix_is_larger_than_one(opened, name, monkeypatch):
    monkeypatch.setattr("convert.formats.base.CHUNK_BYTES", 256)
    tensor, truth = opened(name, (48, 64))
    np.testing.assert_array_equal(dequantize(tensor.read()), truth)
    units = (Units(16, (2, 0)), Units(16, (1, 3)))
    np.testing.assert_array_equal(dequantize(tensor.read(units)), gather(truth, units))


@pytest.mark.parametrize("name", ["gptq_act_order", "awq", "fp8", "nf4"])
def test_transforms_of_families_apply(opened, name):
    tensor, truth = opened(name)
    order = np.random.default_rng(0).permutation(16)
    part = transformed(tensor, (Rows(8, 16), PermuteRows(order)))
    np.testing.assert_array_equal(dequantize(part.read()), truth[8:24][order])
    np.testing.assert_array_equal(
        dequantize(part.read((Units(4, (3, 1)), None))), truth[8:24][order].reshape(4, 4, -1)[[3, 1]].reshape(8, -1)
    )


@pytest.mark.parametrize("name", ["gptq_act_order", "gptq_8_bits", "fp8_inputs", "fp8_blocks", "nf4", "mxfp4"])
def test_the_native_form_keeps_every_byte(opened, name, tmp_path):
    tensor, _ = opened(name)
    save_native(tmp_path / "native", config={}, tensors={"a": checked(tensor)}, assets=TokenizerAssets())
    again = open_checkpoint(tmp_path / "native").tensors["a"]
    assert again.packed == tensor.packed and again.nbytes == tensor.nbytes
    for units in (None, *SHARDS):
        a, b = tensor.read(units), again.read(units)
        assert a.group == b.group
        for part in ("values", "scales", "zeros", "order"):
            np.testing.assert_array_equal(getattr(a, part), getattr(b, part))


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("int8_inputs", ActivationQuant(group=None)),
        ("fp8_inputs", ActivationQuant(group=None, format="fp8")),
        ("fp8_blocks", ActivationQuant(group=32, format="fp8")),
        ("awq", None),
    ],
)
def test_dynamic_inputs_are_taken_over(opened, name, activation):
    assert opened(name)[0].read().activation == activation


def test_groups_of_a_config_are_told_apart(tmp_path):
    config = compressed("pack-quantized", {}) | {
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 8}},
            "b": {"targets": ["re:.*down.*"], "format": "int-quantized", "weights": {"num_bits": 8, "strategy": "channel"}},
        }
    }
    rng = np.random.default_rng(5)
    four, w4 = FORMATS["int4"].write(rng, 16, 32)
    eight, w8 = FORMATS["int8"].write(rng, 8, 16)
    stored = {f"up.{end}": a for end, a in four.items()} | {f"down.{end}": a for end, a in eight.items()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    read = materialize(open_checkpoint(tmp_path).tensors)
    assert (read["up.weight"].format, read["down.weight"].format) == ("int4", "int8")
    np.testing.assert_array_equal(dequantize(read["up.weight"]), w4)
    np.testing.assert_array_equal(dequantize(read["down.weight"]), w8)


def folder_of(tmp_path, name, changes=None, tensors=None, module=MODULE, **config):
    """A folder in a format with its quantization_config or its tensors changed; None takes one away."""
    form = FORMATS[name]
    parts, _ = form.write(np.random.default_rng(1), *SHAPE)
    parts = {end: a for end, a in (parts | (tensors or {})).items() if a is not None}
    save_file({f"{module}.{end}": np.ascontiguousarray(a) for end, a in parts.items()}, tmp_path / "model.safetensors")
    described = {"model_type": "llama", "quantization_config": form.config | (changes or {}), **config}
    (tmp_path / "config.json").write_text(json.dumps(described))
    return tmp_path


def group_of(**changes):
    return {"config_groups": {"group_0": FORMATS["int8"].config["config_groups"]["group_0"] | changes}}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gptq", {"quant_method": "hqq"}, ("'hqq'", *METHODS)),
        ("gptq", {"bits": 3}, ("bits is 3", "4, 8")),
        ("gptq", {"checkpoint_format": "marlin"}, ("checkpoint_format", "'marlin'")),
        ("gptq", {"format": "gptq_p"}, ("format is 'gptq_p'",)),
        ("gptq", {"dynamic": {"-:.*": {}}}, ("dynamic",)),
        ("gptq", {"new_option": 1}, ("new_option=1", "not understood")),
        ("gptq", {"group_size": 36}, ("q_proj",)),
        ("awq", {"version": "gemv"}, ("'gemv'", "'gemm'")),
        ("awq", {"zero_point": False}, ("zero_point is False",)),
        ("fp8_blocks", {"activation_scheme": "static"}, ("activation_scheme", "'static'")),
        ("fp8_blocks", {"fmt": "e5m2"}, ("fmt", "'e5m2'")),
        ("fp8_blocks", {"weight_block_size": [16, 16]}, ("weight_scale_inv", "(2, 3)")),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, ("'fp4'", "'nf4'")),
        ("int8", {"format": "marlin-24"}, ("'marlin-24'", "pack-quantized")),
        ("int8", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ("sparsity_config", "sparse-24")),
        ("int8", {"kv_cache_scheme": {"num_bits": 8}}, ("kv_cache_scheme",)),
        (
            "int8",
            group_of(input_activations={"num_bits": 8, "dynamic": False, "strategy": "channel"}),
            ("input_activations", "strategy is 'channel'"),
        ),
        ("int8", group_of(input_activations={"num_bits": 4, "dynamic": True}), ("num_bits is 4",)),
        ("int8", group_of(targets=["re:.*mlp.*"]), (MODULE, "none of config_groups")),
        ("int8", group_of(weights={"num_bits": 6}), ("num_bits is 6",)),
        ("int4", {"transform_config": {"config_groups": {"R1": {}}}}, ("transform_config", "'R1'")),
    ],
)
def test_what_is_not_read_is_named(tmp_path, name, changes, words):
    with pytest.raises(UnsupportedFormatError) as error:
        open_checkpoint(folder_of(tmp_path, name, changes))
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, error.value


@pytest.mark.parametrize(
    ("name", "tensors", "error", "words"),
    [
        ("gptq", {"scales": None}, MissingTensorError, f"{MODULE}.scales is absent"),
        ("gptq", {"scales": np.ones((3, 40), np.float16)}, UnsupportedFormatError, r"\(3, 40\)"),
        ("gptq_8_bits", {"g_idx": np.zeros(96, np.int32)}, UnsupportedFormatError, "act-order with 8 bits"),
        ("gptq_act_order", {"g_idx": np.full(96, 12, np.int32)}, ConversionError, r"12\.\.12 of 12"),
        ("int8_zeros", {"weight_zero_point": None}, MissingTensorError, "weight_zero_point"),
        ("int4", {"weight_g_idx": np.zeros(96, np.int32)}, UnsupportedFormatError, "actorder"),
        ("nf4", {"weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}, UnsupportedFormatError, "nf4 table"),
        ("fp8_blocks", {"weight_scale_inv": None}, UnsupportedFormatError, "without a weight_scale_inv"),
        ("mxfp4", {"weight_scale": np.ones((40, 2), np.uint8)}, UnsupportedFormatError, r"\(40, 2\)"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, name, tensors, error, words):
    with pytest.raises(error, match=words):
        open_checkpoint(folder_of(tmp_path, name, tensors=tensors))


@pytest.mark.parametrize(
    ("name", "end", "value"),
    [("fp8", "weight", 0x7F), ("fp8", "weight", 0xFF), ("mxfp4", "weight_scale", 255), ("awq", "scales", np.nan)],
)
def test_nan_is_found_in_every_part(tmp_path, name, end, value):
    parts, _ = FORMATS[name].write(np.random.default_rng(1), *SHAPE)
    raw = parts[end].view(np.uint8) if parts[end].dtype.itemsize == 1 else parts[end]
    raw[1, 2] = value
    tensor = open_checkpoint(folder_of(tmp_path, name, tensors={end: parts[end]})).tensors[f"{MODULE}.weight"]
    with pytest.raises(NonFiniteWeightError, match=r"q_proj\.weight"):
        checked(tensor).read()


def test_symmetric_files_are_checked(tmp_path):
    tensor = open_checkpoint(folder_of(tmp_path, "gptq", {"sym": True})).tensors[f"{MODULE}.weight"]
    with pytest.raises(ConversionError, match="says sym"):
        tensor.read()


def test_biases_of_zeros_where_a_model_has_none(tmp_path):
    zero, one = np.zeros(40, np.float16), np.ones(40, np.float16)
    names = lambda **config: set(open_checkpoint(folder_of(tmp_path, "gptq", tensors={"bias": bias}, **config)).tensors)
    bias = zero
    assert names() == {f"{MODULE}.weight"}
    assert names(model_type="qwen2") == names(attention_bias=True) == {f"{MODULE}.weight", f"{MODULE}.bias"}
    bias = one
    assert names() == {f"{MODULE}.weight", f"{MODULE}.bias"}


def test_old_names_of_the_settings(tmp_path):
    folder = folder_of(tmp_path, "int8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"compression_config": config["quantization_config"]}))
    assert open_checkpoint(folder).tensors[f"{MODULE}.weight"].packed.format == "int8"
    (folder / "config.json").write_text(json.dumps({"quantization_config": ["int8"]}))
    with pytest.raises(UnsupportedFormatError, match="not an object"):
        open_checkpoint(folder)


GOLDEN = np.load(Path(__file__).parents[1] / "data" / "packed_formats.npz")


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in GOLDEN}))
def test_files_of_the_packages_themselves(tmp_path, name):
    """Written by scripts/make_golden_formats.py, with what the formats' own packages decode."""
    (tmp_path / "model.safetensors").write_bytes(GOLDEN[f"{name}/file"].tobytes())
    config = json.loads(str(GOLDEN[f"{name}/config"]))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    tensor = open_checkpoint(tmp_path).tensors["module.weight"]
    assert tensor.packed
    # bitsandbytes multiplies by the nearest float to 1 / 127 last
    np.testing.assert_allclose(dequantize(tensor.read()), GOLDEN[f"{name}/floats"], rtol=3e-7 if name == "llm_int8" else 0)
