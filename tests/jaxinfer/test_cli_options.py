"""The options that commands share: none for nothing, none forgotten, each with an effect."""

import argparse
import dataclasses
import json

import pytest

import jaxinfer
from jaxinfer.cli import _parser, chat, options
from jaxinfer.config import KERNELS, MATMUL_PRECISIONS, CacheConfig, EngineConfig, ParallelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.values import CACHE_DTYPES, DTYPES


def names(cls) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def parsed(*arguments: str) -> argparse.Namespace:
    return _parser().parse_args([*arguments])


def test_every_field_of_sampling_params_has_an_option():
    assert {o.target for o in options.SAMPLING} == names(SamplingParams) - {"logits_processor"}
    assert set(chat.WITHOUT) <= names(SamplingParams)


def test_every_part_of_the_configuration_has_an_option():
    sections = {"engine": ParallelConfig, "kv_cache": CacheConfig}
    leaves = {f"{section}.{name}" for section, part in sections.items() for name in names(part)}
    assert {o.target for o in options.ENGINE} == names(EngineConfig) - {*sections, "checkpoint"} | leaves


def test_choices_are_those_of_the_configuration():
    choices = {o.target: o.choices for o in options.ENGINE if o.choices}
    assert choices == {
        "dtype": DTYPES,
        "kv_cache.dtype": CACHE_DTYPES,
        "matmul_precision": MATMUL_PRECISIONS,
        "kernels": KERNELS,
    }


VALUES = {
    "max_tokens": ("4", 4),
    "min_tokens": ("2", 2),
    "temperature": ("1.5", 1.5),
    "top_k": ("50", 50),
    "top_p": ("0.9", 0.9),
    "min_p": ("0.1", 0.1),
    "seed": ("7", 7),
    "repetition_penalty": ("1.2", 1.2),
    "presence_penalty": ("-0.5", -0.5),
    "frequency_penalty": ("0.25", 0.25),
    "no_repeat_ngram_size": ("3", 3),
    "logit_bias": ("5=-1.5", {5: -1.5}),
    "stop": ("END", ("END",)),
    "stop_token_ids": ("9", (9,)),
    "ignore_eos": (None, True),
    "n": ("2", 2),
    "best_of": ("3", 3),
    "logprobs": ("1", 1),
    "prompt_logprobs": ("0", 0),
    "echo": (None, True),
}


@pytest.mark.parametrize("option", options.SAMPLING, ids=lambda option: option.flag)
def test_a_sampling_option_reaches_its_field(option):
    expected = {"bad_words": ("bad", "word") if option.kind is str else ((1, 2), (3,))}
    if option.target == "bad_words":
        given = [a for text in (("bad", "word") if option.kind is str else ("1,2", "3")) for a in (option.flag, text)]
    else:
        text, value = VALUES[option.target]
        given, expected = [option.flag, *([] if text is None else [text])], {option.target: value}
    more = {"n": {"temperature": 1.0}, "best_of": {"temperature": 1.0}}.get(option.target, {})
    args = parsed("generate", "x", "--json", *given)
    assert options.sampling_params(args, **more) == SamplingParams(**expected, **more)
    if option.target not in chat.WITHOUT:
        assert options.sampling_params(parsed("chat", "x", "--json", *given), **more) == SamplingParams(**expected, **more)


def test_options_of_the_engine_reach_the_configuration(tmp_path):
    file = tmp_path / "engine.json"
    file.write_text(json.dumps({"inference_max_tokens": 77, "engine": {"tensor_parallel_size": 4}, "max_logprobs": 2}))
    given = ["--dtype", "bfloat16", "--quantize", "w8a8", "--tp", "2", "--pp", "3", "--dp", "2", "--max-length", "99"]
    given += ["--micro-batch-size", "auto", "--kv-cache-dtype", "int8", "--matmul-precision", "tf32", "--batch-invariant"]
    given += ["--max-logprobs", "7", "--memory-fraction", "0.5", "--compilation-cache", "off"]
    for command in ("generate", "chat", "score"):
        config = options.engine_config(parsed(command, "x", "--config", str(file), *given))
        assert config == EngineConfig(
            dtype="bfloat16",
            quantization=jaxinfer.QuantizationConfig.parse("w8a8"),
            engine=ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3, data_parallel_size=2),
            inference_max_tokens=99,
            micro_batch_size="auto",
            kv_cache=CacheConfig(dtype="int8"),
            matmul_precision="tf32",
            batch_invariant=True,
            max_logprobs=7,
            memory_fraction=0.5,
            compilation_cache=False,
        )
        plain = options.engine_config(parsed(command, "x", "--config", str(file)))
        assert plain == EngineConfig.load(file)
    assert options.engine_config(parsed("chat", "x", "--compilation-cache", "/some/where")).compilation_cache == "/some/where"


def test_as_many_alternatives_are_reported_as_are_asked_for():
    assert options.engine_config(parsed("generate", "x", "--logprobs", "9", "--json")).max_logprobs == 9
    assert options.engine_config(parsed("generate", "x", "--prompt-logprobs", "8", "--json")).max_logprobs == 8
    assert (
        options.engine_config(parsed("generate", "x", "--logprobs", "1", "--json")).max_logprobs == EngineConfig().max_logprobs
    )
    assert options.engine_config(parsed("generate", "x", "--logprobs", "9", "--max-logprobs", "3")).max_logprobs == 3


def test_a_configuration_file_may_use_other_peoples_names(tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"dtype": "fp16", "tensor_parallel": {"tp_size": 2}, "max_out_tokens": 64}))
    config = options.engine_config(parsed("score", "x", "--config", str(file)))
    assert (config.dtype, config.engine.tensor_parallel_size, config.inference_max_tokens) == ("float16", 2, 64)
    file.write_text(json.dumps({"dtipe": "fp16"}))
    with pytest.raises(ConfigError, match="did you mean 'dtype'"):
        options.engine_config(parsed("score", "x", "--config", str(file)))
