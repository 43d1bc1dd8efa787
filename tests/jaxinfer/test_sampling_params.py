"""SamplingParams: ranges, forms, JSON; and a request on the host: samples, echo, stop strings, what a model refuses."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest
from tiny_llama import check

from jaxinfer.errors import SamplingParamsError
from jaxinfer.requests import Request, TokenLogprob, collect, expand, for_model
from jaxinfer.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, SamplingParams


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"temperature": 1e-5}, "0.0001 to 10000"),
        ({"temperature": False}, "0 (greedy) or more"),
        ({"top_k": 2**31}, "0 (off) or more"),
        ({"repetition_penalty": 0}, "0.01 to 100"),
        ({"repetition_penalty": float("inf")}, "0.01 to 100"),
        ({"presence_penalty": 2.1}, "-2 to 2"),
        ({"frequency_penalty": "1"}, "-2 to 2"),
        ({"frequency_penalty": -3}, "-2 to 2"),
        ({"no_repeat_ngram_size": -1}, "0 (off) or more"),
        ({"no_repeat_ngram_size": 2.0}, "0 (off) or more"),
        ({"min_tokens": -1}, "0 or more"),
        ({"min_tokens": None}, "0 or more"),
        ({"n": 0}, "1 to 128"),
        ({"n": True}, "1 to 128"),
        ({"best_of": 129}, "None, or 1 to 128"),
        ({"prompt_logprobs": 21}, "None, or 0 to 20"),
        ({"prompt_logprobs": True}, "None, or 0 to 20"),
        ({"echo": 1}, "True or False"),
        ({"logit_bias": {5: 101}}, "-100 to 100"),
        ({"logit_bias": {-5: 1}}, "token ids"),
        ({"logit_bias": {"5": 1}}, "token ids"),
        ({"logit_bias": {5: float("nan")}}, "-100 to 100"),
        ({"bad_words": ("",)}, "not empty"),
        ({"bad_words": ((),)}, "not empty"),
        ({"bad_words": ((1, -1),)}, "token ids"),
        ({"bad_words": (5, 6)}, "sequences of token ids"),
        ({"logits_processor": "argmax"}, "a function"),
    ],
    ids=str,
)
def test_ranges(values: dict[str, Any], limit: str) -> None:
    with pytest.raises(SamplingParamsError) as error:
        SamplingParams(**values)
    ((name, value),) = values.items()
    check(error, f"{name} is {value!r}", limit)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, logits, tokens, length):
        return logits


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"logit_bias": [(1, 2)]}, ["logit_bias is [(1, 2)]", "a dict"]),
        ({"logit_bias": dict.fromkeys(range(129), 1)}, ["129 tokens", f"at most {MAX_LOGIT_BIAS}"]),
        ({"bad_words": [[i] for i in range(129)]}, ["129 token sequences", f"at most {MAX_BAD_WORDS}"]),
        ({"bad_words": [[1], [*range(17)]]}, ["of 17 tokens", f"at most {MAX_BAD_WORD_TOKENS}"]),
        ({"min_tokens": 5, "max_tokens": 4}, ["min_tokens is 5", "max_tokens is 4"]),
        ({"n": 3, "best_of": 2, "temperature": 1}, ["best_of is 2", "n is 3"]),
        ({"n": 2}, ["n is 2", "temperature 0", "raise temperature"]),
        ({"best_of": 2}, ["best_of is 2", "temperature 0"]),
        ({"logits_processor": Unhashable()}, ["logits_processor is", "a function"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else "-".join(value),
)
def test_combinations(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SamplingParamsError) as error:
        SamplingParams(**values)
    check(error, *words)


FULL = SamplingParams(
    max_tokens=9,
    temperature=0.5,
    seed=7,
    stop=["a", "b"],
    stop_token_ids=[3],
    logit_bias={5: -1.5, 6: 2},
    bad_words=["word", [1, 2]],
    min_tokens=2,
    n=2,
    best_of=3,
    echo=True,
    prompt_logprobs=1,
)


def test_nothing_can_be_changed_later() -> None:
    bias, words, inner = {5: -1.0}, ["a"], [1, 2]
    params = SamplingParams(logit_bias=bias, bad_words=[*words, inner])
    bias[6], inner[0] = 1.0, 9
    assert params.logit_bias == {5: -1.0} and params.bad_words == ("a", (1, 2))
    with pytest.raises(TypeError):
        params.logit_bias[5] = 0.0  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.echo = True  # type: ignore[misc]
    assert SamplingParams(bad_words="one word").bad_words == ("one word",)
    assert hash(FULL) == hash(dataclasses.replace(FULL)) and FULL == dataclasses.replace(FULL) != params
    assert pickle.loads(pickle.dumps(FULL)) == FULL


def test_json() -> None:
    values = FULL.to_dict()
    assert values["logit_bias"] == {"5": -1.5, "6": 2} and values["bad_words"] == ["word", [1, 2]]
    assert SamplingParams.from_dict(json.loads(json.dumps(values))) == FULL
    assert SamplingParams.from_dict({}) == SamplingParams.from_dict(SamplingParams().to_dict()) == SamplingParams()
    for wrong, words in (
        ({"repetition_penality": 2}, ["no 'repetition_penality'", "did you mean 'repetition_penalty'"]),
        ({"zzz": 2}, ["no 'zzz'", "known are max_tokens"]),
        ([], ["got list"]),
        ({"logit_bias": {"a": 1}}, ["logit_bias is {'a': 1}"]),
        ({"logit_bias": {"-1": 1}}, ["logit_bias is {'-1': 1}"]),
        ({"logit_bias": {"5": 1, 5: 2}}, ["each token once"]),
        ({"logits_processor": "f"}, ["a function"]),
        ({"temperature": "1"}, ["temperature is '1'"]),
    ):
        with pytest.raises(SamplingParamsError) as error:
            SamplingParams.from_dict(wrong)  # type: ignore[arg-type]
        check(error, *words)
    with pytest.raises(SamplingParamsError, match="no JSON form"):
        SamplingParams(logits_processor=len).to_dict()  # type: ignore[arg-type]


# --- samples


def request(params: SamplingParams, prompt=(5, 6), limit=9, tokenizer=None, stop_tokens=()) -> Request:
    return Request(list(prompt), params, limit=limit, stop_tokens=stop_tokens, tokenizer=tokenizer)


def test_one_sample_is_the_request_itself() -> None:
    single = request(SamplingParams())
    assert expand(single) == [single]


def test_seeds_of_samples() -> None:
    """As documented: the first is the request's own, the others lie apart and wrap."""
    params = dataclasses.replace(FULL, seed=2**32 - 1, n=3, best_of=None)
    samples = [r.params for r in expand(request(params))]
    assert [p.seed for p in samples] == [(2**32 - 1 + i * 2654435769) % 2**32 for i in range(3)]
    assert {(p.n, p.best_of) for p in samples} == {(1, None)}
    assert [p.prompt_logprobs for p in samples] == [1, None, None]
    assert [p.logprobs for p in samples] == [None] * 3
    assert [p.logprobs for p in (r.params for r in expand(request(FULL)))] == [0] * 3
    assert len({SamplingParams(temperature=1, n=128).sample(i).seed for i in range(128)}) == 128


def said(sample: Request, tokens: list[int], logprobs: list[float]) -> None:
    sample.push(tokens, [TokenLogprob(token_id=t, logprob=p, top={}) for t, p in zip(tokens, logprobs, strict=True)])


def test_the_best_samples_come_first() -> None:
    """By their mean: the longest of these has the smallest sum and is the best."""
    params = SamplingParams(temperature=1, n=2, best_of=3, prompt_logprobs=0)
    samples = expand(request(params, limit=4, stop_tokens=(9,)))
    samples[0].prompt_logprobs = [None, TokenLogprob(token_id=6, logprob=-3.0, top={})]
    said(samples[0], [1, 9], [-0.5, -1.0])
    said(samples[1], [1, 9], [-0.5, -2.0])
    said(samples[2], [1, 2, 3, 4], [-0.5] * 4)
    best = collect(samples)
    assert best.token_ids == [1, 2, 3, 4] and best.cumulative_logprob == -2.0 and best.finish_reason == "length"
    assert best.prompt_logprobs is samples[0].prompt_logprobs
    [other] = best.alternatives
    assert other.token_ids == [1, 9] and other.cumulative_logprob == -1.5 and other.prompt_logprobs is None
    assert best.logprobs is other.logprobs is None  # nobody asked for them
    assert json.loads(json.dumps(best.to_dict()))["alternatives"][0]["token_ids"] == [1, 9]


def test_samples_without_best_of_keep_their_order() -> None:
    samples = expand(request(SamplingParams(temperature=1, n=2, logprobs=0), limit=1))
    said(samples[0], [1], [-5.0])
    said(samples[1], [2], [-1.0])
    first = collect(samples)
    assert (first.token_ids, first.alternatives[0].token_ids) == ([1], [2])
    assert first.logprobs is not None and first.cumulative_logprob == -5.0


# --- texts


def test_echo(byte_tokenizer) -> None:
    """The text of prompt and answer is decoded in one go, and a stream says the prompt first."""
    prompt, new = byte_tokenizer.encode("stop here:"), byte_tokenizer.encode(" and stop")
    echoed = request(SamplingParams(echo=True, stop="stop"), prompt, limit=20, tokenizer=byte_tokenizer)
    first = echoed.push(new[:3], [])
    assert first.text == "stop here: an" and first.token_ids == [*prompt, *new[:3]]
    last = echoed.push(new[3:], [])
    assert last.result is not None and last.result.text == "stop here: and " and last.token_ids == new[3:]
    assert last.result.token_ids == [*prompt, *new] and last.result.prompt_token_ids == prompt
    plain = request(SamplingParams(echo=True), limit=2)
    plain.push([1, 2], [])
    assert plain.result().token_ids == [5, 6, 1, 2] and plain.result().text == "" and plain.token_ids == [1, 2]


def test_stop_strings_before_min_tokens(byte_tokenizer) -> None:
    tokens = byte_tokenizer.encode("ab ab ab")
    for least, text in ((0, "a"), (2, "ab a"), (4, "ab a"), (5, "ab ab a"), (8, "ab ab ab")):
        one = request(SamplingParams(stop="b", min_tokens=least), limit=8, tokenizer=byte_tokenizer)
        one.push(tokens, [])
        assert one.result().text == text
        assert one.finish_reason == ("stop" if least < 8 else "length")


# --- what a model refuses


def resolved(params: SamplingParams, tokenizer=None) -> SamplingParams:
    return for_model(params, vocab=97, tokenizer=tokenizer, max_logprobs=3)


def test_bad_words_as_tokens(byte_tokenizer) -> None:
    space, cat = byte_tokenizer.encode(" ")[0], tuple(byte_tokenizer.encode("cat"))
    forms = (cat, (space, *cat))
    assert resolved(SamplingParams(bad_words="cat"), byte_tokenizer).bad_words == forms
    assert resolved(SamplingParams(bad_words=[" cat", [space, *cat], "cat", [7]]), byte_tokenizer).bad_words == (*forms, (7,))
    assert resolved(SamplingParams(bad_words=" "), byte_tokenizer).bad_words == ((space,),)
    plain = SamplingParams(bad_words=[[1, 2]], logit_bias={96: 1.0})
    assert resolved(plain) == plain
    with pytest.raises(SamplingParamsError, match="bad_words holds 'cat', and the checkpoint has no tokenizer; give token ids"):
        resolved(SamplingParams(bad_words="cat"))
    with pytest.raises(SamplingParamsError, match="130 token sequences; at most 128"):
        resolved(SamplingParams(bad_words=[chr(65 + i // 8) + chr(65 + i % 8) for i in range(65)]), byte_tokenizer)
    with pytest.raises(SamplingParamsError, match="of 17 tokens; at most 16"):
        resolved(SamplingParams(bad_words="x" * 16), byte_tokenizer)


def test_tokens_that_the_model_has_not() -> None:
    for params, words in (
        (SamplingParams(logit_bias={97: 1}), "logit_bias holds token 97"),
        (SamplingParams(bad_words=[[1], [96, 98]]), "bad_words holds token 98"),
        (SamplingParams(stop_token_ids=[np.iinfo(np.int32).max]), "stop token 2147483647"),
    ):
        with pytest.raises(SamplingParamsError, match=f"{words}.*the vocabulary has 0 to 96"):
            resolved(params)
    with pytest.raises(SamplingParamsError, match="prompt_logprobs is 4, the engine's max_logprobs is 3"):
        resolved(SamplingParams(prompt_logprobs=4))
