"""The memory plan: weights and cache counted exactly, temporary arrays near what XLA allocates, batches that fit, errors that explain."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import check

import jaxinfer
from convert.readers.base import LazyTensor
from jaxinfer import EngineConfig, ParallelConfig, QuantizationConfig, errors, memory
from jaxinfer.layout import make_plan
from jaxinfer.loading import open_source
from jaxinfer.memory import MemoryPlan, explained, plan_memory, state_bytes, weight_bytes
from jaxinfer.placement import module_tensors, place
from jaxinfer.programs import Programs
from jaxinfer.sampling import SamplingArrays
from sharding.mesh import make_mesh


def per_device(arrays: Any) -> set[int]:
    """Bytes on each device that holds any."""
    held: dict[Any, int] = {}
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return set(held.values())


class Unread(LazyTensor):
    """A tensor whose shape and format are known, and whose values must not be needed."""

    def __init__(self, tensor: LazyTensor):
        self.name, self.shape, self.dtype, self.packed = tensor.name, tensor.shape, tensor.dtype, tensor.packed

    def read(self, units: Any = None):
        raise AssertionError(f"{self.name} was read")


def unread(tensors: Mapping[str, LazyTensor]) -> dict[str, Unread]:
    return {path: Unread(tensor) for path, tensor in tensors.items()}


FORMATS = [
    {},
    {"dtype": "bfloat16"},
    {"quantization": QuantizationConfig()},
    {"quantization": QuantizationConfig(group_size=24, activation_group_size=0, head_bits=16)},
]


# --- weights


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (4, 1), (5, 1), (1, 2), (1, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_weights_are_counted_to_the_byte(tiny, mesh: tuple[int, int], stored: dict[str, Any]) -> None:
    """Of a model that divides badly: padding and replicas on each device, groups that are cut."""
    tensor, stage = mesh
    opened = open_source(tiny.folder)
    tensors = opened.stored_as(dtype=stored.get("dtype"), quantization=stored.get("quantization"))
    on = make_mesh(tensor=tensor, stage=stage)
    counted = weight_bytes(unread(tensors), on, make_plan(opened.config, on))
    assert {counted} == per_device(place(tensors, on, config=opened.config).weights)


@pytest.mark.parametrize("spec", ["w4a16-g32", "w4a8-g32-asym"])
@pytest.mark.parametrize("tensor", [1, 3, 4])
def test_int4_weights(tiny_model, spec: str, tensor: int) -> None:
    """Heads of 8 cut groups of 32: their scales are repeated."""
    folder = tiny_model(hidden_size=96, num_attention_heads=12).folder
    opened, on = open_source(folder), make_mesh(tensor=tensor)
    tensors = opened.stored_as(dtype=None, quantization=QuantizationConfig.parse(spec))
    placed = place(tensors, on, config=opened.config)
    assert {weight_bytes(unread(tensors), on, placed.plan)} == per_device(placed.weights)


def test_weights_of_a_module_and_a_data_axis(tiny_decoder) -> None:
    on = make_mesh(data=2, tensor=2)
    placed = place(tiny_decoder, on)
    assert {weight_bytes(module_tensors(tiny_decoder), on, placed.plan)} == per_device(placed.weights)


def test_weights_of_a_quantised_module(tiny) -> None:
    model, on = jaxinfer.load_model(tiny.folder, quantization="w8a8-g24"), make_mesh(tensor=2)
    placed = place(model, on)
    assert {weight_bytes(module_tensors(model), on, placed.plan)} == per_device(placed.weights)


def test_weights_of_a_gguf(smollm2_gguf: Path) -> None:
    """Its matrices are packed in several formats. 30 layers on two stages of one device each."""
    opened, on = open_source(smollm2_gguf), make_mesh(stage=2)
    tensors = opened.stored_as(dtype=None, quantization=None)
    total = sum(t.nbytes for t in tensors.values())
    counted = weight_bytes(unread(tensors), on, make_plan(opened.config, on))
    assert total / 2 <= counted < total / 2 + 4 * 1024  # the last norm is on both


# --- cache


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8, jnp.int4])
@pytest.mark.parametrize("sizes", [{}, {"tensor": 4}, {"tensor": 2, "stage": 2, "data": 2}], ids=str)
def test_state_is_counted(tiny_decoder, dtype, sizes: dict[str, int]) -> None:
    placed = place(tiny_decoder, make_mesh(**sizes))
    [held] = per_device(Programs(placed, cache_dtype=dtype).state(3, 40)())
    counted = state_bytes(placed.plan, dtype, batch=3, tokens=40)
    assert held <= counted <= held + 16  # a scalar is there once and not for each sequence


def test_micro_batch_size_that_fits(tiny_decoder, monkeypatch) -> None:
    """The largest power of two whose plan is within the fraction of what is free, to the byte."""
    on = make_mesh()
    plan, tensors = make_plan(tiny_decoder.config, on), module_tensors(tiny_decoder)

    def planned(free: int, size: int | str, **keys: Any) -> MemoryPlan:
        monkeypatch.setattr(memory, "free_bytes", lambda mesh: free)
        keys = {"inference_max_tokens": 128, "memory_fraction": 0.5} | keys
        return plan_memory(tensors, on, plan, EngineConfig(micro_batch_size=size, **keys))

    for size in (2, 4, 16):
        enough = 2 * planned(1 << 40, size).needed
        assert planned(enough, "auto").micro_batch_size == planned(enough, size).micro_batch_size == size
        assert planned(enough - 2, "auto").micro_batch_size == size // 2
        with pytest.raises(errors.MemoryPlanError):
            planned(enough - 2, size)
        assert planned(enough, "auto", memory_fraction=1).micro_batch_size > size
        assert planned(enough, "auto", inference_max_tokens=64).micro_batch_size > size
        assert planned(enough, "auto", kv_cache=jaxinfer.CacheConfig(dtype="int8")).micro_batch_size >= size
    assert planned(1 << 40, "auto").micro_batch_size == memory.LARGEST_AUTO["cpu"]
    with pytest.raises(errors.MemoryPlanError) as error:
        planned(1_000_000, "auto", inference_max_tokens=1024)
    check(error, "micro_batch_size (1)", "inference_max_tokens (1024)", "memory_fraction allows 50%", "more devices")


def test_engine_gets_the_chosen_size(tiny) -> None:
    engine = jaxinfer.init_inference(tiny.folder, {"micro_batch_size": "auto", "inference_max_tokens": 64})
    assert engine.config.micro_batch_size == engine.memory_plan.micro_batch_size == 32


# --- what programs need


def compiled_bytes(compiled) -> int:
    stats = compiled.memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "cached"), [({}, "int8"), ({}, "int4"), ({"tensor": 2, "stage": 2}, "float32")], ids=str)
def test_temporary_arrays_are_near_what_is_allocated(tiny_decoder, sizes: dict[str, int], cached: str) -> None:
    programs, work = _programs(tiny_decoder, sizes, cached)
    ids, lengths = jax.ShapeDtypeStruct((4, 256), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    sampling = jax.eval_shape(lambda: SamplingArrays.zeros((4,)))
    state = jax.eval_shape(programs.state(4, 256))
    lowered = {
        work.prefill(4, 256): programs.prefill(0).lower(programs.shapes, ids, lengths, sampling),
        work.decode(4, 256, 0): programs.decode(0).lower(programs.shapes, state, jax.ShapeDtypeStruct((), jnp.int32)),
    }
    for estimate, program in lowered.items():
        assert 0.9 < estimate / compiled_bytes(program.compile()) < 2


@pytest.mark.slow
def test_scoring_is_near_what_is_allocated(tiny_decoder) -> None:
    programs, work = _programs(tiny_decoder, {}, "float32")
    ids, lengths = jax.ShapeDtypeStruct((4, 256), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    held = compiled_bytes(programs.score().lower(programs.shapes, ids, lengths).compile())
    assert 0.9 < work.score(4, 256) / held < 2


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "cached"), [({}, "float32"), ({"stage": 2}, "float32"), ({}, "int8")], ids=str)
def test_chunks_of_prompts_are_near_what_is_allocated(tiny_decoder, sizes: dict[str, int], cached: str) -> None:
    programs, work = _programs(tiny_decoder, sizes, cached, chunk=32)
    ids, lengths = jax.ShapeDtypeStruct((4, 500), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    sampling = jax.eval_shape(lambda: SamplingArrays.zeros((4,)))
    lowered = {
        work.prefill(4, 500): programs.prefill(0).lower(programs.shapes, ids, lengths, sampling),
        work.score(4, 500): programs.score().lower(programs.shapes, ids, lengths),
    }
    for estimate, program in lowered.items():
        assert 0.9 < estimate / compiled_bytes(program.compile()) < 2
    assert work.prefill(4, 500) < 0.5 * dataclasses.replace(work, chunk=None).prefill(4, 500)


def _programs(
    model: jaxinfer.Decoder, sizes: dict[str, int], cached: str, chunk: int | None = None
) -> tuple[Programs, memory.Work]:
    """Of the model with a layer a stage."""
    on = make_mesh(**sizes)
    model = jaxinfer.Decoder(dataclasses.replace(model.config, layers=on.shape["stage"]))
    placed = place(model, on)
    # native kernels keep their temporary arrays to themselves
    programs = Programs(placed, cache_dtype=jnp.dtype(cached), kernels="xla", prefill_chunk=chunk)
    return programs, memory._work(module_tensors(model), on, placed.plan, cached, chunk)


def test_prompts_that_are_read_together(tiny_decoder, monkeypatch) -> None:
    on = make_mesh()
    config = EngineConfig(micro_batch_size=16, inference_max_tokens=256)
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: 24_000_000)
    plan = plan_memory(module_tensors(tiny_decoder), on, make_plan(tiny_decoder.config, on), config)
    rows = [plan.prefill_rows(tokens) for tokens in (16, 64, 128, 256)]
    assert rows[0] == 16 and rows == sorted(rows, reverse=True) and len(set(rows)) > 2
    assert plan.work is not None
    for tokens, count in zip((64, 128, 256), rows[1:], strict=True):
        assert plan.weights + plan.cache + plan.work.prefill(count, tokens) <= plan.allowed
    assert dataclasses.replace(plan, free=plan.weights).prefill_rows(256) == 1


def test_prompts_in_chunks_take_less(tiny_decoder) -> None:
    on = make_mesh()
    tensors, plan = module_tensors(tiny_decoder), make_plan(tiny_decoder.config, on)
    whole, chunked = (
        plan_memory(tensors, on, plan, EngineConfig(micro_batch_size=1, inference_max_tokens=2048, prefill_chunk=chunk))
        for chunk in (None, 64)
    )
    assert chunked.temporary < whole.temporary / 4 and "lower prefill_chunk (64)" in chunked.advice()


# --- what is printed


def test_a_plan_is_a_table_and_json(tiny) -> None:
    engine_config = EngineConfig(inference_max_tokens=64, micro_batch_size=2, engine=ParallelConfig(pipeline_parallel_size=2))
    opened, on = open_source(tiny.folder), make_mesh(stage=2)
    plan = plan_memory(opened.tensors, on, make_plan(opened.config, on), engine_config)
    lines = str(plan).splitlines()
    assert [line.split()[0] for line in lines] == ["weights", "cache", "temporary", "needed", "allowed"]
    assert "4 sequences of 64 tokens" in lines[1] and "per device, on 2 devices" in lines[3] and "90% of" in lines[4]
    assert len({re.search(r" [MG]iB", line).start() for line in lines}) == 1  # type: ignore[union-attr]
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["needed"] == values["weights"] + values["cache"] + values["temporary"] <= values["allowed"]
    assert (values["slots"], values["devices"], values["micro_batch_size"]) == (4, 2, 2)


GIB = 2**30
PLAN = MemoryPlan(
    weights=4 * GIB, cache=2 * GIB, temporary=GIB, free=8 * GIB, fraction=0.9, micro_batch_size=8, inference_max_tokens=1024
)


def test_advice_begins_with_what_takes_most() -> None:
    assert PLAN.advice().startswith("choose fewer bits")
    assert dataclasses.replace(PLAN, cache=5 * GIB).advice().startswith("lower micro_batch_size (8)")
    assert dataclasses.replace(PLAN, temporary=5 * GIB).advice().startswith("lower inference_max_tokens (1024)")


# --- out of memory


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes.\nmore"),
        MemoryError("Unable to allocate 32.0 GiB"),
        MemoryError(),
    ],
    ids=["device", "host", "host, no words"],
)
def test_out_of_memory_is_explained(error: Exception) -> None:
    with pytest.raises(errors.OutOfMemoryError) as raised, explained(PLAN):
        raise error
    first = str(error).splitlines()[0] if str(error) else "no memory is left on the host"
    check(
        raised, f"out of memory: {first}; the plan was", "weights       4.00 GiB", "choose fewer bits", "micro_batch_size (8)"
    )
    assert "more\n" not in str(raised.value) and raised.value.__cause__ is error
    with pytest.raises(errors.OutOfMemoryError, match="out of memory"), explained(None):
        raise error


def test_a_real_one() -> None:
    with (
        pytest.raises(errors.OutOfMemoryError, match=r"Out of memory allocating \d+ bytes.*\n(.*\n)*.*more devices"),
        explained(PLAN),
    ):
        jnp.zeros((1 << 46,), jnp.float32).block_until_ready()


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: x"), ValueError("RESOURCE_EXHAUSTED")], ids=repr)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, explained(PLAN):
        raise error
    assert raised.value is error


def test_out_of_memory_while_loading(tiny, monkeypatch) -> None:
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    monkeypatch.setattr("jaxinfer.api.place", full)
    with pytest.raises(errors.OutOfMemoryError) as error:
        jaxinfer.init_inference(tiny.folder)
    check(error, "allocating 5 bytes", "8 sequences of 1024 tokens", "inference_max_tokens (1024)")


class Prompt:
    """As much of a request as grouping looks at."""

    def __init__(self, tokens: int):
        self.prompt, self.source = [0] * tokens, None


def test_prompts_enter_as_memory_allows(tiny, monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: 24_000_000)
    engine = jaxinfer.init_inference(tiny.folder, {"micro_batch_size": 16, "inference_max_tokens": 256})
    for tokens in (10, 250):
        allowed = engine.memory_plan.prefill_rows(tokens if tokens == 250 else 16)
        assert engine._slots.group([Prompt(tokens)] * 16, engine._slots.free_slots([]) or range(16)) == allowed
    assert engine.memory_plan.prefill_rows(16) == 16 > engine.memory_plan.prefill_rows(256)


@pytest.mark.parametrize("call", ["generate", "score", "__call__"])
def test_out_of_memory_while_running(tiny, monkeypatch, call: str) -> None:
    """Of any program; the engine says so to who asked, and goes on with who comes next."""
    engine = jaxinfer.init_inference(tiny.folder, {"inference_max_tokens": 64})

    def full(self, *_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    prompt = [[1, 2, 3]]
    with monkeypatch.context() as patch:
        patch.setattr("jaxinfer.programs.Program.__call__", full)
        with pytest.raises(errors.OutOfMemoryError) as error:
            getattr(engine, call)(prompt)
    check(error, "allocating 5 bytes", "8 sequences of 64 tokens", "lower")
    assert len(engine.score(prompt)[0].logprobs) == 3


# --- how much there is


class Device:
    process_index = 0

    def __init__(self, stats: dict[str, int] | None):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_the_fullest_device_decides(monkeypatch) -> None:
    class Mesh:
        def __init__(self, *stats):
            self.devices = np.array([Device(s) for s in stats], object)

    full, empty = {"bytes_limit": 100, "bytes_in_use": 70}, {"bytes_limit": 100, "bytes_in_use": 10}
    assert memory.free_bytes(Mesh(empty, full)) == 30
    monkeypatch.setattr(memory, "_host_free", lambda: 90)
    assert memory.free_bytes(Mesh(None, None, None)) == 30


def test_a_containers_limit(tmp_path: Path, monkeypatch) -> None:
    whole = memory._host_free(tmp_path)  # no such files
    assert whole > 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 400\n")
    assert memory._host_free(tmp_path) > 1 << 20
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._host_free(tmp_path) == 1000 - 700 + 400
