"""EngineConfig from Python, dicts and files: dtypes as people write them, round trips, two sources, and the shipped JSON schema."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_llama import check

import jaxinfer
from jaxinfer import CacheConfig, EngineConfig, ParallelConfig, QuantizationConfig, errors
from jaxinfer.config import MATMUL_PRECISIONS
from jaxinfer.config_schema import DIALECT, PARTS, descriptions, schema


class TorchDtype:
    """Prints like a dtype of torch."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"torch.{self.name}"


# --- dtypes


@pytest.mark.parametrize(
    ("name", "ways"),
    {
        "float16": ["fp16", "half", "FP16", "torch.float16", "torch.half", np.float16, np.dtype("float16"), jnp.float16],
        "bfloat16": ["bf16", "bfloat", "BFloat16", ml_dtypes.bfloat16, jnp.bfloat16, jnp.dtype(jnp.bfloat16)],
        "float32": ["fp32", "float", "single", "torch.float", np.float32, jnp.float32, jnp.zeros(0).dtype],
    }.items(),
)
def test_dtype_as_people_write_it(name: str, ways: list[Any]) -> None:
    for way in [*ways, name, TorchDtype(name)]:
        assert EngineConfig(dtype=way).dtype == EngineConfig.load({"dtype": way}).dtype == name
        assert CacheConfig(dtype=way).dtype == name


@pytest.mark.parametrize(
    "value", [float, np.float64, "double", "", 16, ["fp16"], np.zeros(3), TorchDtype("float8"), True], ids=repr
)
def test_what_is_no_dtype(value: Any) -> None:
    for part in (EngineConfig, CacheConfig):
        with pytest.raises(errors.ConfigError, match=r"dtype is .*; choose one of float32, bfloat16, float16"):
            part(dtype=value)


def test_dtype_of_the_cache() -> None:
    assert EngineConfig().cache_dtype == "float32"
    assert EngineConfig(dtype="bf16").cache_dtype == "bfloat16"
    assert EngineConfig(dtype="bf16", kv_cache=CacheConfig(dtype=np.int8)).cache_dtype == "int8"


# --- round trips and two sources

EVERYTHING = EngineConfig(
    checkpoint="demo",
    inference_max_tokens=77,
    prefill_chunk=16,
    micro_batch_size="auto",
    dtype="half",
    quantization=QuantizationConfig(weight_bits=4, activation_bits=16, group_size=32, symmetric=False, head_bits=16),
    engine=ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3, data_parallel_size=4),
    kv_cache=CacheConfig(dtype="int8"),
    matmul_precision="tf32",
    kernels="xla",
    head_sketch=False,
    batch_invariant=True,
    max_logprobs=7,
    memory_fraction=0.5,
    compilation_cache=Path("/tmp/cache"),
    executables=Path("/tmp/executables"),
)


def test_round_trip(tmp_path: Path) -> None:
    changed = dataclasses.asdict(EVERYTHING)
    assert all(changed[f.name] != f.default for f in dataclasses.fields(EngineConfig)), "no field is left out of this test"
    for given in (EVERYTHING, EngineConfig()):
        (tmp_path / "config.json").write_text(json.dumps(given.to_dict()))
        for source in (given.to_dict(), tmp_path / "config.json", str(tmp_path / "config.json"), given):
            assert EngineConfig.load(source) == given


def test_the_documents_configuration() -> None:
    values = {
        "inference_max_tokens": 2048,
        "micro_batch_size": 16,
        "quantization": {"enabled": True, "weight_bits": 8, "activation_bits": 8},
        "engine": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
    }
    assert EngineConfig.load(values) == EngineConfig(
        inference_max_tokens=2048,
        micro_batch_size=16,
        quantization=QuantizationConfig(weight_bits=8, activation_bits=8),
        engine=ParallelConfig(tensor_parallel_size=4, pipeline_parallel_size=2),
    )


def test_parts_as_objects_in_a_dict() -> None:
    values = {"engine": ParallelConfig(tensor_parallel_size=2), "quantization": QuantizationConfig(), "kv_cache": CacheConfig()}
    assert EngineConfig.load(values) == EngineConfig(**values)


def test_keywords_beside_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "fp16", "engine": {"tensor_parallel_size": 2}}')
    base = EngineConfig(dtype="fp16", engine=ParallelConfig(tensor_parallel_size=2))
    wanted = dataclasses.replace(
        base,
        engine=ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3),
        quantization=QuantizationConfig(weight_bits=4),
    )
    more = {"engine": {"pipeline_parallel_size": 3}, "quantization": "int4", "dtype": np.float16}
    for source in (base, json.loads((tmp_path / "config.json").read_text()), tmp_path / "config.json"):
        assert EngineConfig.load(source, more) == wanted
        with pytest.raises(errors.ConfigError) as error:
            EngineConfig.load(source, {"engine": {"tensor_parallel_size": 4}})
        check(error, "engine.tensor_parallel_size is 2 in the configuration and 4 in the keyword arguments", "leave one")
    assert EngineConfig.load(base, {}) is base
    assert EngineConfig.load(None, {"dtype": None, "quantization": None}) == EngineConfig()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"dtype": "fp16", "dtype": "bf16"}', "the key 'dtype' is there twice"),
        ('{"engine": {"tensor_parallel_size": 2, "tensor_parallel_size": 2}}', "'tensor_parallel_size' is there twice"),
        ("[1, 2]", "got list"),
        ("\xff", "is not JSON"),
    ],
)
def test_file(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(errors.ConfigError, match=word):
        EngineConfig.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"micro_batch_size": "large"}, ["micro_batch_size is 'large'", "at least 1, or 'auto'"]),
        ({"engine": {"data_parallel_size": 0}}, ["engine.data_parallel_size is 0", "at least 1"]),
        ({"engine": {"data_parallel": 2}}, ["no key 'data_parallel'", "'data_parallel_size'"]),
        ({"engine": {"sequence_parallel": True, "int8_across_hosts": True}}, ["engine.sequence_parallel", "leave one of them"]),
        ({"prefill_chunk": 0}, ["prefill_chunk is 0", "at least 1"]),
        ({"prefill_chunk": 8, "engine": {"sequence_parallel": True}}, ["prefill_chunk is 8", "leave one"]),
        ({"batch_invariant": "yes"}, ["batch_invariant is 'yes'", "True or False"]),
        ({"batch_invariant": 1}, ["batch_invariant is 1", "True or False"]),
        ({"matmul_precision": "highest"}, ["matmul_precision is 'highest'", "float32, tf32_x3, tf32, bfloat16"]),
        ({"matmul_precison": "tf32"}, ["'matmul_precison'", "did you mean 'matmul_precision'"]),
        ({"quantization": {"enabled": "true"}}, ["quantization.enabled is 'true'", "True or False"]),
        ({"quantization": {"symmetric": 0}}, ["quantization.symmetric is 0", "True or False"]),
        ({"quantization": {"weight_bits": 8.0}}, ["quantization.weight_bits is 8.0", "8, 4, 16, 32"]),
        ({"quantization": {"group_size": 1.5}}, ["quantization.group_size is 1.5", "whole number"]),
        ({"checkpoint": 5}, ["checkpoint is 5", "path"]),
        ({"engine.tensor_parallel_size": 2}, ["no key 'engine.tensor_parallel_size'"]),
        ({5: 2}, ["no key 5", "known are"]),
    ],
    ids=str,
)
def test_refused(values: dict[Any, Any], words: list[str]) -> None:
    with pytest.raises(errors.ConfigError) as error:
        EngineConfig.load(values)
    check(error, *words)


# --- what a key does


@pytest.mark.parametrize("precision", MATMUL_PRECISIONS)
def test_matmul_precision_is_that_of_the_programs(tiny, precision: str) -> None:
    """Of every product of float32 matrices, whatever jax's own setting is; a CPU is told it in jax's words."""
    engine = jaxinfer.init_inference(tiny.folder, {"matmul_precision": precision, "kernels": "xla", "inference_max_tokens": 32})
    programs = engine._running()
    ids, lengths = jax.ShapeDtypeStruct((1, 16), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    with jax.default_matmul_precision("bfloat16"):
        text = programs.score().lower(programs.shapes, ids, lengths).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    name = {"float32": "HIGHEST", "tf32_x3": "HIGH", "tf32": "HIGH", "bfloat16": "DEFAULT"}[precision]
    assert len(dots) > 3 and all(f"precision = [{name}, {name}]" in line for line in dots)


# --- the JSON schema


def test_shipped_schema_is_the_generated_one() -> None:
    shipped = importlib.resources.files("jaxinfer").joinpath("config.schema.json").read_text("utf-8")
    assert json.loads(shipped) == schema(), "run scripts/config_docs.py"


def test_documented_tables_are_the_generated_ones() -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "config_docs.py"))
    stale = [path.name for path, text in script["texts"]().items() if path.read_text("utf-8") != text]
    assert not stale, "run scripts/config_docs.py"


def test_every_field_is_described() -> None:
    for part in (EngineConfig, *PARTS):
        texts = descriptions(part)
        assert list(texts) != [] and set(texts) == {f.name for f in dataclasses.fields(part)}
        assert all(text.endswith(".") and len(text) > 5 for text in texts.values())


KEYWORDS = {"$schema", "title", "description", "type", "properties", "additionalProperties", "$defs", "$ref", "anyOf", "enum"}
KEYWORDS |= {"pattern", "minimum", "maximum", "exclusiveMinimum", "multipleOf", "default"}
TYPES = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "null": type(None), "object": dict}


def allows(rule: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """What draft 2020-12 says of a value, for the keywords that the schema uses."""
    assert set(rule) <= KEYWORDS
    kinds = [rule["type"]] if isinstance(rule.get("type"), str) else rule.get("type", list(TYPES))
    fits = [k for k in kinds if isinstance(value, TYPES[k]) and (k == "boolean" or not isinstance(value, bool))]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (
        (bool(fits) or ("integer" in kinds and isinstance(value, float) and value.is_integer()))
        and ("$ref" not in rule or allows(root["$defs"][rule["$ref"].removeprefix("#/$defs/")], value, root))
        and ("anyOf" not in rule or any(allows(option, value, root) for option in rule["anyOf"]))
        and ("enum" not in rule or any(type(c) is type(value) and c == value for c in rule["enum"]))
        and ("pattern" not in rule or not isinstance(value, str) or bool(re.search(rule["pattern"], value)))
        and (not number or value >= rule.get("minimum", value))
        and (not number or value <= rule.get("maximum", value))
        and (not number or value > rule.get("exclusiveMinimum", value - 1))
        and (not number or value % rule.get("multipleOf", 1) == 0 or "multipleOf" not in rule)
        and (
            not isinstance(value, dict)
            or "properties" not in rule
            or all(k in rule["properties"] and allows(rule["properties"][k], v, root) for k, v in value.items())
        )
    )


VALUES = {
    "checkpoint": ["demo", None, 5],
    "inference_max_tokens": [2, 1, "2", True],
    "prefill_chunk": [None, 1, 0, 2.5, "all"],
    "micro_batch_size": [1, "auto", 0, "many", None],
    "dtype": ["fp16", "float32", "int8", None, "float64", 16],
    "quantization": [None, "w4a16-g32", "w4", {}, {"weight_bits": 4}, {"weight_bits": 3}, {"bits": 4}, {"group_size": 3}, 8],
    "engine": [{"data_parallel_size": 2}, {"data_parallel_size": 0}, {"tp": 2}, 2],
    "kv_cache": [{"dtype": "int8"}, {"dtype": "half"}, {"dtype": "int4"}, "int8"],
    "matmul_precision": ["high", "low", None],
    "kernels": ["auto", "xla", "fast", None],
    "head_sketch": [False, "no", None],
    "batch_invariant": [True, "yes", None],
    "max_logprobs": [0, 20, 21, 1.5],
    "memory_fraction": [1, 0.5, 0, 1.5, "all"],
    "compilation_cache": ["folder", False, None, 5],
    "executables": ["folder", True, False, None, 5],
}


def test_schema_and_loader_agree() -> None:
    root = schema()
    assert root["$schema"] == DIALECT and set(VALUES) == set(root["properties"])
    assert allows(root, EVERYTHING.to_dict() | {"quantization": "w8a8"}, root) and allows(root, EngineConfig().to_dict(), root)
    assert allows(root, {}, root) and not allows(root, {"unknown": 1}, root) and not allows(root, [], root)
    accepted = 0
    for name, values in VALUES.items():
        for value in values:
            try:
                EngineConfig.load({name: value})
                loads = True
            except errors.ConfigError:
                loads = False
            assert allows(root, {name: value}, root) == loads, (name, value)
            accepted += loads
    assert accepted > 20


def test_defaults_in_the_schema() -> None:
    root = schema()
    for part, rules in ((EngineConfig, root), *((part, root["$defs"][part.__name__]) for part in PARTS)):
        plain = part().to_dict() if part is EngineConfig else dataclasses.asdict(part())
        given = {name: rule["default"] for name, rule in rules["properties"].items()}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}  # JSON has lists
        assert {k: v for k, v in plain.items() if not isinstance(v, dict)} == {k: v for k, v in given.items() if v != {}}
