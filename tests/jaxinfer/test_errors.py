"""Every wrong request, configuration or mesh: an error of its own class with value, limit and advice, before compilation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_llama import check

import jaxinfer
from jaxinfer import EngineConfig, QuantizationConfig, SamplingParams, errors
from jaxinfer.loading import open_source
from jaxinfer.models.decoder import Decoder
from sharding.mesh import make_mesh


@pytest.fixture(autouse=True)
def nothing_compiled(compiled: list[str]):
    """Of every test here: whatever is refused is refused before XLA is asked."""
    yield
    assert not compiled


@pytest.fixture(scope="module")
def engine(tiny) -> jaxinfer.Engine:
    config = {"inference_max_tokens": 32, "micro_batch_size": 2, "max_logprobs": 3, "compilation_cache": False}
    return jaxinfer.init_inference(tiny.folder, config)


# --- prompts and limits


def test_generation_past_the_limit(engine) -> None:
    with pytest.raises(errors.TokenLimitError) as error:
        engine.generate([[1] * 4, [1] * 20], SamplingParams(max_tokens=13))
    check(error, "prompt 1", "20 tokens", "13 new", "inference_max_tokens is 32", "lower max_tokens to 12")


@pytest.mark.parametrize("call", ["generate", "stream", "score"])
def test_prompt_past_the_limit(engine, call: str) -> None:
    with pytest.raises(errors.TokenLimitError) as error:
        getattr(engine, call)([1] * 33)
    check(error, "33 tokens", "inference_max_tokens is 32", "shorten it or raise the limit")


def test_prompt_that_leaves_no_room(engine) -> None:
    with pytest.raises(errors.TokenLimitError) as error:
        engine.generate([1] * 32)
    check(error, "32 tokens", "1 new", "raise the limit")


@pytest.mark.parametrize("call", ["generate", "stream", "score"])
@pytest.mark.parametrize("prompt", [[], (), np.zeros((0,), np.int32)], ids=["list", "tuple", "array"])
def test_empty_prompt(engine, call: str, prompt) -> None:
    with pytest.raises(errors.PromptError, match="at least one token"):
        getattr(engine, call)(prompt)


@pytest.mark.parametrize("prompts", [[[1, 2], []], [[]], ["a", ""], [""], ""], ids=repr)
def test_empty_prompt_in_a_batch(make_engine, byte_tokenizer, prompts) -> None:
    engine = make_engine(tokenizer=byte_tokenizer)
    for call in (engine.generate, engine.score):
        with pytest.raises(errors.PromptError, match=f"prompt {max(len(prompts), 1) - 1} is empty; give at least one token"):
            call(prompts)


@pytest.mark.parametrize("token", [97, -1, 2**40])
def test_token_out_of_the_vocabulary(engine, token: int) -> None:
    for prompt in ([1, token], [[1], [1, token]]):
        with pytest.raises(errors.PromptError) as error:
            engine.generate(prompt)
        check(error, f"token {token}", "0 to 96")


@pytest.mark.parametrize(
    "prompt", [[1.5, 2], [[True, 2]], [["1"]], [None], 5, None, [[[1, 2]]], np.ones((2, 3)), np.int32(3)], ids=repr
)
def test_prompt_of_another_type(engine, prompt) -> None:
    for call in (engine.generate, engine.score):
        with pytest.raises(errors.PromptError, match="text or a list of token ids"):
            call(prompt)


def test_text_without_a_tokenizer(engine) -> None:
    with pytest.raises(errors.PromptError, match="no tokenizer; give token ids"):
        engine.generate("text")
    with pytest.raises(errors.SamplingParamsError, match="stop strings need a tokenizer; use stop_token_ids"):
        engine.generate([1], SamplingParams(stop="a"))


# --- sampling parameters


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"max_tokens": 0}, "at least 1"),
        ({"max_tokens": 2.5}, "at least 1"),
        ({"temperature": -0.1}, "0 (greedy) or more"),
        ({"temperature": float("nan")}, "0 (greedy) or more"),
        ({"temperature": "warm"}, "0 (greedy) or more"),
        ({"top_k": -1}, "0 (off) or more"),
        ({"top_k": True}, "0 (off) or more"),
        ({"top_p": 0.0}, "above 0"),
        ({"top_p": 1.1}, "at most 1"),
        ({"min_p": 1.0}, "below 1"),
        ({"min_p": -0.5}, "0 (off) or more"),
        ({"seed": -1}, "4294967295"),
        ({"seed": 2**32}, "4294967295"),
        ({"stop": ("a", "")}, "not empty"),
        ({"stop": ""}, "not empty"),
        ({"stop": 5}, "not empty"),
        ({"stop": None}, "not empty"),
        ({"stop_token_ids": (-1,)}, "token ids"),
        ({"stop_token_ids": ("a",)}, "token ids"),
        ({"stop_token_ids": None}, "token ids"),
        ({"ignore_eos": "no"}, "True or False"),
        ({"logprobs": -1}, "0 to 20"),
        ({"logprobs": 21}, "0 to 20"),
    ],
    ids=str,
)
def test_sampling_params(values: dict[str, Any], limit: str) -> None:
    with pytest.raises(errors.SamplingParamsError) as error:
        SamplingParams(**values)
    ((name, value),) = values.items()
    stored = value if not name.startswith("stop") or isinstance(value, tuple) else (value,)
    check(error, f"{name} is {stored!r}", limit)


def test_more_logprobs_than_the_engine_has(engine) -> None:
    with pytest.raises(errors.SamplingParamsError) as error:
        engine.generate([1], SamplingParams(logprobs=4))
    check(error, "logprobs is 4", "max_logprobs is 3")


def test_too_many_stop_tokens(engine) -> None:
    with pytest.raises(errors.SamplingParamsError) as error:
        engine.generate([1], SamplingParams(stop_token_ids=tuple(range(17))))
    check(error, "17 stop tokens", "at most 16")


def test_stop_token_out_of_the_vocabulary(engine) -> None:
    with pytest.raises(errors.SamplingParamsError) as error:
        engine.generate([1], SamplingParams(stop_token_ids=(97,)))
    check(error, "stop token 97", "0 to 96")


def test_params_that_do_not_match_the_prompts(engine) -> None:
    with pytest.raises(errors.SamplingParamsError, match="2 SamplingParams for 1 prompts; give one for all, or one each"):
        engine.generate([[1]], [SamplingParams(), SamplingParams()])
    for params in ({"max_tokens": 3}, [{"max_tokens": 3}], "greedy", 5):
        with pytest.raises(errors.SamplingParamsError, match=r"got (dict|str|int)"):
            engine.generate([1], params)


def test_stream_of_no_tokens_at_a_time(engine) -> None:
    with pytest.raises(errors.ConfigError, match="every is 0; give at least 1"):
        engine.stream([1], every=0)


def test_closed_engine(tiny) -> None:
    engine = jaxinfer.init_inference(tiny.folder, {"inference_max_tokens": 32, "compilation_cache": False})
    engine.close()
    engine.close()  # a second time is nothing
    for call in (engine.generate, engine.stream, engine.score):
        with pytest.raises(errors.EngineStateError, match=r"closed; make a new one with jaxinfer.init_inference"):
            call([1])
    with pytest.raises(errors.EngineStateError):
        engine.init_state(1)
    with pytest.raises(errors.EngineStateError):
        _ = engine.params


def test_state_of_more_rows_than_the_engine_has(engine) -> None:
    for rows in (0, 3):
        with pytest.raises(errors.EngineStateError) as error:
            engine.init_state(rows)
        check(error, f"batch {rows}", "1 to 2")


# --- configuration


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"inference_max_token": 8}, ["'inference_max_token'", "did you mean 'inference_max_tokens'"]),
        ({"zzz": 8}, ["'zzz'", "known are"]),
        ({"engine": {"tensor_parallel": 2}}, ["engine has no key 'tensor_parallel'", "'tensor_parallel_size'"]),
        ({"quantization": {"weight_bit": 8}}, ["quantization has no key", "'weight_bits'"]),
        ({"kv_cache": {"dtyp": "int8"}}, ["kv_cache has no key", "'dtype'"]),
        ({"inference_max_tokens": 1}, ["inference_max_tokens is 1", "at least 2"]),
        ({"inference_max_tokens": 8.0}, ["inference_max_tokens is 8.0", "whole number"]),
        ({"micro_batch_size": 0}, ["micro_batch_size is 0", "at least 1"]),
        ({"max_logprobs": 21}, ["max_logprobs is 21", "0 to 20"]),
        ({"dtype": "float8"}, ["dtype is 'float8'", "float32, bfloat16, float16"]),
        ({"kv_cache": {"dtype": "int3"}}, ["kv_cache.dtype is 'int3'", "int8"]),
        ({"kv_cache": "int8"}, ["kv_cache is 'int8'", "CacheConfig"]),
        ({"engine": 2}, ["engine is 2", "ParallelConfig"]),
        ({"engine": {"tensor_parallel_size": 0}}, ["tensor_parallel_size is 0", "at least 1"]),
        ({"engine": {"pipeline_parallel_size": True}}, ["pipeline_parallel_size is True", "at least 1"]),
        ({"quantization": 8}, ["quantization is 8", "QuantizationConfig"]),
        ({"quantization": "w3a3"}, ["'w3a3'", "examples: int8"]),
        ({"quantization": "w4a16-g48"}, ["group_size is 48", "32, 64 or 128"]),
        ({"quantization": "w8a8-asym"}, ["symmetric is False", "weight_bits 4"]),
        ({"quantization": {"weight_bits": 2}}, ["weight_bits is 2", "choose one of 8, 4, 16, 32"]),
        ({"quantization": {"activation_bits": 4}}, ["activation_bits is 4", "choose 8 or 16"]),
        ({"quantization": {"head_bits": 5}}, ["head_bits is 5", "choose one of 8, 4, 16"]),
        ({"quantization": {"group_size": 33}}, ["group_size is 33", "even number"]),
        ({"memory_fraction": 0}, ["memory_fraction is 0", "above 0"]),
        ({"memory_fraction": 1.5}, ["memory_fraction is 1.5", "at most 1"]),
        ({"memory_fraction": "all"}, ["memory_fraction is 'all'", "at most 1"]),
        ({"compilation_cache": 5}, ["compilation_cache is 5", "folder"]),
    ],
    ids=str,
)
def test_configuration(values: dict[str, Any], words: list[str], tiny, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError) as error:
        jaxinfer.init_inference(tiny.folder, values)
    check(error, *words)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(errors.ConfigError) as error:
        EngineConfig.load(tmp_path / "config.json")
    check(error, *words)


def test_configuration_from_python() -> None:
    for values in ({"engine": {"tensor_parallel_size": 2}}, {"kv_cache": "int8"}, {"quantization": "w8a8"}):
        with pytest.raises(errors.ConfigError, match=r"EngineConfig\.load"):
            EngineConfig(**values)


def test_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"dtype": ')
    for source, word in (
        (tmp_path / "bad.json", "is not JSON"),
        (tmp_path / "none.json", "No such file"),
        ([1], "got list"),
        (5, "got int"),
    ):
        with pytest.raises(errors.ConfigError, match=word):
            EngineConfig.load(source)


def test_quantisation_spec() -> None:
    for spec in ("", "int16", "w8a4", "w4a16g32", "W8A8", "w4a16-g32-g64"):
        with pytest.raises(errors.ConfigError, match="is not understood; examples: int8, int4"):
            QuantizationConfig.parse(spec)
    with pytest.raises(errors.ConfigError, match="-token means nothing"):
        QuantizationConfig.parse("w4a16-token")


def test_quantisation_that_is_turned_off(tiny) -> None:
    off = QuantizationConfig(enabled=False)
    assert EngineConfig(quantization=off).quantization is None
    assert EngineConfig.load({"quantization": {"enabled": False}}).quantization is None
    stored = open_source(tiny.folder).stored_as(dtype=None, quantization=off)
    assert not any(tensor.packed for tensor in stored.values())


def test_groups_that_do_not_divide(tiny) -> None:
    """72 inputs are no multiple of 64."""
    with pytest.raises(errors.QuantizationError) as error:
        jaxinfer.init_inference(tiny.folder, {"quantization": "w4a16"})
    check(error, "groups of 64 do not divide its 72 inputs", "choose one of")


def test_a_module_is_run_as_it_is(tiny_decoder) -> None:
    for values in ({"dtype": "bfloat16"}, {"quantization": "w8a8"}):
        with pytest.raises(errors.ConfigError, match="a Decoder in memory is run as it is"):
            jaxinfer.init_inference(tiny_decoder, values)


# --- memory


def test_batch_too_large_for_memory(tiny, tiny_decoder) -> None:
    for source in (tiny.folder, tiny_decoder):
        with pytest.raises(errors.MemoryPlanError) as error:
            jaxinfer.init_inference(source, {"micro_batch_size": 1 << 20, "inference_max_tokens": 1 << 16})
        check(error, "GiB free", "lower micro_batch_size (1048576)", "inference_max_tokens (65536)", "more devices")


def test_weights_too_large_for_memory(tiny, tiny_decoder) -> None:
    config = {"memory_fraction": 1e-9, "micro_batch_size": 1, "inference_max_tokens": 2}
    for source in (tiny.folder, tiny_decoder):
        with pytest.raises(errors.MemoryPlanError, match="memory_fraction allows"):
            jaxinfer.init_inference(source, config)


def test_weights_of_a_module_count(tiny_decoder, monkeypatch) -> None:
    """A cache of some KB fits, 400 KB of weights do not."""
    monkeypatch.setattr("jaxinfer.memory.free_bytes", lambda mesh: 100_000)
    with pytest.raises(errors.MemoryPlanError):
        jaxinfer.init_inference(tiny_decoder, {"micro_batch_size": 1, "inference_max_tokens": 2})


# --- meshes


def test_more_devices_than_there_are(tiny) -> None:
    with pytest.raises(errors.MeshError) as error:
        jaxinfer.init_inference(tiny.folder, {"engine": {"tensor_parallel_size": 16, "pipeline_parallel_size": 2}})
    check(error, "stage 2 x tensor 16", "needs 32 devices", "there are 8", "jax_num_cpu_devices")
    for devices in ([], jax.devices()[:1]):
        with pytest.raises(errors.MeshError, match=f"needs 2 devices, there are {len(devices)}"):
            jaxinfer.init_inference(tiny.folder, {"engine": {"tensor_parallel_size": 2}}, devices=devices)


def test_mesh_sizes() -> None:
    for size in (0, -1, 1.5, True):
        with pytest.raises(errors.MeshError) as error:
            make_mesh(tensor=size)
        check(error, f"tensor is {size!r}", "at least 1")


def test_more_stages_than_layers(tiny, tiny_decoder) -> None:
    for source in (tiny.folder, tiny_decoder):
        with pytest.raises(errors.MeshError) as error:
            jaxinfer.init_inference(source, {"engine": {"pipeline_parallel_size": 4}})
        check(error, "4 pipeline stages for 3 layers", "at most one stage a layer")


def test_mesh_without_the_axes(tiny_decoder: Decoder) -> None:
    for axes in (("x",), ("data", "stage", "tensor", "tensor_hosts")):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(axes)), axes)
        with pytest.raises(errors.MeshError, match=r"sharding\.mesh\.make_mesh"):
            jaxinfer.place(tiny_decoder, mesh)


# --- the pure function


def test_pure_generate(tiny_decoder) -> None:
    ids = np.ones((1, 4), np.int32)
    for keywords, word in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 4, "stop_token_ids": range(17)}, "17 stop tokens; at most 16"),
        ({"max_new_tokens": 4, "cache_dtype": "int3"}, "int3"),
    ):
        with pytest.raises(errors.ConfigError, match=word):
            jaxinfer.generate(tiny_decoder, ids, **keywords)
    with pytest.raises(errors.ConfigError, match="the prompt has 0 tokens"):
        jaxinfer.generate(tiny_decoder, ids[:, :0], max_new_tokens=4)


def test_every_error_is_expected() -> None:
    """A command catches EXPECTED and prints the message; whatever else comes out is a bug."""
    kinds = [kind for name in errors.__all__ if name != "EXPECTED" and isinstance(kind := getattr(errors, name), type)]
    assert len(kinds) > 25
    assert all(issubclass(kind, errors.EXPECTED) for kind in kinds)
