"""The engine on a small random model: one answer whatever the batch, the slot, the order and the way of asking."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import GREEDY, NEW, PROMPTS, SAMPLED, Ask, tokens_of

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.errors import BackendError
from pallas_kernels.cpu import library
from sharding.mesh import make_mesh


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def step_logits(ask: Ask, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """The module's logits from which each of the new tokens was chosen, [n, V]."""
    return ask(prompt + tokens[:-1])[len(prompt) - 1 :]


# --- greedy


def test_greedy_is_what_the_module_says(greedy, logits_of) -> None:
    assert len({token for tokens in greedy for token in tokens}) > 10  # a model that says something
    for prompt, tokens in zip(PROMPTS, greedy, strict=True):
        assert len(tokens) == NEW
        assert tokens == step_logits(logits_of, prompt, tokens).argmax(-1).tolist()


def test_results(engine, greedy) -> None:
    params = [GREEDY, SamplingParams(max_tokens=3, logprobs=0), GREEDY]
    first, second, _ = engine.generate(PROMPTS[:3], params)
    assert (first.prompt_token_ids, first.token_ids, first.text) == (PROMPTS[0], greedy[0], "")
    assert first.logprobs is None and first.finish_reason == second.finish_reason == "length"
    assert second.logprobs is not None and len(second.logprobs) == 3 and second.logprobs[0].top == {}
    assert first.timings.prefill_seconds > 0 and first.timings.decode_seconds > 0
    assert first.to_dict()["timings"].keys() == {"prefill_seconds", "decode_seconds"}


def test_batch_equals_single(engine, greedy) -> None:
    """Unequal prompts, padded, in one batch that has an unused row."""
    assert tokens_of(engine.generate(PROMPTS[:3], GREEDY)) == greedy[:3]


def test_batch_invariant(make_engine) -> None:
    """Bit for bit the same log-probabilities alone, and in any company, order and slot."""
    engine = make_engine(batch_invariant=True)
    params = [SamplingParams(max_tokens=p.max_tokens, temperature=p.temperature, seed=p.seed, logprobs=3) for p in SAMPLED]
    kept = lambda result: (result.token_ids, [(t.logprob, *t.top.items()) for t in result.logprobs])
    alone = [kept(engine.generate(prompt, p)) for prompt, p in zip(PROMPTS, params, strict=True)]
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 4, 0, 5], [3, 1]):
        results = engine.generate([PROMPTS[i] for i in order], [params[i] for i in order])
        assert [kept(result) for result in results] == [alone[i] for i in order]


def test_kernels_by_name(make_engine, tiny, greedy, monkeypatch) -> None:
    """The same text with native kernels and without; required ones that are not there are refused."""

    def calls(engine: jaxinfer.Engine) -> bool:
        """Whether the decode program calls native kernels."""
        state = jax.eval_shape(engine.programs.state(1, 128))
        return "jaxinfer_mlp_block" in engine.programs.decode(0).lower(engine.params, state, np.int32(1)).as_text()

    plain = make_engine(kernels="xla")
    assert plain.generate(PROMPTS[1], GREEDY).token_ids == greedy[1] and not calls(plain)
    assert calls(make_engine()) == (library.refusal("cpu") is None)
    monkeypatch.setattr(library, "refusal", lambda platform: "no library")
    with pytest.raises(BackendError, match="no library"):
        jaxinfer.init_inference(tiny.folder, {"kernels": "native"})


def test_more_prompts_than_slots(engine, greedy) -> None:
    order = [6, 2, 0, 5, 1, 4, 3]
    assert tokens_of(engine.generate([PROMPTS[i] for i in order], GREEDY)) == [greedy[i] for i in order]


def test_prompts_may_be_arrays(engine, greedy) -> None:
    assert engine.generate(np.array(PROMPTS[1]), GREEDY).token_ids == greedy[1]
    assert engine.generate(jnp.array(PROMPTS[1]), GREEDY).token_ids == greedy[1]
    assert tokens_of(engine.generate([tuple(PROMPTS[1])], GREEDY)) == [greedy[1]]
    assert tokens_of(engine.generate(np.array([PROMPTS[1]]), GREEDY)) == [greedy[1]]


def test_as_many_tokens_as_there_is_room(tiny, make_engine, logits_of) -> None:
    """A limit that is no power of two; prompt and new tokens fill it."""
    engine = make_engine(inference_max_tokens=27)
    prompt = [*range(20)]
    result = engine.generate(prompt)
    assert len(result.token_ids) == 7 and result.finish_reason == "length"
    assert result.token_ids == step_logits(logits_of, prompt, result.token_ids).argmax(-1).tolist()
    assert len(engine.generate([*range(26)]).token_ids) == 1


def test_warmup_compiles_what_requests_need(make_engine, tiny, compiled, greedy) -> None:
    engine = jaxinfer.init_inference(tiny.folder, {"inference_max_tokens": 64, "micro_batch_size": 4})
    told = []
    engine.warmup(prompt_tokens=(16,), batches=(1, 3), progress=lambda *args: told.append(args))
    assert told == [(0, 2, "1 x 16 tokens"), (1, 2, "3 x 16 tokens"), (2, 2, "ready")]
    compiled.clear()
    assert engine.generate(PROMPTS[1], GREEDY).token_ids == greedy[1]
    assert tokens_of(engine.generate(PROMPTS[:3], GREEDY)) == greedy[:3]
    assert tokens_of(engine.generate(PROMPTS[:3], SAMPLED[:3])) != greedy[:3]
    assert not compiled
    engine.close()


# --- what differs per request


def test_sampled_is_not_greedy(greedy, sampled) -> None:
    assert [len(tokens) for tokens in sampled] == [params.max_tokens for params in SAMPLED]
    assert sampled[5] == greedy[5]
    for i in (0, 2, 6):
        assert sampled[i] != greedy[i]
    assert len(set(sampled[0])) > 5


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [3, 1, 5], [4, 2]], ids=str)
def test_requests_do_not_see_each_other(engine, sampled, order: list[int]) -> None:
    """Every request has parameters of its own, and the same seed draws the same tokens in any batch, order and slot."""
    results = engine.generate([PROMPTS[i] for i in order], [SAMPLED[i] for i in order])
    assert tokens_of(results) == [sampled[i] for i in order]


def test_the_seed_decides(engine, sampled) -> None:
    draw = lambda seed: engine.generate(PROMPTS[0], SamplingParams(max_tokens=NEW, temperature=1.0, seed=seed)).token_ids
    assert draw(11) == sampled[0]
    assert len({tuple(draw(seed)) for seed in range(5)}) == 5


def test_narrow_sampling_is_greedy(engine, greedy) -> None:
    narrow = [
        SamplingParams(max_tokens=NEW, temperature=1.0, top_k=1),
        SamplingParams(max_tokens=NEW, temperature=1.0, top_p=1e-6),
        SamplingParams(max_tokens=NEW, temperature=1.0, min_p=0.999999),
        SamplingParams(max_tokens=NEW, temperature=1e-4),
    ]
    assert tokens_of(engine.generate(PROMPTS[:4], narrow)) == greedy[:4]


def test_stop_tokens(engine, greedy) -> None:
    """The token that ends a text is its last one; the others of the batch go on."""
    cut = [next(i for i in range(3, NEW) if tokens[i] not in tokens[:i]) for tokens in greedy[:2]]
    first = [
        SamplingParams(max_tokens=NEW, stop_token_ids=(90, greedy[0][cut[0]])),
        SamplingParams(max_tokens=NEW, stop_token_ids=(greedy[1][cut[1]],), ignore_eos=True),
        GREEDY,
        SamplingParams(max_tokens=NEW, stop_token_ids=(greedy[3][0],)),
    ]
    results = engine.generate(PROMPTS[:4], first)
    ends = [cut[0] + 1, cut[1] + 1, NEW, 1]
    assert tokens_of(results) == [tokens[:end] for tokens, end in zip(greedy, ends, strict=False)]
    assert [result.finish_reason for result in results] == ["stop", "stop", "length", "stop"]


def test_end_tokens_of_the_model(tiny_decoder, make_engine, greedy) -> None:
    """They come from the checkpoint, and ignore_eos passes them over."""
    end = next(i for i in range(1, NEW) if greedy[0][i] not in greedy[0][:i])
    config = EngineConfig(inference_max_tokens=64, micro_batch_size=4)
    engine = Engine(jaxinfer.place(tiny_decoder, make_mesh()), config, eos_ids=(greedy[0][end], 0))
    result = engine.generate(PROMPTS[0], GREEDY)
    assert (result.token_ids, result.finish_reason) == (greedy[0][: end + 1], "stop")
    assert engine.generate(PROMPTS[0], SamplingParams(max_tokens=NEW, ignore_eos=True)).token_ids == greedy[0]


# --- log-probabilities


def test_logprobs(engine, logits_of, greedy, sampled) -> None:
    """Of the module's logits as they are, whatever the temperature; the alternatives in order."""
    params = [SamplingParams(max_tokens=NEW, logprobs=5), SamplingParams(max_tokens=NEW, temperature=1.0, seed=11, logprobs=2)]
    both = engine.generate([PROMPTS[1], PROMPTS[0], PROMPTS[2]], [*params, GREEDY])
    assert tokens_of(both) == [greedy[1], sampled[0], greedy[2]]
    assert both[2].logprobs is None
    for result, prompt, count in ((both[0], PROMPTS[1], 5), (both[1], PROMPTS[0], 2)):
        expected = log_softmax(step_logits(logits_of, prompt, result.token_ids))
        assert result.logprobs is not None and len(result.logprobs) == NEW
        for row, token, entry in zip(expected, result.token_ids, result.logprobs, strict=True):
            assert entry.token_id == token
            assert entry.logprob == pytest.approx(row[token], abs=2e-4)
            assert list(entry.top) == np.argsort(-row, kind="stable")[:count].tolist()
            np.testing.assert_allclose(list(entry.top.values()), np.sort(row)[::-1][:count], atol=2e-4)


def test_score(engine, logits_of) -> None:
    """More prompts than are scored at once, one of a single token."""
    prompts = [*PROMPTS[:5], [*range(64)]]
    for prompt, result in zip(prompts, engine.score(prompts), strict=True):
        logits = logits_of(prompt)[:-1]
        expected = log_softmax(logits)[np.arange(len(prompt) - 1), prompt[1:]]
        assert result.token_ids == prompt and result.logprobs[0] is None and result.greedy_token_ids[0] is None
        np.testing.assert_allclose(np.array(result.logprobs[1:], float), expected, atol=2e-4)
        assert result.greedy_token_ids[1:] == logits.argmax(-1).tolist()
        assert result.total_logprob == pytest.approx(expected.sum(), abs=2e-3)
    assert engine.score(PROMPTS[1]).token_ids == PROMPTS[1]


# --- streams and text


def test_stream_equals_generate(engine, greedy, sampled) -> None:
    for params, expected in ((GREEDY, greedy[1]), (SamplingParams(max_tokens=NEW, temperature=1.0, seed=11), None)):
        expected = expected or engine.generate(PROMPTS[1], params).token_ids
        for every in (1, 6, 100):
            deltas = list(engine.stream(PROMPTS[1], params, every=every))
            assert [token for delta in deltas for token in delta.token_ids] == expected
            assert [delta.result for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
            assert deltas[-1].result is not None and deltas[-1].result.token_ids == expected
            assert len(deltas) == 1 + -(-(NEW - 1) // every)


def test_streams_side_by_side(engine, greedy) -> None:
    """Streams that take turns, and other work between their pieces."""
    streams = [engine.stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    heard: list[list[int]] = [[], []]
    for _ in range(NEW):
        for stream, tokens in zip(streams, heard, strict=True):
            tokens += next(stream).token_ids
        if len(heard[0]) == 5:
            assert tokens_of(engine.generate(PROMPTS[:3], GREEDY)) == greedy[:3]
    assert heard == greedy[:2]


def test_a_stream_that_is_left_alone(engine, greedy) -> None:
    """The engine works after a stream was closed, was thrown into, or failed on the device's side."""
    stream = engine.stream(PROMPTS[0], GREEDY)
    next(stream), next(stream)
    stream.close()
    assert engine.generate(PROMPTS[1], GREEDY).token_ids == greedy[1]
    stream = engine.stream(PROMPTS[0], GREEDY)
    next(stream), next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert engine.generate(PROMPTS[1], GREEDY).token_ids == greedy[1]
    stream = engine.stream(PROMPTS[0], GREEDY)
    next(stream)
    del stream
    assert engine.generate(PROMPTS[1], GREEDY).token_ids == greedy[1]


def test_a_device_that_fails(engine, greedy, monkeypatch) -> None:
    """The error reaches who waits for it; the next request finds an engine that works."""
    decode = engine._slots.decode

    def fails(*args: Any):
        decode(*args)  # the state is donated, and what came of it is lost
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(engine._slots, "decode", fails)
        with pytest.raises(RuntimeError, match="out of order"):
            engine.generate(PROMPTS[:3], GREEDY)
    assert tokens_of(engine.generate(PROMPTS[:3], GREEDY)) == greedy[:3]


@pytest.fixture(scope="session")
def talking(make_engine, byte_tokenizer) -> jaxinfer.Engine:
    return make_engine(tokenizer=byte_tokenizer)


def test_text(talking, byte_tokenizer) -> None:
    result = talking.generate("Hello, you", SamplingParams(max_tokens=NEW, ignore_eos=True))
    assert result.prompt_token_ids == byte_tokenizer.encode("Hello, you")
    assert result.text == byte_tokenizer.decode(result.token_ids) and len(result.text) > 10
    deltas = list(talking.stream("Hello, you", SamplingParams(max_tokens=NEW, ignore_eos=True)))
    assert "".join(delta.text for delta in deltas) == result.text
    assert deltas[-1].result is not None and deltas[-1].result.text == result.text
    assert talking.eos_ids == (0,)


def test_stop_strings(talking) -> None:
    """The text is cut before the stop, wherever pieces of it lie; later tokens are not computed, or are thrown away."""
    whole = talking.generate("Hello, you", SamplingParams(max_tokens=40, ignore_eos=True))
    text = whole.text
    at = next(i for i in range(5, len(text) - 2) if text.index(text[i : i + 2]) == i)
    stop = text[at : at + 2]
    params = SamplingParams(max_tokens=40, ignore_eos=True, stop=("never there", stop))
    for _ in range(2):  # the freed slot is used again
        result = talking.generate("Hello, you", params)
        assert (result.text, result.finish_reason) == (text[:at], "stop")
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
        assert len(result.token_ids) == at + 2
        assert not talking._slots.state.active.any()  # the device has stopped too
    deltas = list(talking.stream("Hello, you", params))
    assert "".join(delta.text for delta in deltas) == text[:at]
    both = talking.generate(["Hello, you", "Hello, you", "x"], [params, SamplingParams(max_tokens=40, ignore_eos=True), GREEDY])
    assert [both[0].text, both[1].text] == [text[:at], text]


def test_a_stop_string_ends_the_work(talking, monkeypatch) -> None:
    whole = talking.generate("Hello, you", SamplingParams(max_tokens=50, ignore_eos=True))
    steps, decode = [], talking.decode
    monkeypatch.setattr(talking, "decode", lambda p, s, n, **k: (steps.append(n), decode(p, s, n, **k))[1])
    talking.generate("Hello, you", SamplingParams(max_tokens=50, ignore_eos=True, stop=whole.text[:2]))
    assert sum(steps) < 20


# --- caches of fewer bits


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("bfloat16", 0.03),
        ("int8", 0.06),
        pytest.param("int4", 0.4, marks=pytest.mark.slow),
        pytest.param("fp8", 0.2, marks=pytest.mark.slow),
        pytest.param("float16", 0.004, marks=pytest.mark.slow),
    ],
)
def test_cache_of_fewer_bits(make_engine, logits_of, dtype: str, tolerance: float) -> None:
    """What was chosen is at most a little worse than the best in float32."""
    engine = make_engine(kv_cache={"dtype": dtype}, micro_batch_size=1)
    state = engine.init_state(1)
    assert state.caches[0].format == dtype and (state.caches[0].k_scale is not None) == (dtype in ("int8", "fp8", "int4"))
    result = engine.generate(PROMPTS[2], SamplingParams(max_tokens=NEW, logprobs=0))
    expected = log_softmax(step_logits(logits_of, PROMPTS[2], result.token_ids))
    assert result.logprobs is not None
    found = np.array([entry.logprob for entry in result.logprobs])
    distance = np.abs(found - expected[np.arange(NEW), result.token_ids])
    assert 0 < distance.max() < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tp", "pp"), [("int4", 2, 2), ("int4", 3, 1), ("int4", 1, 2), ("fp8", 2, 2)])
def test_a_cache_of_fewer_bits_is_the_same_on_every_mesh(make_engine, dtype: str, tp: int, pp: int) -> None:
    """Slots that are used again, longer texts than a group of int4 keys, prompts that end within one; alone, in batches and on meshes."""
    prompts = [list(PROMPTS[i]) * n for i, n in ((1, 1), (2, 7), (0, 1), (3, 4), (2, 1), (5, 3), (1, 9))]
    prompts = [prompt[:40] for prompt in prompts]
    keys = {"kv_cache": {"dtype": dtype}, "inference_max_tokens": 90}
    params = SamplingParams(max_tokens=45, ignore_eos=True)
    alone = make_engine(micro_batch_size=1, **keys)
    expected = [alone.generate(prompt, params).token_ids for prompt in prompts]
    assert tokens_of(make_engine(tp=tp, pp=pp, micro_batch_size=2, **keys).generate(prompts, params)) == expected
