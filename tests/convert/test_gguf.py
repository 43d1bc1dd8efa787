"""GGUF: every type, exact packed bytes, un-permuted heads, metadata as config, truncation, the real file."""

import re

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, quants

from convert.errors import TruncatedFileError, UnsupportedFormatError
from convert.load import as_float, materialize
from convert.names.gguf import canonical_name, half_split_order
from convert.readers import open_checkpoint
from pallas_kernels import qtensor
from sharding.partition import Units, gather

RNG = np.random.default_rng(1)
DEQUANTIZED = sorted(t.name for t in quants._type_traits if t.name not in ("BF16", "Q4_0", "Q4_1", "Q8_0"))
SHARDS = [
    (Units(2, (1, 3)), None),
    (None, Units(32, (1, 2))),
    (Units(1, (4, -1, 0)), Units(64, (-1, 0))),
    (None, Units(16, (3, 0, -1, 9))),
    (Units(5, (1,)), Units(256, (1, 0))),
]


def bits(array):
    return array.view(np.uint32)


def random_blocks(kind, rows, columns):
    """Random bytes with finite scales: every even byte below 0x3c keeps float16 scales finite wherever they lie."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = RNG.integers(0, 0x3C, (rows, columns // block * size), np.uint8)
    return data


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_types_are_exact(gguf_file, kind):
    array = RNG.standard_normal((10, 512)).astype(np.float32)
    array[2, 64:96] = 0  # a block of zeros
    path = gguf_file({"blk.0.ffn_up.weight": (array, kind)})
    truth = quants.dequantize(GGUFReader(path).tensors[0].data, GGMLQuantizationType[kind])
    tensor = open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"]
    q = tensor.read()
    assert (tensor.packed.format, tensor.packed.group, tensor.packed.zeros) == (q.format, 32, q.zeros is not None)
    assert (q.format, q.zeros is None) == {"Q4_0": ("int4", True), "Q4_1": ("int4", False), "Q8_0": ("int8", True)}[kind]
    assert q.scales.dtype == np.float16 == tensor.packed.scale_dtype
    assert tensor.nbytes == q.nbytes
    np.testing.assert_array_equal(bits(qtensor.dequantize(q)), bits(truth))
    for units in SHARDS:
        shard = tensor.read(units)
        assert shard.group == (16 if units[1] and units[1].size == 16 else 32)
        np.testing.assert_array_equal(qtensor.dequantize(shard), gather(truth, units))
        np.testing.assert_array_equal(as_float(tensor).read(units), gather(truth, units))


@pytest.mark.parametrize("kind", DEQUANTIZED)
def test_other_types_as_float32(gguf_file, kind):
    data = random_blocks(kind, 10, 512)
    path = gguf_file({"blk.0.ffn_up.weight": (data, kind)})
    with np.errstate(all="ignore"):
        truth = quants.dequantize(data, GGMLQuantizationType[kind])
    tensor = open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"]
    assert (tensor.shape, tensor.dtype, tensor.packed) == ((10, 512), np.float32, None)
    np.testing.assert_array_equal(tensor.read(), truth)
    for units in SHARDS:
        np.testing.assert_array_equal(tensor.read(units), gather(truth, units))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_plain_types(gguf_file, dtype):
    array = RNG.standard_normal((6, 32)).astype(dtype)
    kind = "BF16" if dtype == ml_dtypes.bfloat16 else None
    path = gguf_file({"blk.0.ffn_up.weight": (array.view(np.uint8) if kind else array, kind)})
    tensor = open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"]
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(tensor.read((Units(2, (2,)), None)), array[4:6])


def test_a_quantised_vector_is_dequantised(gguf_file):
    array = RNG.standard_normal(64).astype(np.float32)
    path = gguf_file({"output_norm.weight": (array, "Q8_0")})
    tensor = open_checkpoint(path).tensors["model.norm.weight"]
    truth = quants.dequantize(quants.quantize(array, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(tensor.read(), truth)
    np.testing.assert_array_equal(tensor.read((Units(16, (1, -1)),)), [*truth[16:32], *np.zeros(16)])


def interleave(weight, heads):
    """The rows of a Hugging Face weight in the order of llama.cpp's converter."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("kind", [None, "Q4_0", "Q8_0"])
def test_rotary_rows_are_half_split_again(gguf_file, kind):
    q, k = (RNG.standard_normal((rows, 64)).astype(np.float32) for rows in (64, 32))
    bias = RNG.standard_normal(64).astype(np.float32)
    tensors = {
        "blk.0.attn_q.weight": (interleave(q, 4), kind),
        "blk.0.attn_k.weight": (interleave(k, 2), kind),
        "blk.0.attn_v.weight": (k, kind),
        "blk.0.attn_q.bias": (interleave(bias, 4), None),
    }
    checkpoint = open_checkpoint(gguf_file(tensors))
    for name, array in (("q_proj.weight", q), ("k_proj.weight", k), ("v_proj.weight", k), ("q_proj.bias", bias)):
        tensor = checkpoint.tensors[f"model.layers.0.self_attn.{name}"]
        truth = array
        if kind and array.ndim == 2:
            assert tensor.packed
            truth = quants.dequantize(quants.quantize(array, GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
        np.testing.assert_array_equal(as_float(tensor).read(), truth)
        units = (Units(16, (1, -1)), *[None] * (array.ndim - 1))
        np.testing.assert_array_equal(as_float(tensor).read(units), gather(truth, units))
    np.testing.assert_array_equal(half_split_order(8, 2), [0, 2, 1, 3, 4, 6, 5, 7])
    assert checkpoint.config["attention_bias"] is True


def test_only_llama_rows_are_reordered(gguf_file):
    array = RNG.standard_normal((64, 64)).astype(np.float32)
    meta = {"starcoder2.attention.head_count": 4, "starcoder2.embedding_length": 64}
    checkpoint = open_checkpoint(gguf_file({"blk.0.attn_q.weight": (array, None)}, meta, arch="starcoder2"))
    assert checkpoint.config["model_type"] == "starcoder2" and "architectures" not in checkpoint.config
    np.testing.assert_array_equal(checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].read(), array)


def test_names():
    assert canonical_name("token_embd.weight") == "model.embed_tokens.weight"
    assert canonical_name("output.weight") == "lm_head.weight"
    assert canonical_name("blk.12.ffn_norm.weight") == "model.layers.12.post_attention_layernorm.weight"
    assert canonical_name("blk.3.attn_output.bias") == "model.layers.3.self_attn.o_proj.bias"
    assert canonical_name("blk.3.ffn_norm.weight", "gemma2") == "model.layers.3.pre_feedforward_layernorm.weight"
    assert canonical_name("blk.3.ffn_norm.weight", "gpt2") == "model.layers.3.post_attention_layernorm.weight"
    for unknown in ("blk.0.ffn_gate_exps.weight", "blk.0.output.weight", "rope_freqs.weight", "attn_q.weight"):
        assert canonical_name(unknown) == unknown


def config_of(gguf_file, metadata=None, tensors=None):
    embedding = {"token_embd.weight": (np.zeros((50, 64), np.float32), None)}
    return open_checkpoint(gguf_file(embedding | (tensors or {}), metadata)).config


def test_config(gguf_file):
    assert config_of(gguf_file) == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "head_dim": 16,
        "vocab_size": 50,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }


def test_config_of_heads(gguf_file):
    wide = {"blk.0.attn_q.weight": (np.zeros((128, 64), np.float32), None)}
    assert config_of(gguf_file, {"llama.rope.dimension_count": 32}, wide)["head_dim"] == 32
    assert config_of(gguf_file, {"llama.attention.key_length": 24, "llama.rope.dimension_count": 24})["head_dim"] == 24
    assert config_of(gguf_file, {"llama.rope.dimension_count": 8})["partial_rotary_factor"] == 0.5
    assert config_of(gguf_file, {"llama.attention.head_count_kv": None})["num_key_value_heads"] == 4
    assert config_of(gguf_file, {"llama.attention.value_length": 8})["v_head_dim"] == 8
    untied = {"output.weight": (np.zeros((50, 64), np.float32), None)}
    assert config_of(gguf_file, None, untied)["tie_word_embeddings"] is False


def test_what_is_not_known_is_passed_on_or_refused(gguf_file):
    config = config_of(gguf_file, {"llama.attention.scale": 0.5, "llama.expert_count": 8, "tokenizer.ggml.eos_token_id": 2})
    assert (config["llama.attention.scale"], config["num_local_experts"], config["eos_token_id"]) == (0.5, 8, 2)
    assert "num_local_experts" not in config_of(gguf_file, {"llama.expert_count": 0, "llama.expert_used_count": 0})
    with pytest.raises(UnsupportedFormatError, match=r"scaling.type 'longrope'"):
        config_of(gguf_file, {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0})
    with pytest.raises(UnsupportedFormatError, match="one of 3 parts"):
        config_of(gguf_file, {"split.count": 3})
    with pytest.raises(UnsupportedFormatError, match=r"layers with different numbers of heads"):
        q = {"blk.0.attn_k.weight": (np.zeros((32, 64), np.float32), None)}
        config_of(gguf_file, {"llama.attention.head_count_kv": [2, 4]}, q)


def test_rope_scaling(gguf_file):
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert config_of(gguf_file, scaling)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config_of(gguf_file, {"llama.rope.scale_linear": 2.0})["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "rope_scaling" not in config_of(gguf_file, {"llama.rope.scaling.type": "none"})
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 8.0,
        "llama.rope.scaling.original_context_length": 4096,
        "llama.rope.scaling.finetuned": True,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
    }
    expected = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0}
    assert config_of(gguf_file, yarn)["rope_scaling"] == expected
    with_attention = config_of(gguf_file, yarn | {"llama.rope.scaling.attn_factor": 0.5})["rope_scaling"]
    assert with_attention["attention_factor"] == pytest.approx(0.5 * (1 + 0.1 * np.log(8)))


def test_rope_frequencies_of_llama3(gguf_file):
    factors = np.array([1, 1, 2.5, 8, 8, 8, 8, 8], np.float32)
    path = gguf_file({"rope_freqs.weight": (factors, None), "output_norm.weight": (np.ones(64, np.float32), None)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_scaling"] == {"rope_type": "factors", "factors": factors.tolist()}
    assert set(checkpoint.tensors) == {"model.norm.weight"}
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    with pytest.raises(UnsupportedFormatError, match="both rope_freqs"):
        open_checkpoint(gguf_file({"rope_freqs.weight": (factors, None)}, scaling))


def test_truncated_file_is_refused_when_opened(gguf_file):
    array = RNG.standard_normal((64, 64)).astype(np.float32)
    path = gguf_file({"token_embd.weight": (array, "Q8_0"), "output_norm.weight": (array[0], None)})
    whole = path.read_bytes()
    entries = whole.index(b"token_embd.weight")
    for keep in (0, 3, 10, 40, entries - 100, entries + 5, entries + 40, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:keep])
        with pytest.raises(TruncatedFileError, match=re.escape(str(path))) as error:
            open_checkpoint(path)
        sizes = [int(n) for n in re.findall(r"\d+", str(error.value).replace(str(path), ""))]
        assert sizes[0] == keep and (keep == 0 or sizes[1] > keep)


def test_not_a_readable_gguf(gguf_file, tmp_path):
    path = gguf_file({"output_norm.weight": (np.ones(64, np.float32), None)})
    whole = path.read_bytes()
    assert open_checkpoint(tmp_path).path == path  # a folder with one file
    for version, hint in ((1, "convert it again"), (3 << 24, "big-endian")):
        path.write_bytes(whole[:4] + version.to_bytes(4, "little") + whole[8:])
        with pytest.raises(UnsupportedFormatError, match=hint):
            open_checkpoint(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(UnsupportedFormatError, match="does not start with GGUF"):
        open_checkpoint(path)
    at = whole.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8  # the type follows dims
    path.write_bytes(whole[:at] + (200).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(UnsupportedFormatError, match=r"output_norm.weight has tensor type 200"):
        open_checkpoint(path)
    path.write_bytes(whole[:at] + int(GGMLQuantizationType.Q8_K).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(UnsupportedFormatError, match=r"not made of the blocks of 256 of Q8_K"):
        open_checkpoint(path)


def test_the_real_file(smollm2_gguf):
    checkpoint = open_checkpoint(smollm2_gguf)
    expected = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152}
    assert expected.items() <= checkpoint.config.items()
    assert checkpoint.config["rope_theta"] == 100000 and checkpoint.config["tie_word_embeddings"]
    assert len(checkpoint.tensors) == 272
    blocks = {n: t for n, t in checkpoint.tensors.items() if ".layers.7." in n or "norm" in n}
    values = materialize({name: as_float(t) for name, t in blocks.items()})
    raw = {canonical_name(t.name): t for t in GGUFReader(smollm2_gguf).tensors if "blk.7." in t.name or "norm" in t.name}
    assert raw.keys() == values.keys()
    for name, tensor in raw.items():
        truth = quants.dequantize(tensor.data, tensor.tensor_type)
        if ".q_proj" in name or ".k_proj" in name:
            heads = 9 if "q_proj" in name else 3
            truth = truth.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(truth.shape)
        np.testing.assert_array_equal(bits(values[name]), bits(truth))
