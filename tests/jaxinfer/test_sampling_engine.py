"""All knobs through an engine: one answer alone, in a mixed batch and on meshes; what ends a text, samples, and what is reported."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import GREEDY, NEW, PROMPTS, Ask, check, tokens_of

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.errors import SamplingParamsError
from sharding.mesh import make_mesh


def last_but_one(logits, tokens, length):
    """Makes the token before the last one likelier, and odd ones impossible."""
    logits = logits.at[tokens[jnp.maximum(length - 2, 0)]].add(3.0)
    return jnp.where(jnp.arange(logits.shape[0]) % 2 == 0, logits, -jnp.inf)


def follow(ask: Ask, prompt: list[int], p: SamplingParams, stops: Sequence[int] = ()) -> list[int]:
    """The greedy tokens, by loops over lists on the module's logits."""
    new: list[int] = []
    while len(new) < (p.max_tokens or 0) and not (new and new[-1] in stops):
        said, z = prompt + new, ask(prompt + new)[-1].astype(np.float64)
        for t in set(said):
            z[t] = z[t] / p.repetition_penalty if z[t] > 0 else z[t] * p.repetition_penalty
        for t, count in collections.Counter(new).items():
            z[t] -= p.presence_penalty + count * p.frequency_penalty
        n = p.no_repeat_ngram_size
        seen = {tuple(said[i : i + n]) for i in range(len(said) - n + 1)} if n else set()
        banned = [gram[-1] for gram in seen if list(gram[:-1]) == said[len(said) - n + 1 :]]
        words = [word for word in p.bad_words if not isinstance(word, str)]
        banned += [word[-1] for word in words if said[len(said) - len(word) + 1 :] == list(word[:-1])]
        z[banned + (list(stops) if len(new) < p.min_tokens else [])] = -np.inf
        for t, bias in p.logit_bias.items():
            z[t] += bias
        if p.logits_processor is not None:
            z[said[max(len(said) - 2, 0)]] += 3.0
            z[1::2] = -np.inf
        new.append(int(z.argmax()))
    return new


@pytest.fixture(scope="module")
def knobs(greedy) -> list[SamplingParams]:
    """For each prompt others, greedy ones and drawn ones."""
    common = [t for t, _ in collections.Counter(t for row in greedy for t in row).most_common(5)]
    words = [greedy[3][:2], greedy[3][4:7], [common[0]]]
    return [
        SamplingParams(max_tokens=NEW, repetition_penalty=1.5, logit_bias={common[0]: 1.5, 96: -3.0}),
        SamplingParams(max_tokens=NEW, temperature=1.0, presence_penalty=1.5, frequency_penalty=0.5, seed=5),
        SamplingParams(max_tokens=NEW, no_repeat_ngram_size=2, presence_penalty=-0.3),
        SamplingParams(max_tokens=NEW, bad_words=words, frequency_penalty=0.7),
        SamplingParams(max_tokens=NEW, min_tokens=9, stop_token_ids=(common[0], greedy[4][0])),
        SamplingParams(max_tokens=12, temperature=0.8, repetition_penalty=1.2, top_p=0.9, no_repeat_ngram_size=3, seed=5),
        GREEDY,
    ]


@pytest.fixture(scope="module")
def alone(engine, knobs) -> list[list[int]]:
    return tokens_of([engine.generate(prompt, params) for prompt, params in zip(PROMPTS, knobs, strict=True)])


def test_greedy_rows_are_those_of_a_loop(alone, knobs, greedy, logits_of) -> None:
    for prompt, params, tokens, plain in zip(PROMPTS, knobs, alone, greedy, strict=True):
        if params.temperature == 0:
            assert tokens == follow(logits_of, prompt, params, params.stop_token_ids)
            assert (tokens == plain) == (params == GREEDY)


def test_a_mixed_batch_equals_single_rows(engine, alone, knobs) -> None:
    order = [6, 2, 0, 5, 1, 4, 3, 2]
    results = engine.generate([PROMPTS[i] for i in order], [knobs[i] for i in order])
    assert tokens_of(results) == [alone[i] for i in order]
    assert tokens_of([engine.generate(PROMPTS[6], GREEDY)]) == [alone[6]]  # nothing is left behind in its slot


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_on_meshes(make_engine, alone, knobs, tp: int, pp: int) -> None:
    assert tokens_of(make_engine(tp=tp, pp=pp, micro_batch_size=2).generate(PROMPTS, knobs)) == alone


@pytest.mark.slow
def test_on_data_shards_with_a_processor(tiny_decoder, logits_of) -> None:
    params = SamplingParams(max_tokens=NEW, logits_processor=last_but_one, repetition_penalty=1.2)
    config = EngineConfig(inference_max_tokens=64, micro_batch_size=2)
    asked = [params, GREEDY, params]
    with Engine(jaxinfer.place(tiny_decoder, make_mesh(data=2, tensor=2, stage=2)), config) as engine:
        results = engine.generate(PROMPTS[:3], asked)
    assert tokens_of(results) == [follow(logits_of, prompt, p) for prompt, p in zip(PROMPTS, asked, strict=False)]


# --- a function of the user's own


def test_a_processor_is_compiled_once(engine, compiled, greedy, logits_of) -> None:
    """It runs for the rows that ask, beside others; with other knobs it is the same program, and another function is another one."""
    params = SamplingParams(max_tokens=NEW, logits_processor=last_but_one)
    penalised = dataclasses.replace(params, repetition_penalty=1.5)
    results = engine.generate(PROMPTS[:3], [params, GREEDY, penalised])
    expected = [follow(logits_of, PROMPTS[0], params), greedy[1], follow(logits_of, PROMPTS[2], penalised)]
    assert tokens_of(results) == expected and expected[0] != greedy[0]
    assert compiled
    compiled.clear()
    assert tokens_of(engine.generate(PROMPTS[:3], [penalised, params, GREEDY]))[2] == greedy[2]
    assert not compiled
    with pytest.raises(SamplingParamsError, match=r"must give float32 \[97\]"):
        engine.check(PROMPTS[0], SamplingParams(logits_processor=lambda logits, tokens, length: logits[:5]))
    assert not compiled


@pytest.mark.slow
def test_more_processors_than_are_remembered(tiny, monkeypatch) -> None:
    """Functions that come and go while one runs: each row has its own."""

    def only(token: int):
        return lambda logits, tokens, length: jnp.where(jnp.arange(logits.shape[0]) == token, logits, -jnp.inf)

    monkeypatch.setattr("jaxinfer.sampling.MAX_PROCESSORS", 1)
    monkeypatch.setattr("jaxinfer.programs.OWN_PROGRAMS", 2)
    with jaxinfer.init_inference(tiny.folder, {"inference_max_tokens": 64, "micro_batch_size": 2}) as engine:
        long = engine.stream(PROMPTS[0], SamplingParams(max_tokens=40, logits_processor=only(5)), every=1)
        next(long)
        for token in (7, 8):
            params = SamplingParams(max_tokens=2, logits_processor=only(token))
            assert engine.generate(PROMPTS[1], params).token_ids == [token] * 2
        assert {t for delta in long for t in delta.token_ids} == {5}
        assert len(engine.programs._own) <= 2


# --- what ends a text


def test_nothing_ends_a_text_before_min_tokens(tiny_decoder, greedy, logits_of) -> None:
    """End tokens of the model and stop tokens are both masked; with ignore_eos the former may come any time."""
    end, stop = greedy[0][2], greedy[0][5]
    config = EngineConfig(inference_max_tokens=64, micro_batch_size=4)
    with Engine(jaxinfer.place(tiny_decoder, make_mesh()), config, eos_ids=(end,)) as engine:
        plain = SamplingParams(max_tokens=NEW, stop_token_ids=(stop,))
        later = dataclasses.replace(plain, min_tokens=8)
        ignoring = dataclasses.replace(later, ignore_eos=True)
        results = engine.generate([PROMPTS[0]] * 3, [plain, later, ignoring])
    assert results[0].token_ids == greedy[0][: greedy[0].index(end) + 1] and results[0].finish_reason == "stop"
    assert results[1].token_ids == follow(logits_of, PROMPTS[0], later, (end, stop))
    assert not {end, stop} & set(results[1].token_ids[:8]) and len(results[1].token_ids) > 8
    assert results[2].token_ids == follow(logits_of, PROMPTS[0], ignoring, (stop,))
    assert end in results[2].token_ids[:8]


def test_min_tokens_that_do_not_fit(engine) -> None:
    with pytest.raises(SamplingParamsError) as error:
        engine.check([1] * 60, SamplingParams(min_tokens=5))
    check(error, "min_tokens is 5", "prompt 0 leaves room for 4", "lower it")


# --- samples


def test_samples_are_those_of_their_seeds(engine) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=11, n=3)
    first, plain = engine.generate(PROMPTS[:2], [params, GREEDY])
    single = dataclasses.replace(params, n=1)
    for i, result in enumerate([first, *first.alternatives]):
        seed = (11 + i * 2654435769) % 2**32
        assert result.token_ids == engine.generate(PROMPTS[0], dataclasses.replace(single, seed=seed)).token_ids
    assert len({tuple(r.token_ids) for r in (first, *first.alternatives)}) == 3
    assert plain.alternatives == [] and plain.cumulative_logprob is None


def test_the_best_of_several_samples(engine) -> None:
    """Ranked by the mean of the model's own log-probabilities, which are those that `score` gives."""
    params = SamplingParams(max_tokens=9, temperature=1.5, seed=3, n=2, best_of=4)
    best = asyncio.run(engine.agenerate([PROMPTS[1]], params))[0]
    drawn = engine.generate(PROMPTS[1], dataclasses.replace(params, n=4, best_of=None))
    every = [drawn, *drawn.alternatives]
    scored = engine.score([PROMPTS[1] + r.token_ids for r in every])
    sums = [sum(s.logprobs[len(PROMPTS[1]) :]) for s in scored]
    order = np.argsort([-total / 9 for total in sums])
    assert [best.token_ids, best.alternatives[0].token_ids] == [every[i].token_ids for i in order[:2]]
    assert best.cumulative_logprob == pytest.approx(max(sums), abs=1e-3)
    assert best.logprobs is None and len(best.alternatives) == 1


def test_a_stream_is_one_sample(engine) -> None:
    with pytest.raises(SamplingParamsError, match="n is 2 and 2 samples are drawn; a stream is one of them: use generate"):
        engine.stream(PROMPTS[0], SamplingParams(temperature=1.0, n=2))


# --- what is reported of the prompt


def test_prompt_logprobs_are_those_of_score(engine, greedy, logits_of) -> None:
    params = [
        SamplingParams(max_tokens=3, prompt_logprobs=2),
        SamplingParams(max_tokens=3, prompt_logprobs=0, temperature=1.0),
        SamplingParams(max_tokens=3),
        SamplingParams(max_tokens=1, prompt_logprobs=0, repetition_penalty=3.0),
    ]
    order = [2, 1, 5, 0]
    results = engine.generate([PROMPTS[i] for i in order], params)
    scores = engine.score([PROMPTS[i] for i in order])
    assert results[0].token_ids == greedy[2][:3] and results[2].prompt_logprobs is None
    for i, result, score, top in zip(order, results, scores, (2, 0, None, 0), strict=True):
        if top is None:
            continue
        first, *others = result.prompt_logprobs
        assert first is None and [entry.token_id for entry in others] == PROMPTS[i][1:]
        assert [entry.logprob for entry in others] == pytest.approx(score.logprobs[1:], abs=1e-5)
        for entry, row in zip(others, logits_of(PROMPTS[i]), strict=False):
            assert list(entry.top) == np.argsort(-row, kind="stable")[:top].tolist()


@pytest.mark.slow
def test_prompt_logprobs_on_a_mesh(make_engine, engine) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=3)
    spread = make_engine(tp=2, pp=2, micro_batch_size=2)
    for one, other in zip(engine.generate(PROMPTS[:4], params), spread.generate(PROMPTS[:4], params), strict=True):
        for x, y in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert y.logprob == pytest.approx(x.logprob, abs=1e-4) and list(y.top) == list(x.top)


def test_echo_and_strings(make_engine, byte_tokenizer) -> None:
    """The prompt before the text, in a result and in a stream; a word that is forbidden as a string does not come."""
    engine = make_engine(tokenizer=byte_tokenizer)
    plain = SamplingParams(max_tokens=NEW, ignore_eos=True)
    result = engine.generate("Hello, you", plain)
    word = result.text[3:5].strip() or result.text[4:6].strip()
    assert word in result.text
    echo = dataclasses.replace(plain, echo=True)
    deltas = list(engine.stream("Hello, you", echo))
    assert "".join(delta.text for delta in deltas) == deltas[-1].result.text == "Hello, you" + result.text
    assert [t for delta in deltas for t in delta.token_ids] == [*result.prompt_token_ids, *result.token_ids]
    without = engine.generate("Hello, you", dataclasses.replace(plain, bad_words=word))
    assert word not in without.text and without.text[:3] == result.text[:3]
