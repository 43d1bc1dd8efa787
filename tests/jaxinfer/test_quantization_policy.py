"""Which matrix is quantised how: short forms, rules and skips, and the patterns that are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_llama import TinyModel, check

import jaxinfer
from jaxinfer import EngineConfig, QuantizationConfig, errors
from jaxinfer.loading import open_source
from jaxinfer.models.decoder import parameters
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
        ({"weight_format": "int3"}, ["weight_format is 'int3'", "int, fp8, nf4, mxfp4"]),
        ({"skip": "blocks.0.*"}, ["skip is 'blocks.0.*'", "a list"]),
        ({"skip": [""]}, ["skip is ['']"]),
        ({"rules": ["blocks.0.*"]}, ["rules is ['blocks.0.*']", "a dict"]),
        ({"rules": {"blocks.0.*": 8}}, ["'blocks.0.*': 8", "short form"]),
        ({"rules": {"blocks.0.*": "w5a16"}}, ["'w5a16' is not understood"]),
    ],
)
def test_what_is_refused(values: dict, words: list[str]) -> None:
    with pytest.raises(errors.ConfigError) as error:
        EngineConfig.load({"quantization": values})
    check(error, *words)


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


def test_mixed_forms_run_on_meshes(make_engine, tiny: TinyModel) -> None:
    """Every form in one model: the same greedy tokens alone and split over two shards."""
    rules = {"*.q": "fp8-g24-a16", "*.mlp.gate": "w8a8-g24", "*.mlp.down": "mxfp4", "*.mlp.up": "bfloat16"}
    values = {"quantization": {"weight_bits": 8, "activation_bits": 16, "rules": rules}, "dtype": "float32"}
    prompts = [[5, 9, 2], [17, 3, 88, 41, 2]]
    params = jaxinfer.SamplingParams(max_tokens=6)
    alone, split = (make_engine(tp=tp, **values).generate(prompts, params) for tp in (1, 2))
    assert [r.token_ids for r in alone] == [r.token_ids for r in split]
    report = make_engine(**values).memory_report()
    assert {row.form for row in report.rows if row.kind == "mlp.down"} == {"mxfp4, group 32"}


def test_formats_on_load(tiny: TinyModel) -> None:
    """Weights in NF4 and FP8 are near the float ones, and what is skipped is equal."""
    plain = jaxinfer.load_model(tiny.folder)
    q = dataclasses.replace(QuantizationConfig.parse("fp8-a16"), skip=("*.k",), rules={"*.v": "fp8-g24"})
    model = jaxinfer.load_model(tiny.folder, quantization=q)
    block, given = model.blocks[1].attention, plain.blocks[1].attention
    np.testing.assert_array_equal(block.k.get_value(), given.k.get_value())
    value = block.v.get_value()
    assert isinstance(value, QTensor) and value.group == 24 and value.activation.format == "fp8"
