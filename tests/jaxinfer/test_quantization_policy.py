"""Which matrix is quantised how: short forms, rules and skips, and the patterns that are refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from tiny_llama import TinyModel, check

import jaxinfer
from convert.load import QuantSpec, quantized
from convert.readers.base import LazyTensor
from jaxinfer import EngineConfig, QuantizationConfig, errors
from jaxinfer.cli import main
from jaxinfer.loading import open_source
from jaxinfer.models.decoder import parameters
from jaxinfer.models.families import find_family
from jaxinfer.quantization.policy import Kept, kept
from pallas_kernels.qtensor import ActivationQuant, QTensor


@pytest.mark.parametrize(
    ("short", "form", "group", "activation"),
    [
        ("fp8", "fp8", None, ActivationQuant(format="fp8")),
        ("fp8-a16", "fp8", None, None),
        ("fp8-token", "fp8", None, ActivationQuant(format="fp8", group=None)),
        ("fp8-g128", "fp8", 128, ActivationQuant(format="fp8")),
        ("nf4", "nf4", 64, None),
        ("nf4-g32-a8", "nf4", 32, ActivationQuant()),
        ("mxfp4", "mxfp4", 32, None),
        ("int4-a8", "int4", 64, ActivationQuant()),
        ("stored-a8", "stored", None, ActivationQuant()),
        ("stored-a16", "stored", None, None),
        ("w8a16", "int8", None, None),
    ],
)
def test_short_forms(short: str, form: str, group: int | None, activation: ActivationQuant | None) -> None:
    q = QuantizationConfig.parse(short)
    assert (q.format, q.group, q.activation) == (form, group, activation)
    assert EngineConfig.load({"quantization": short}).quantization == q
    assert EngineConfig.load(EngineConfig(quantization=q).to_dict()).quantization == q


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"weight_format": "nf4"}, ["weight_format is 'nf4', which has 4 bits", "weight_bits is 8"]),
        ({"weight_format": "fp8", "weight_bits": 4}, ["which has 8 bits"]),
        ({"weight_format": "fp8", "symmetric": False}, ["fp8 weights are symmetric"]),
        ({"weight_format": "mxfp4", "weight_bits": 4, "group_size": 64}, ["group_size is 64", "groups of 32"]),
        ({"weight_format": "stored"}, ["activation_bits, 8 or 16"]),
        ({"weight_format": "stored", "activation_bits": 8, "head_bits": 8}, ["head_bits is 8", "as they are stored"]),
        ({"weight_format": "stored", "activation_bits": 8, "group_size": 32}, ["group_size is 32", "as they are stored"]),
        ({"weight_format": "int3"}, ["weight_format is 'int3'", "int, fp8, nf4, mxfp4"]),
        ({"skip": "blocks.0.*"}, ["skip is 'blocks.0.*'", "a list"]),
        ({"skip": [""]}, ["skip is ['']"]),
        ({"rules": ["blocks.0.*"]}, ["rules is ['blocks.0.*']", "a dict"]),
        ({"rules": {"blocks.0.*": 8}}, ["'blocks.0.*': 8", "short form"]),
        ({"rules": {"blocks.0.*": "w5a16"}}, ["'w5a16' is not understood"]),
        ({"rules": {"blocks.0.*": "w8a8-attn8"}}, ["attention_bits is for all layers"]),
        ({"attention_bits": 4}, ["attention_bits is 4", "16 or 8"]),
        ({"weight_bits": 16, "activation_bits": 8}, ["activation_bits is 8", "weights of 16 bits are floats"]),
        ({"weight_bits": 32, "group_size": 64}, ["group_size is 64", "weights of 32 bits are floats"]),
    ],
)
def test_what_is_refused(values: dict, words: list[str]) -> None:
    with pytest.raises(errors.ConfigError) as error:
        EngineConfig.load({"quantization": values})
    check(error, *words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quantization": {"weight_bits": 16}, "dtype": "float32"}, ["weight_bits is 16 and dtype is 'float32'"]),
        ({"quantization": {"weight_bits": 32}, "dtype": "bfloat16"}, ["weight_bits is 32 and dtype is 'bfloat16'"]),
        ({"quantization": "w8a8-attn8", "kv_cache": {"dtype": "int4"}}, ["attention_bits is 8", "kv_cache.dtype 'int4'"]),
    ],
)
def test_what_contradicts_the_rest_is_refused(values: dict, words: list[str]) -> None:
    with pytest.raises(errors.ConfigError) as error:
        EngineConfig.load(values)
    check(error, *words)


def test_weights_of_16_and_32_bits_are_floats(tiny: TinyModel) -> None:
    """In all matrices without a rule, embedding and head too."""
    opened = open_source(tiny.folder)
    for bits, dtype, expected in ((16, None, "bfloat16"), (16, "float16", "float16"), (32, None, "float32")):
        quantization = QuantizationConfig(weight_bits=bits, rules={"*.down": "w8a16"})
        how = kept(parameters(opened.config), dtype=dtype, quantization=quantization, head_dim=8)
        assert how["blocks.0.mlp.up"] == how["embedding"] == Kept(dtype=expected)
        assert how["blocks.0.mlp.down"].spec.format == "int8"
    how = kept(parameters(opened.config), dtype=None, quantization=QuantizationConfig(weight_bits=32, head_bits=8), head_dim=8)
    assert how["embedding"].spec.format == "int8" and how["embedding"].spec.activation is None


def float_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(4 * math.prod(shape) for shape in shapes.values())


@dataclasses.dataclass
class Unread(LazyTensor):
    """A float32 tensor of a shape; nobody reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))
    packed: None = None

    def read(self, units=None):
        raise AssertionError("sizes are known without reading")


def test_int8_is_a_quarter_and_int4_an_eighth() -> None:
    """Of GPT-2 with 124 million parameters and of BERT-base, embeddings included; not a byte of them is needed to know it."""
    gpt2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    gpt2["architectures"] = ["GPT2LMHeadModel"]
    like_gpt2 = find_family(gpt2).config(gpt2, {})
    like_bert = dataclasses.replace(like_gpt2, vocab=30522, max_positions=512)  # BERT-base has the same matrices in each layer
    for config, parameters_in_all in ((like_gpt2, 124_439_808), (like_bert, 108_890_000)):
        info = parameters(config)
        whole = float_bytes({path: p.shape for path, p in info.items()})
        assert whole == pytest.approx(4 * parameters_in_all, rel=1e-3)
        tensors = {path: Unread(path, p.shape) for path, p in info.items()}
        for values, most in (({"weight_bits": 8}, 0.26), ({"weight_bits": 4, "head_bits": 4}, 0.15)):
            how = kept(info, dtype=None, quantization=QuantizationConfig(**values), head_dim=64)
            assert 0.12 < sum(how[path].of(tensor).nbytes for path, tensor in tensors.items()) / whole <= most


def test_integer_attention_is_kept_with_the_model(tiny: TinyModel, tmp_path) -> None:
    """The choice is the model's: of the module, of an engine, and of a checkpoint that is written with it."""
    model = jaxinfer.load_model(tiny.folder, quantization=QuantizationConfig(weight_bits=32, attention_bits=8))
    plain = jaxinfer.load_model(tiny.folder, dtype="float32")
    ids = np.array([[5, 3, 9, 20, 7]])
    difference = np.abs(np.asarray(model(ids) - plain(ids))).max()
    assert model.config.attention.integer and not plain.config.attention.integer and 0 < difference < 0.1
    engine = jaxinfer.init_inference(tiny.folder, {"quantization": "w8a16-attn8", "inference_max_tokens": 16})
    assert engine.plan.config.attention.integer
    assert main(["convert", str(tiny.folder), str(tmp_path / "native"), "--quantize", "w8a16-attn8"]) == 0
    assert open_source(tmp_path / "native").config.attention.integer
    with pytest.raises(SystemExit):
        main(["convert", str(tiny.folder), str(tmp_path / "gguf"), "--format", "gguf", "--quantize", "w8a16-attn8"])


def forms(tiny: TinyModel, **values) -> dict[str, Kept]:
    opened = open_source(tiny.folder)
    quantization = QuantizationConfig(**values)
    return kept(parameters(opened.config), dtype="bfloat16", quantization=quantization, head_dim=8)


def test_rules(tiny: TinyModel) -> None:
    """Skips come before rules, the first rule that matches before later ones, rules before head_bits."""
    rules = {"*.mlp.down": "w4a16-g32", "blocks.?.mlp.*": "nf4-g32", "head": "fp8", "*.o": "float16"}
    how = forms(tiny, rules=rules, skip=["blocks.0.*"], activation_bits=16)
    assert how["blocks.0.mlp.down"] == how["blocks.0.attention.q"] == Kept(dtype="bfloat16")
    assert how["blocks.1.mlp.down"].spec.format == "int4" and how["blocks.1.mlp.down"].spec.group == 32
    assert how["blocks.2.mlp.gate"].spec.format == how["blocks.2.mlp.up"].spec.format == "nf4"
    assert how["blocks.1.attention.o"] == Kept(dtype="float16")
    assert how["blocks.1.attention.q"].spec.format == "int8" and how["blocks.1.attention.q"].spec.activation is None
    assert how["head"].spec.format == "fp8" and how["head"].spec.activation.format == "fp8"
    assert how["embedding"].spec.format == "int8" and how["blocks.0.mlp.norm"] == Kept(dtype="float32")


@pytest.mark.parametrize(
    "values", [{"skip": ["*.mlp.downs"]}, {"rules": {"*.mlp.norm": "int8"}}, {"skip": ["model.layers.0.*"]}]
)
def test_a_pattern_that_matches_nothing(tiny: TinyModel, values: dict) -> None:
    with pytest.raises(errors.ConfigError) as error:
        forms(tiny, **values)
    check(error, "matches no matrix", "named like 'blocks.")
    with pytest.raises(errors.ConfigError, match="matches no matrix"):
        jaxinfer.init_inference(tiny.folder, {"quantization": values})


@pytest.mark.slow
def test_mixed_forms_run_on_meshes(make_engine, tiny: TinyModel) -> None:
    """Every form in one model: the same greedy tokens alone and split over two shards."""
    rules = {"*.q": "fp8-g24-a16", "*.mlp.gate": "w8a8-g24", "*.mlp.down": "mxfp4", "*.mlp.up": "bfloat16"}
    values = {"quantization": {"weight_bits": 8, "activation_bits": 16, "rules": rules}, "dtype": "float32"}
    # two tokens are 0.005 apart here, and an INT8 input that rounds the other way moves a logit by as much: XLA's sums are the same on both
    values["kernels"] = "xla"
    prompts = [[5, 9, 2], [17, 3, 88, 41, 2]]
    params = jaxinfer.SamplingParams(max_tokens=6)
    alone, split = (make_engine(tp=tp, **values).generate(prompts, params) for tp in (1, 2))
    assert [r.token_ids for r in alone] == [r.token_ids for r in split]
    report = make_engine(**values).memory_report()
    assert {row.form for row in report.rows if row.kind == "mlp.down"} == {"mxfp4, group 32"}


def test_stored_weights_with_other_inputs(tiny: TinyModel) -> None:
    """Levels stay those of the checkpoint; what is float stays float; a form whose inputs cannot be chosen is refused."""
    tensors = open_source(tiny.folder).tensors
    how = forms(tiny, weight_format="stored", activation_bits=8)
    packed = quantized(tensors["blocks.0.mlp.down"], QuantSpec(format="int4", group=32))
    kept_so = how["blocks.0.mlp.down"].of(packed)
    assert kept_so.packed.activation == ActivationQuant(group=48) and packed.packed.activation is None
    given, got = packed.read(), kept_so.read()
    np.testing.assert_array_equal(given.values, got.values)
    np.testing.assert_array_equal(given.scales, got.scales)
    eight = quantized(tensors["blocks.0.mlp.down"], QuantSpec(format="int8", activation=ActivationQuant()))
    plain = forms(tiny, weight_format="stored", activation_bits=16)["blocks.0.mlp.down"].of(eight)
    assert plain.packed.format == "int8" and plain.packed.activation is None
    assert how["head"].of(tensors["head"]).packed is None
    with pytest.raises(errors.QuantizationError, match="stored as nf4"):
        how["blocks.0.mlp.down"].of(quantized(tensors["blocks.0.mlp.down"], QuantSpec(format="nf4", group=32)))


def test_formats_on_load(tiny: TinyModel) -> None:
    """Weights in NF4 and FP8 are near the float ones, and what is skipped is equal."""
    plain = jaxinfer.load_model(tiny.folder)
    q = dataclasses.replace(QuantizationConfig.parse("fp8-a16"), skip=("*.k",), rules={"*.v": "fp8-g24"})
    model = jaxinfer.load_model(tiny.folder, quantization=q)
    block, given = model.blocks[1].attention, plain.blocks[1].attention
    np.testing.assert_array_equal(block.k.get_value(), given.k.get_value())
    value = block.v.get_value()
    assert isinstance(value, QTensor) and value.group == 24 and value.activation.format == "fp8"
