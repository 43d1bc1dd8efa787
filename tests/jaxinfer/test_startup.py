"""Start-up: shapes before weights, programs shared between engines, programs that are compiled before the first request."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import jax
import numpy as np
import pytest
from tiny_llama import TinyModel, tokens_of

import jaxinfer
from convert.readers.base import LazyTensor
from jaxinfer import SamplingParams, ahead, programs
from jaxinfer.config import QuantizationConfig
from jaxinfer.loading import open_source
from jaxinfer.placement import place, placed_shapes
from sharding.mesh import make_mesh

PROMPT = [5, 17, 3, 88]
PARAMS = SamplingParams(max_tokens=6)
CONFIG = {"inference_max_tokens": 64, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def model(tiny_model) -> TinyModel:
    """Of a size that no other test has, so that no other test has compiled for it."""
    return tiny_model(vocab_size=101, num_hidden_layers=2)


class Unread(LazyTensor):
    """A tensor that says what it is, and cannot be read."""

    def __init__(self, tensor: LazyTensor):
        self.name, self.shape, self.dtype, self.packed = tensor.name, tensor.shape, tensor.dtype, tensor.packed

    def read(self, units=None):
        raise AssertionError(f"{self.name} was read")


@pytest.mark.parametrize("quantize", [None, "int8", "w4a16-g32-asym"])
@pytest.mark.parametrize(("stage", "tensor"), [(1, 1), (1, 2), (3, 2)])
def test_shapes_are_those_of_placed_weights(tiny_model, quantize, stage, tensor) -> None:
    """Three layers on three stages, an mlp of whole groups on two shards; nothing is read for the shapes."""
    opened = open_source(tiny_model(hidden_size=96, intermediate_size=128, head_dim=32).folder)
    quantization = QuantizationConfig.parse(quantize) if quantize else None
    tensors = opened.stored_as(dtype=None, quantization=quantization)
    mesh = make_mesh(stage=stage, tensor=tensor)
    shapes = placed_shapes({path: Unread(t) for path, t in tensors.items()}, mesh, config=opened.config)
    placed = place(tensors, mesh, config=opened.config)
    assert shapes.specs == placed.specs and shapes.plan == placed.plan
    assert shapes.weights == jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), placed.weights)


@pytest.fixture(scope="module")
def answer(model) -> list[int]:
    """What an engine says to PROMPT, by programs that others may share."""
    with jaxinfer.init_inference(model.folder, CONFIG) as engine:
        return engine.generate(PROMPT, PARAMS).token_ids


@pytest.fixture
def nothing_shared(monkeypatch) -> None:
    monkeypatch.setattr(programs, "_shared", type(programs._shared)())


def test_a_second_engine_neither_traces_nor_compiles(model, answer, compiled) -> None:
    traced: list[str] = []

    def listen(event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/jaxpr_trace_duration":
            traced.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    with jaxinfer.init_inference(model.folder, CONFIG) as second:
        assert second.generate(PROMPT, PARAMS).token_ids == answer
    assert not compiled
    assert not {"prefill", "insert", "decode", "state"} & set(traced)


def test_other_models_have_programs_of_their_own(model, tiny_model) -> None:
    """Of the same sizes, with another norm: nothing in the shapes tells them apart."""
    other = tiny_model(vocab_size=101, num_hidden_layers=2, rms_norm_eps=0.5)
    with jaxinfer.init_inference(model.folder, CONFIG) as a, jaxinfer.init_inference(other.folder, CONFIG) as b:
        assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
        assert a.programs.built is not b.programs.built


def test_two_engines_in_two_threads_share_programs_and_stay_right(model) -> None:
    prompts = [[1, 2, 3], [60, 7], [99] * 9, [4]]
    with jaxinfer.init_inference(model.folder, CONFIG) as engine:
        expected = tokens_of(engine.generate(prompts, PARAMS))
    engines = [jaxinfer.init_inference(model.folder, CONFIG) for _ in range(2)]
    assert engines[0].programs.built is engines[1].programs.built
    found: dict[int, list] = {}

    def work(i: int) -> None:
        found[i] = [tokens_of(engines[i].generate(prompts, PARAMS)) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [expected] * 3, 1: [expected] * 3}
    for engine in engines:
        engine.close()


def test_only_the_last_few_sets_of_programs_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(programs, "_shared", type(programs._shared)())
    first = programs._programs_of("first")
    assert programs._programs_of("first") is first
    for number in range(programs.SHARED_SETS - 1):
        programs._programs_of(number)
    assert programs._programs_of("first") is first  # asked for again: now the youngest
    for number in range(programs.SHARED_SETS, 2 * programs.SHARED_SETS):
        programs._programs_of(number)
    assert programs._programs_of("first") is not first
    assert len(programs._shared) == programs.SHARED_SETS


@pytest.mark.slow
def test_programs_hold_no_weights_and_no_functions_of_users(model) -> None:
    """Sets of programs outlive engines."""

    def processor(logits, tokens, length):
        return logits + 1

    engine = jaxinfer.init_inference(model.folder, CONFIG)
    engine.generate(PROMPT, SamplingParams(max_tokens=1, logits_processor=processor))
    weight, function = weakref.ref(engine.params.embedding), weakref.ref(processor)
    assert not any(program.static.get("processors") for program in engine.programs.built.values())
    engine.close()
    del engine, processor
    gc.collect()
    assert weight() is None
    jax.clear_caches()  # what jax keeps of traces
    gc.collect()
    assert function() is None


@pytest.mark.usefixtures("nothing_shared")
def test_expected_requests_are_compiled_while_weights_are_read(model, answer, compiled, monkeypatch) -> None:
    """When the engine is there, all that it needs is compiled or on the way; a call waits for what it needs."""
    walked: list[bool] = []

    def walk(self, requests, run=ahead.Walk.requests) -> None:
        walked.append(True)
        time.sleep(0.5)  # so that the first call comes before anything is known of its program
        run(self, requests)

    monkeypatch.setattr(ahead.Walk, "requests", walk)
    real = jaxinfer.api.place
    monkeypatch.setattr(jaxinfer.api, "place", lambda *a, **k: walked.append(False) or real(*a, **k))
    engine = jaxinfer.init_inference(model.folder, CONFIG, expect=(PROMPT, PARAMS))
    assert engine.generate(PROMPT, PARAMS).token_ids == answer
    assert set(walked) == {True, False}
    ready = {program.name: len(program.ready) for program in engine.programs.built.values()}
    assert ready == {"state": 1, "prefill": 1, "insert": 1, "decode": 1}
    assert not any(program.met for program in engine.programs.built.values())  # jax.jit compiled nothing
    assert sorted(compiled) == ["jit(decode)", "jit(insert)", "jit(prefill)", "jit(state)"]
    engine.prepare(PROMPT, PARAMS).result()
    engine.close()
    assert len(compiled) == 4


def test_what_cannot_be_asked_is_refused_before_weights_are_read(model, monkeypatch) -> None:
    monkeypatch.setattr(jaxinfer.api, "place", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(jaxinfer.errors.TokenLimitError):
        jaxinfer.init_inference(model.folder, CONFIG, expect=([1] * 60, SamplingParams(max_tokens=60)))


@pytest.mark.usefixtures("nothing_shared")
@pytest.mark.parametrize(
    "keys",
    [
        {},
        pytest.param({"batch_invariant": True}, marks=pytest.mark.slow),
        pytest.param({"engine": {"pipeline_parallel_size": 2}}, marks=pytest.mark.slow),
        pytest.param({"engine": {"data_parallel_size": 2}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_walk_finds_what_traffic_needs(model, compiled, keys) -> None:
    """Everything that these requests call was found before, and nothing is run for it."""
    engine = jaxinfer.init_inference(model.folder, CONFIG | keys)
    needs: list[ahead.Need] = []
    batches = (1, 2 if set(keys) <= {"batch_invariant"} else 4)
    traffic = ahead.Traffic(prompt_tokens=(16,), new_tokens=(4,), batches=batches, scores=False)
    engine.walk(needs.append).traffic(traffic, score_rows=1)
    assert not compiled
    found = [(need.program, need.signature) for need in needs]
    assert len(found) == len(set(found))
    four = SamplingParams(max_tokens=4)
    first = engine.stream([1, 2], four)
    next(first)
    engine.generate([[3], [4, 5, 6], [7] * 16], four)  # while another runs, and more than there are slots
    list(first)
    leaving = engine.stream([1, 2], four)
    next(leaving)
    leaving.close()
    engine.generate([8, 9], four)
    met = {(program, signature) for program in engine.programs.built.values() for signature in program.met}
    assert met and met <= set(found)
    engine.close()


def test_signatures(model) -> None:
    with jaxinfer.init_inference(model.folder, CONFIG) as engine:
        free = engine.programs.free()
        state = engine.init_state(1, 32)
        slots = np.zeros((1,), np.int32)
        assert free.signature((state, slots)) == free.signature(free.abstract(state, slots))
        assert free.signature((engine.init_state(2, 32), slots)) != free.signature((state, slots))
        traced = jax.eval_shape(lambda s: free(s, slots), state)  # inside of a user's own jit
        assert traced.tokens.shape == state.tokens.shape
