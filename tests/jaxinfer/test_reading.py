"""How often rows are read: samples of one prompt share it; a row that outgrows its rotary table is read again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import golden_weights
import jax
import numpy as np
import pytest
from tiny_llama import GREEDY, PROMPTS, tokens_of

import jaxinfer
from jaxinfer import SamplingParams, memory
from jaxinfer.programs import Program

SAMPLES = SamplingParams(max_tokens=9, temperature=1.0, seed=11, n=4)


@pytest.fixture
def read(monkeypatch) -> list[tuple[int, int]]:
    """(prompts, tokens) of every array of prompts that is read."""
    seen: list[tuple[int, int]] = []

    def call(self, *arguments, run=Program.__call__):
        if self.name == "prefill":
            seen.append(arguments[1].shape)
        return run(self, *arguments)

    monkeypatch.setattr(Program, "__call__", call)
    return seen


def flat(results) -> list[list[list[int]]]:
    return [tokens_of([result, *result.alternatives]) for result in results]


# --- samples


def alone(engine: jaxinfer.Engine, params: SamplingParams, prompt: list[int]) -> list[list[int]]:
    return tokens_of([engine.generate(prompt, params.sample(i)) for i in range(params.samples)])


def test_samples_share_what_was_read(make_engine, read) -> None:
    """Of two prompts, beside a third one; each says what it says alone, and the first reports the prompt."""
    engine = make_engine(micro_batch_size=16)
    params = [SAMPLES, GREEDY, dataclasses.replace(SAMPLES, seed=3, n=3, prompt_logprobs=1, repetition_penalty=1.3)]
    results = engine.generate(PROMPTS[1:4], params)
    assert read == [(4, 16)]  # three prompts for eight sequences
    plain = dataclasses.replace(params[2], prompt_logprobs=None)
    expected = [alone(engine, SAMPLES, PROMPTS[1]), alone(engine, GREEDY, PROMPTS[2]), alone(engine, plain, PROMPTS[3])]
    assert flat(results) == expected
    score = engine.score(PROMPTS[3])
    assert [entry.logprob for entry in results[2].prompt_logprobs[1:]] == pytest.approx(score.logprobs[1:], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"pp": 2}, {"tp": 2}])
def test_samples_on_a_mesh(make_engine, engine, read, sizes) -> None:
    spread = make_engine(micro_batch_size=8, **sizes)
    results = spread.generate(PROMPTS[1:3], SAMPLES)
    assert read == [(2, 16)]
    assert flat(results) == [alone(engine, SAMPLES, prompt) for prompt in PROMPTS[1:3]]


@pytest.mark.slow
def test_samples_on_data_shards(make_engine, engine, read) -> None:
    """Samples of a prompt lie on both: each reads it once."""
    spread = make_engine(micro_batch_size=8, engine={"data_parallel_size": 2})
    results = spread.generate(PROMPTS[1:3], SAMPLES)
    assert read == [(4, 16)]
    assert flat(results) == [alone(engine, SAMPLES, prompt) for prompt in PROMPTS[1:3]]


def test_equal_prompts_of_their_own_do_not_share(engine, read) -> None:
    """What a program is compiled for must not depend on what prompts say."""
    engine.generate([PROMPTS[1], PROMPTS[1]], GREEDY)
    assert read == [(2, 16)]


def test_memory_counts_what_is_read(tiny, monkeypatch) -> None:
    """Sixteen samples of one long prompt are read together where two such prompts would not fit."""
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: 24_000_000)
    engine = jaxinfer.init_inference(tiny.folder, {"micro_batch_size": 16, "inference_max_tokens": 256})
    assert engine.memory_plan.prefill_rows(250) < 8
    _, [one] = engine._requests([[1] * 250], SamplingParams(max_tokens=2, temperature=1.0, n=16))
    assert engine._slots.group(jaxinfer.engine.expand(one), range(16)) == 16  # type: ignore[attr-defined]
    engine.close()


# --- a row that is read again


@pytest.fixture(scope="module")
def crossing(tmp_path_factory) -> Path:
    """A Phi-3 whose factors change after 32 tokens."""
    case = golden_weights.load_case("phi3_longrope_crossing")
    return golden_weights.write_case_folder(case, tmp_path_factory.mktemp("crossing") / "model")


@pytest.fixture(scope="module")
def make_crossing(crossing: Path) -> Callable[..., jaxinfer.Engine]:
    return lambda **keys: jaxinfer.init_inference(
        crossing, {"dtype": "float32", "inference_max_tokens": 64, "micro_batch_size": 4} | keys
    )


@pytest.fixture(scope="module")
def expected(crossing: Path) -> Callable[[list[int], int, float], list[int]]:
    """The most likely tokens, each from a forward of the whole row, in which all keys turn alike."""
    model = jaxinfer.load_model(crossing, dtype="float32")
    run = jax.jit(lambda ids, n: model(ids, lengths=n))

    def follow(prompt: list[int], count: int, penalty: float = 1.0) -> list[int]:
        said = list(prompt)
        for _ in range(count):
            ids = np.zeros((1, 64), np.int32)
            ids[0, : len(said)] = said
            z = np.array(run(ids, np.array([len(said)], np.int32))[0, len(said) - 1], np.float64)
            for t in set(said):
                z[t] = z[t] / penalty if z[t] > 0 else z[t] * penalty
            said.append(int(z.argmax()))
        return said[len(prompt) :]

    return follow


LONG = [[*range(3, 15)], [*range(20, 51)], [*range(5, 37)], [*range(30, 63)], [9]]  # 12, 31, 32, 33 and 1 tokens


@pytest.mark.slow
def test_rows_that_cross(make_crossing, expected, read) -> None:
    """In a batch, with fewer slots than rows and other knobs; streamed; a row is read again once, when it crosses."""
    params = [SamplingParams(max_tokens=30, repetition_penalty=1.4), *[SamplingParams(max_tokens=n) for n in (1, 25, 25, 12)]]
    with make_crossing() as engine:
        wanted = [expected(p, s.max_tokens, s.repetition_penalty) for p, s in zip(LONG, params, strict=True)]
        assert tokens_of(engine.generate(LONG, params)) == wanted
        read.clear()
        streamed = [t for delta in engine.stream(LONG[0], params[0], every=4) for t in delta.token_ids]
        assert streamed == wanted[0] and read == [(1, 16), (1, 64)]  # 12 tokens, and 33
        drawn = SamplingParams(max_tokens=32, temperature=1.0, seed=5, logprobs=0)
        one, two = engine.generate(LONG[0], drawn), engine.generate([LONG[2], LONG[0]], drawn)[1]
        assert one.token_ids == two.token_ids and len(one.logprobs) == 32
        score = engine.score(LONG[0] + one.token_ids[:20]).logprobs[12:]
        # before it crosses a row is scored as one of its own length, and the scored row here is as long as the first 20
        assert score[-1] == pytest.approx(one.logprobs[19].logprob, abs=1e-4) and len(set(one.token_ids)) > 20
        stop = one.token_ids[21]
        cut = engine.generate(LONG[0], dataclasses.replace(drawn, stop_token_ids=(stop,)))
        assert cut.token_ids == one.token_ids[: one.token_ids.index(stop) + 1] and cut.finish_reason == "stop"


@pytest.mark.slow
def test_rows_that_cross_on_a_mesh(make_crossing, expected) -> None:
    params = SamplingParams(max_tokens=25)
    with make_crossing(engine={"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, micro_batch_size=2) as engine:
        assert tokens_of(engine.generate(LONG, params)) == [expected(prompt, 25) for prompt in LONG]
