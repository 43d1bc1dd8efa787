"""Calls side by side: asyncio, threads, cancelling, Ctrl-C, other weights while requests run."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
import weakref

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_llama import GREEDY, NEW, PROMPTS, SAMPLED, tokens_of

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.errors import (
    ConfigError,
    EngineStateError,
    MissingTensorError,
    OutOfMemoryError,
    PromptError,
    TensorShapeError,
)
from jaxinfer.placement import Placer, module_tensors
from jaxinfer.programs import Program


def idle(engine: jaxinfer.Engine) -> bool:
    """Waits for the scheduler's thread to end; whether no request and no slot is left."""
    deadline = time.monotonic() + 20
    while engine._scheduler._thread is not None and time.monotonic() < deadline:
        time.sleep(0.005)
    state = engine._slots.state
    return engine._scheduler.load == (0, 0) and (state is None or not np.asarray(state.active).any())


def said(result: jaxinfer.GenerationResult) -> list[list[int]]:
    return tokens_of([result, *result.alternatives])


def storm(engine: jaxinfer.Engine, greedy, sampled, calls: int) -> None:
    """Many calls at once with mixed parameters, a third of them cancelled at random moments: the others get what they get alone."""
    special = [
        (PROMPTS[1], SamplingParams(max_tokens=9, temperature=1.0, seed=11, n=3)),
        (PROMPTS[2], SamplingParams(max_tokens=NEW, repetition_penalty=1.4, logprobs=2, presence_penalty=0.5)),
        (PROMPTS[3], SamplingParams(max_tokens=NEW, stop_token_ids=(greedy[3][4],), min_tokens=2)),
        (PROMPTS[5], SamplingParams(max_tokens=5, temperature=1.2, seed=2, best_of=3, logit_bias={7: 4.0})),
    ]
    alone = [said(engine.generate(prompt, params)) for prompt, params in special]

    async def one(i: int, rng: random.Random) -> None:
        which = rng.randrange(len(PROMPTS))
        await asyncio.sleep(rng.random() * 0.2)
        kind = rng.random()
        if kind < 0.4:
            assert (await engine.agenerate(PROMPTS[which], SAMPLED[which])).token_ids == sampled[which]
        elif kind < 0.6:
            which %= len(special)
            assert said(await engine.agenerate(*special[which])) == alone[which]
        else:
            tokens: list[int] = []
            async for delta in engine.astream(PROMPTS[which], GREEDY, every=rng.choice([1, 4])):
                tokens += delta.token_ids
            assert tokens == greedy[which]

    async def all_of_them() -> tuple[int, int]:
        rng = random.Random(5)
        tasks = [asyncio.create_task(one(i, random.Random(i))) for i in range(calls)]
        for task in rng.sample(tasks, calls // 3):
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [e for e in ends if e is not None and not isinstance(e, asyncio.CancelledError)]
        assert not wrong, wrong[0]
        return sum(e is None for e in ends), len(ends)

    served, asked = asyncio.run(all_of_them())
    assert served >= asked - asked // 3
    assert idle(engine)
    assert tokens_of(engine.generate(PROMPTS[:3], GREEDY)) == greedy[:3]


def test_two_hundred_calls(engine, greedy, sampled) -> None:
    storm(engine, greedy, sampled, 200)


@pytest.mark.slow
def test_two_hundred_calls_on_a_mesh(make_engine, greedy, sampled) -> None:
    storm(make_engine(tp=2, pp=2), greedy, sampled, 200)


def test_refusals_come_first(engine) -> None:
    async def refused() -> None:
        with pytest.raises(PromptError):
            await engine.agenerate([])
        with pytest.raises(PromptError):
            engine.astream("text")  # when it is called, not when it is read
        with pytest.raises(ConfigError):
            engine.astream(PROMPTS[0], every=0)

    asyncio.run(refused())
    with pytest.raises(PromptError):
        engine.check([[]])
    engine.check(PROMPTS, SAMPLED)


def test_ctrl_c(make_engine, greedy) -> None:
    """SIGINT in the middle of a long generation: the call ends, its slots are free, and the engine goes on."""
    engine = make_engine(inference_max_tokens=4096)
    engine.generate(PROMPTS[:3], SamplingParams(max_tokens=2))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            engine.generate(PROMPTS[:3], SamplingParams(max_tokens=4000))
    assert engine.generate(PROMPTS[1], GREEDY).token_ids == greedy[1]
    assert idle(engine)


@pytest.mark.slow
def test_two_engines_in_two_threads(engine, make_engine, greedy, sampled) -> None:
    """On the same devices, both with collectives."""
    engines = [engine, make_engine(tp=2), make_engine(tp=2, pp=2)]
    said: dict[int, list] = {}

    def work(i: int) -> None:
        said[i] = [tokens_of(engines[i].generate(PROMPTS[:3], params)) for params in (GREEDY, SAMPLED[:3]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(engines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [greedy[:3]] * 2 + [sampled[:3]] * 2
    assert [said[i] for i in range(len(engines))] == [expected] * len(engines)


def test_other_weights(tiny, tiny_decoder, compiled, greedy) -> None:
    """update_params changes what is said, without compiling; what does not fit is refused and changes nothing."""
    engine = jaxinfer.init_inference(tiny.folder, {"inference_max_tokens": 64, "micro_batch_size": 4})
    assert engine.generate(PROMPTS[1], GREEDY).token_ids == greedy[1]
    _, state = nnx.split(tiny_decoder, nnx.Param)
    turned = jax.tree.map(lambda a: a[::-1] if a.shape[0] == 97 else a, state)  # the vocabulary upside down
    compiled.clear()
    engine.update_params(turned)
    other = engine.generate([96 - t for t in PROMPTS[1]], GREEDY).token_ids
    assert other == [96 - t for t in greedy[1]]
    assert not [name for name in compiled if "lambda" in name]
    values = {path: tensor.value for path, tensor in module_tensors(tiny_decoder).items()}
    with pytest.raises(MissingTensorError):
        engine.update_params({path: value for path, value in values.items() if path != "norm"})
    with pytest.raises(TensorShapeError):
        engine.update_params(values | {"norm": values["norm"][:-1]})
    with pytest.raises(TensorShapeError, match="dtype"):
        engine.update_params(jax.tree.map(lambda a: a.astype("bfloat16"), values))
    assert engine.generate([96 - t for t in PROMPTS[1]], GREEDY).token_ids == other
    engine.update_params(tiny_decoder)
    assert engine.generate(PROMPTS[1], GREEDY).token_ids == greedy[1]
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}], ids=str)
def test_other_weights_where_memory_is_short(tiny, tiny_decoder, greedy, monkeypatch, sizes) -> None:
    """No second copy: a layer goes before the next one comes. What fails half way leaves a closed engine."""
    engine = jaxinfer.init_inference(tiny.folder, {"inference_max_tokens": 64, "micro_batch_size": 4, "engine": sizes})
    assert engine.generate(PROMPTS[1], GREEDY).token_ids == greedy[1]
    monkeypatch.setattr("jaxinfer.engine.free_bytes", lambda mesh: 1000)
    old = [weakref.ref(layer.mlp.down) for layer in engine.params.layers]
    alive: list[int] = []

    def slot(self, number: int, run=Placer.slot):
        alive.append(sum(ref() is not None for ref in old))
        return run(self, number)

    monkeypatch.setattr(Placer, "slot", slot)
    _, state = nnx.split(tiny_decoder, nnx.Param)
    turned = jax.tree.map(lambda a: a[::-1] if a.shape[0] == 97 else a, state)
    engine.update_params(turned)
    slots = engine.plan.slots
    assert alive == [slots] * slots + [*range(slots, 0, -1)]  # looked at first, then replaced
    assert engine.generate([96 - t for t in PROMPTS[1]], GREEDY).token_ids == [96 - t for t in greedy[1]]
    engine.update_params(tiny_decoder)
    assert engine.generate(PROMPTS[1], GREEDY).token_ids == greedy[1]

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    monkeypatch.setattr(Placer, "_put", full)
    with pytest.raises(OutOfMemoryError, match="allocating 5 bytes"):
        engine.update_params(turned)
    with pytest.raises(EngineStateError, match="closed"):
        engine.generate(PROMPTS[1], GREEDY)


def test_close_ends_what_runs(tiny) -> None:
    engine = jaxinfer.init_inference(tiny.folder, {"inference_max_tokens": 4096, "micro_batch_size": 2})
    stream = engine.stream(PROMPTS[0], SamplingParams(max_tokens=4000))
    next(stream)
    engine.close()
    with pytest.raises(EngineStateError, match="closed"):
        for _ in stream:
            pass
    for call in (lambda: engine.generate(PROMPTS[0]), lambda: engine.score(PROMPTS[1]), lambda: engine.params):
        with pytest.raises(EngineStateError, match="closed"):
            call()
    with jaxinfer.init_inference(tiny.folder, {"inference_max_tokens": 64}) as other:
        other.generate(PROMPTS[0], GREEDY)
    with pytest.raises(EngineStateError):
        other.generate(PROMPTS[0])


@pytest.mark.slow
@pytest.mark.parametrize("pp", [1, 2])
def test_growing_while_others_run(make_engine, greedy, monkeypatch, pp: int) -> None:
    """A stream goes on undisturbed while the state grows under it, in rows and in tokens; no two caches of all layers are there."""
    engine = make_engine(inference_max_tokens=512, pp=pp)
    engine.generate(PROMPTS[1], SamplingParams(max_tokens=2))
    assert (engine._slots.batch, engine._slots.tokens) == (1, 128)
    stream = engine.stream(PROMPTS[0], SamplingParams(max_tokens=100))
    tokens = next(stream).token_ids
    old: list[weakref.ref] = []
    left: list[int] = []

    def call(self, *arguments, run=Program.__call__):
        if self.name == "grow_cache":
            left.append(sum(ref() is not None for ref in old))
        return run(self, *arguments)

    monkeypatch.setattr(Program, "__call__", call)
    with engine._scheduler.paused():
        old += [weakref.ref(cache.k) for cache in engine._slots.state.caches]
    results = engine.generate([PROMPTS[i % 7] for i in range(4 * pp)], SamplingParams(max_tokens=200))
    assert left == [*range(len(old), 0, -1)]
    assert (engine._slots.batch, engine._slots.tokens) == (4, 256)
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == results[0].token_ids[:100] and tokens[:NEW] == greedy[0]
    assert [r.token_ids[:NEW] for r in results[:4]] == greedy[:4]
