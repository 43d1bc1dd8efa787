"""Which layers go where, and what is said of it."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_llama import GREEDY, PROMPTS, tokens_of

import jaxinfer
from jaxinfer import SamplingParams, errors, memory
from jaxinfer.layout import make_plan, plans, stage_speeds
from jaxinfer.loading import open_source
from jaxinfer.memory import fitting_plan, plan_memory
from jaxinfer.models import Decoder, MoEConfig
from jaxinfer.placement import module_tensors, place
from jaxinfer.slots import COLLECTIVES
from pallas_kernels import gpus
from sharding.mesh import make_mesh


def test_stage_report(make_engine):
    engine = make_engine(tp=2, pp=2)
    report = engine.stage_report(context=10, batch=3)
    assert (
        [stage.layers for stage in report.stages] == [(0, 1), (2,)]
        and report.slots == 2
        and report.waste == pytest.approx(0.25)
    )
    first, second = report.stages
    assert first.nbytes == 2 * second.nbytes == report.held and first.flops == 2 * second.flops
    assert report.spread == pytest.approx(1 / 3)
    assert 2 * report.held == sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params.layers))
    measured = engine.stage_report(layer_seconds=[1.0, 2.0, 3.0])
    assert measured.spread == 0 and measured.stages[1].seconds == 3 and "spread 0.0%" in str(measured)
    assert measured.to_dict()["stages"][0]["layers"] == (0, 1)
    with pytest.raises(errors.ConfigError, match="2 measured times for 3 layers"):
        engine.stage_report(layer_seconds=[1.0, 2.0])


def test_packed_weights_are_counted_as_they_lie_there(make_engine, tiny_model):
    """Two INT4 weights take a byte; scales count too."""
    model = tiny_model(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    engine = make_engine(pp=2, model=model, quantization="w4a16-g32")
    report = engine.stage_report(context=10, batch=1)
    weights = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96  # of a layer
    per_layer = weights // 2 + 2 * weights // 32 + 2 * 4 * 64
    assert [stage.nbytes for stage in report.stages] == [2 * per_layer, per_layer]
    assert (
        2 * report.held
        == sum(row.nbytes for row in engine.memory_report().rows if row.kind not in ("embedding", "head", "sketch"))
        - 4 * 64 * 2
    )


def test_windows_decide_where_layers_go(tiny):
    """Equal layers: the earlier stages have more. Where long attention costs more, those layers have fewer neighbours."""
    config = dataclasses.replace(open_source(tiny.folder).config, layers=5, max_positions=8192)
    mesh = make_mesh(stage=2)
    assert make_plan(config, mesh).counts == (3, 2)
    assert make_plan(dataclasses.replace(config, windows=(None, None, None, 16, 16)), mesh).counts == (2, 3)
    assert make_plan(dataclasses.replace(config, windows=(16, 16, None, None, None)), mesh).counts == (3, 2)


def test_measured_times_decide_where_layers_go(tiny):
    """Of layers that are counted alike, those that took longer have fewer neighbours."""
    config, mesh = dataclasses.replace(open_source(tiny.folder).config, layers=5), make_mesh(stage=2)
    assert make_plan(config, mesh).counts == make_plan(config, mesh, costs=[1e-3, 1e-3, 1e-3, 2e-3, 2e-3]).counts == (3, 2)
    assert make_plan(config, mesh, costs=[2e-3, 2e-3, 1e-3, 1e-3, 1e-3]).counts == (2, 3)
    assert make_plan(config, mesh, costs=[9e-3, *[1e-3] * 4], speeds=[1.0, 0.9]).counts == (1, 4)
    for wrong in ([1e-3] * 4, [*[1e-3] * 4, 0.0]):
        with pytest.raises(errors.MeshError, match=r"costs are .* for 5 layers; give each a number above 0"):
            make_plan(config, mesh, costs=wrong)


@pytest.mark.slow
def test_slower_devices_have_fewer_layers_and_jump_over_the_others_slots(tiny_decoder, greedy):
    mesh = make_mesh(stage=2)
    plan = make_plan(tiny_decoder.config, mesh, speeds=(3.0, 9.0))
    assert plan.counts == (1, 2) and plan.speeds == (1 / 3, 1.0) and plan.jumped == (False, True)
    engine = jaxinfer.Engine(
        place(tiny_decoder, mesh, plan=plan), jaxinfer.EngineConfig(inference_max_tokens=64, micro_batch_size=4)
    )
    assert tokens_of(engine.generate(PROMPTS[:3], GREEDY)) == greedy[:3]
    first, second = (report := engine.stage_report()).stages
    assert first.speed == plan.speeds[0] and first.load == first.moved * 3 and second.load == second.moved
    assert "speed" in str(report) and report.needed is None
    assert make_plan(tiny_decoder.config, mesh, speeds=(2.0, 2.0)).speeds == ()
    for wrong in ((1.0,), (1.0, 0.0)):
        with pytest.raises(errors.MeshError, match="2 pipeline stages; give each a number above 0"):
            make_plan(tiny_decoder.config, mesh, speeds=wrong)


def test_speeds_are_those_of_the_data_sheets():
    devices = [SimpleNamespace(device_kind=gpus.KNOWN[name].device_kind) for name in ("h100", "h100", "a100", "a100")]
    mesh = lambda kinds: SimpleNamespace(shape={"stage": 2}, devices=np.array(kinds, object).reshape(1, 2, 1, 1, 2))
    assert stage_speeds(mesh(devices)) == (1.0, pytest.approx(2.039 / 3.352))
    assert stage_speeds(mesh(devices[:2] * 2)) == () == stage_speeds(make_mesh(stage=2))
    other = [SimpleNamespace(device_kind="of a kind that nobody knows")]
    assert stage_speeds(mesh(devices[:3] + other)) == ()


def test_what_fits_is_taken_and_what_does_not_is_said_with_numbers(tiny_decoder, monkeypatch):
    """Two stages of dense layers before such with experts: the shortest longest stage needs more slots than the smallest way."""
    moe = MoEConfig(experts=2, used=1, width=96, normalise=True, layers=(4, 5))
    config = dataclasses.replace(tiny_decoder.config, layers=6, moe=moe)
    mesh, keys = make_mesh(stage=2), jaxinfer.EngineConfig(inference_max_tokens=64, micro_batch_size=1)
    fast, *others = plans(config, mesh)
    assert others and all(plan.slots < fast.slots for plan in others)
    tensors = module_tensors(Decoder(config))
    needed = [plan_memory(tensors, mesh, plan, keys).needed for plan in (fast, others[-1])]
    for free, wanted in ((needed[0], fast), (needed[0] - 1, others[0]), (needed[1], others[-1])):
        monkeypatch.setattr(memory, "free_bytes", lambda mesh, free=free: free / keys.memory_fraction + 1)
        assert fitting_plan(tensors, mesh, config, keys)[0].counts == wanted.counts
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: needed[1] / 2)
    held = f"each of which holds {others[-1].slots} of 6 layers: the 2 stages have {list(others[-1].counts)}"
    with pytest.raises(errors.MemoryPlanError, match=re.escape(held)):
        fitting_plan(tensors, mesh, config, keys)


def test_preparing_waits_for_no_turn_of_the_devices(make_engine):
    """A call that has the turn may wait for what is being prepared."""
    engine = make_engine(tp=2)
    with COLLECTIVES:
        engine.prepare([[1, 2, 3]], SamplingParams(max_tokens=2)).result(timeout=60)


def test_measuring_and_measured_times_exclude_each_other(make_engine):
    with pytest.raises(errors.ConfigError, match="layer_seconds or by measure"):
        make_engine(tp=2, pp=2).stage_report(layer_seconds=[1.0, 2.0, 3.0], measure=True)


@pytest.mark.slow
def test_int8_sums_across_hosts(tiny_decoder, logits_of):
    """Asked for in the configuration: near the exact probabilities, and not the same."""
    placed = place(tiny_decoder, make_mesh(tensor_hosts=2, tensor=2))
    parallel = jaxinfer.ParallelConfig(tensor_parallel_size=4, int8_across_hosts=True)
    config = jaxinfer.EngineConfig(inference_max_tokens=64, micro_batch_size=4, kernels="xla", engine=parallel)
    engine, prompt = jaxinfer.Engine(placed, config), PROMPTS[2]
    text = engine.programs.score().lower(*_scored(engine)).compile().as_text()
    assert re.search(r"s8\[.* collective-permute\(", text)
    exact = np.asarray(jax.nn.log_softmax(logits_of(prompt)))[np.arange(len(prompt) - 1), prompt[1:]]
    error = np.abs(exact - np.array(engine.score(prompt).logprobs[1:])).max()
    assert 1e-6 < error < 0.1


def _scored(engine):
    rows = jax.ShapeDtypeStruct((1, 16), "int32"), jax.ShapeDtypeStruct((1,), "int32")
    return engine.programs.shapes, *rows


def test_int8_sums_need_hosts(tiny_decoder):
    config = jaxinfer.EngineConfig(inference_max_tokens=64, engine=jaxinfer.ParallelConfig(int8_across_hosts=True))
    with pytest.raises(errors.MeshError, match="several hosts with several each"):
        jaxinfer.Engine(place(tiny_decoder, make_mesh(tensor=2)), config)


@pytest.mark.slow
def test_tensor_shards_on_two_hosts_say_what_one_device_does(tiny_decoder, greedy):
    placed = place(tiny_decoder, make_mesh(tensor_hosts=2, tensor=2))
    engine = jaxinfer.Engine(placed, jaxinfer.EngineConfig(inference_max_tokens=64, micro_batch_size=4, kernels="xla"))
    assert tokens_of(engine.generate(PROMPTS[:3], GREEDY)) == greedy[:3]
