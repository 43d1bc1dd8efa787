"""generate() and calls as scripts for Hugging Face and DeepSpeed write them."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import GREEDY, NEW, PROMPTS, check

from jaxinfer import SamplingParams, errors
from jaxinfer.hf_generate import FIXED, generate


class Engine:
    """Says the number of its row, as often as it may; row 1 ends after two tokens."""

    eos_ids = (9, 8)

    def generate(self, prompts, params):
        self.prompts, self.params, self.rows = prompts, params, 0
        return [self.result(p, p.n) for p in params]

    def result(self, params, samples):
        self.rows += 1
        count = 2 if self.rows == 2 else params.max_tokens
        token_ids = [self.rows] * count
        return SimpleNamespace(token_ids=token_ids, alternatives=[self.result(params, 1) for _ in range(samples - 1)])


class Tensor:
    """As much of a torch tensor as is needed."""

    def __init__(self, values: list):
        self.values = values

    def tolist(self) -> list:
        return self.values

    def new_tensor(self, values: list) -> Tensor:
        return Tensor(values)


IDS = [[9, 9, 5, 6], [1, 2, 3, 4]]
MASK = [[0, 0, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("kind", [list, np.array, jnp.array, Tensor], ids=lambda k: k.__name__)
def test_arrays_in_and_out(kind) -> None:
    engine = Engine()
    out = generate(engine, kind(IDS), kind(MASK), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert engine.prompts == [[5, 6], [1, 2, 3, 4]]
    assert type(out) is (Tensor if kind is Tensor else np.ndarray)
    assert out.tolist() == [[9, 9, 5, 6, 1, 1, 1], [1, 2, 3, 4, 2, 2, 0]]
    assert [p.max_tokens for p in engine.params] == [3, 3] and all(p.temperature == 0 for p in engine.params)


def test_padding_on_the_right_and_without_a_mask() -> None:
    engine = Engine()
    ids = [[5, 6, 0, 0], [1, 2, 3, 4]]
    generate(engine, ids, [[1, 1, 0, 0], [1] * 4], max_new_tokens=1)
    assert engine.prompts == [[5, 6], [1, 2, 3, 4]]
    generate(engine, ids, pad_token_id=0, max_new_tokens=1)
    assert engine.prompts == [[5, 6], [1, 2, 3, 4]]
    for keywords in ({}, {"pad_token_id": 0, "eos_token_id": [0]}):  # an end token may be a part of the prompt
        generate(engine, ids, max_new_tokens=1, **keywords)
        assert engine.prompts == ids


def test_what_fills_rows_that_ended() -> None:
    for keywords, fill in (({}, 9), ({"eos_token_id": 7}, 7), ({"eos_token_id": [6, 7]}, 6), ({"pad_token_id": 3}, 3)):
        assert generate(Engine(), IDS, MASK, max_new_tokens=4, **keywords)[1].tolist()[-2:] == [fill] * 2


@pytest.mark.parametrize(
    ("keywords", "fields"),
    [
        ({"max_length": 7}, {"max_tokens": 3}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "top_k": 0, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        (
            {"do_sample": True, "temperature": 0.7, "min_p": 0.1, "seed": 5},
            {"temperature": 0.7, "top_k": 50, "min_p": 0.1, "seed": 5},
        ),
        ({"temperature": 1.0, "top_k": 50, "top_p": 1.0, "num_beams": 1, "use_cache": True, "early_stopping": False}, {}),
        ({"temperature": None, "generation_config": None}, {}),
        ({"repetition_penalty": 1.5, "no_repeat_ngram_size": 3}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3}),
        ({"bad_words_ids": [[5], [6, 7]]}, {"bad_words": ((5,), (6, 7))}),
        ({"min_new_tokens": 2, "eos_token_id": [4, 5]}, {"min_tokens": 2, "ignore_eos": True, "stop_token_ids": (4, 5)}),
        ({"eos_token_id": 4}, {"ignore_eos": True, "stop_token_ids": (4,)}),
    ],
    ids=str,
)
def test_keywords(keywords: dict[str, Any], fields: dict[str, Any]) -> None:
    engine = Engine()
    generate(engine, IDS, **({"max_new_tokens": 3} if "max_length" not in keywords else {}), **keywords)
    assert engine.params == [SamplingParams(**({"max_tokens": 3} | fields)).sample(i) for i in range(2)]


def test_several_of_each() -> None:
    engine = Engine()
    out = generate(engine, IDS, max_new_tokens=2, do_sample=True, num_return_sequences=3, seed=4)
    assert out.shape == (6, 6) and out[:3, :4].tolist() == [IDS[0]] * 3
    assert out[:, 4].tolist() == [1, 2, 3, 4, 5, 6]
    assert engine.prompts == IDS and [p.n for p in engine.params] == [3, 3]  # each prompt is read once
    rows = [p.sample(i).seed for p in engine.params for i in range(3)]
    assert rows == [SamplingParams(temperature=1.0, seed=4).sample(i).seed for i in range(6)]


def test_generation_config() -> None:
    from transformers import GenerationConfig

    engine = Engine()
    given = GenerationConfig(do_sample=True, temperature=0.5, top_p=0.8, max_new_tokens=4, bos_token_id=1)
    generate(engine, IDS, generation_config=given, max_new_tokens=2)
    assert engine.params[0] == SamplingParams(max_tokens=2, temperature=0.5, top_p=0.8, top_k=50)
    for wrong, word in ((GenerationConfig(num_beams=4), "num_beams is 4"), ({"top_k": 5}, "generation_config is")):
        with pytest.raises(errors.SamplingParamsError, match=word):
            generate(engine, IDS, generation_config=wrong, max_new_tokens=2)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({}, ["give max_new_tokens, or max_length"]),
        ({"max_new_tokens": 3, "max_length": 9}, ["one of them only"]),
        ({"max_length": 4}, ["max_length is 4", "the prompts have 4 tokens", "raise it"]),
        ({"max_new_tokens": 0}, ["max_new_tokens is 0", "at least 1"]),
        ({"max_new_tokens": 3, "temperature": 0.7}, ["temperature is 0.7 without do_sample=True"]),
        ({"max_new_tokens": 3, "do_sample": False, "top_p": 0.9}, ["top_p is 0.9 without do_sample=True"]),
        ({"max_new_tokens": 3, "do_sample": True, "temperature": 0.0}, ["temperature is 0 with do_sample=True"]),
        ({"max_new_tokens": 3, "do_sample": "no"}, ["do_sample is 'no'"]),
        ({"max_new_tokens": 3, "num_return_sequences": 0}, ["num_return_sequences is 0"]),
        ({"max_new_tokens": 3, "num_return_sequences": 2}, ["num_return_sequences is 2", "do_sample"]),
        (
            {"max_new_tokens": 3, "num_return_sequences": 10**6, "do_sample": True},
            ["num_return_sequences is 1000000", "at most"],
        ),
        ({"max_new_tokens": 3, "max_new_token": 3}, ["no key 'max_new_token'", "did you mean 'max_new_tokens'"]),
        ({"max_new_tokens": 3, "streamer": 1}, ["no key 'streamer'"]),
        ({"max_new_tokens": 3, "do_sample": True, "top_p": 2.0}, ["top_p is 2.0"]),
    ],
    ids=str,
)
def test_refused_keywords(keywords: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(errors.SamplingParamsError) as error:
        generate(Engine(), IDS, **keywords)
    check(error, *words)


@pytest.mark.parametrize("name", FIXED)
def test_what_changes_nothing_is_accepted_at_that_value_only(name: str) -> None:
    (same,), advice = FIXED[name]
    generate(Engine(), IDS, max_new_tokens=1, **{name: same})
    other = not same if isinstance(same, bool) else same + 1
    with pytest.raises(errors.SamplingParamsError) as error:
        generate(Engine(), IDS, max_new_tokens=1, **{name: other})
    check(error, f"{name} is {other!r}", advice)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        ([1, 2], None, ["input_ids must be whole numbers [B, T]", "[2]"]),
        ([[1, 2], [1]], None, ["rows padded to one length"]),
        ([[1.5, 2.0]], None, ["float64[1, 2]"]),
        ("text", None, ["input_ids must be"]),
        ([[]], None, ["input_ids must be"]),
        (IDS, [[0, 0, 0, 0], [1] * 4], ["row 0 of input_ids is all padding"]),
        (IDS, [[1] * 4, [1, 0, 0, 1]], ["row 1 of input_ids is padded between its tokens"]),
        (IDS, [[1] * 4], ["attention_mask must be 0 and 1 in the shape [2, 4]", "[1, 4]"]),
        (IDS, [[2] * 4] * 2, ["attention_mask must be 0 and 1"]),
        (IDS, [[0.5] * 4] * 2, ["attention_mask must be 0 and 1"]),
    ],
    ids=str,
)
def test_refused_arrays(ids, mask, words: list[str]) -> None:
    with pytest.raises(errors.PromptError) as error:
        generate(Engine(), ids, mask, max_new_tokens=1)
    check(error, *words)


# --- on an engine


def left_padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(p)) + p for p in prompts])
    return ids, np.array([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def test_engine_generates_from_padded_arrays(engine, greedy) -> None:
    ids, mask = left_padded(PROMPTS)
    for out in (
        engine.generate(ids, attention_mask=mask, max_new_tokens=NEW),
        engine.module.generate(input_ids=ids, attention_mask=mask, max_length=ids.shape[1] + NEW, do_sample=False, num_beams=1),
    ):
        assert out.tolist() == np.concatenate([ids, greedy], 1).tolist()
    wrong: list[dict[str, Any]] = [
        {"prompts": ids, "input_ids": ids},
        {"prompts": ids, "params": GREEDY, "max_new_tokens": 3},
        {"max_new_tokens": 3},
    ]
    for keywords in wrong:
        with pytest.raises(errors.PromptError, match="not both"):
            engine.generate(**keywords)


def test_engine_gives_logits(engine, logits_of) -> None:
    ids, mask = left_padded([PROMPTS[1], PROMPTS[5], PROMPTS[3]])
    out = engine(ids, attention_mask=mask)
    assert out.logits.shape == (3, ids.shape[1], 97) and out[0] is out.logits
    for row, keep in zip((PROMPTS[1], PROMPTS[5], PROMPTS[3]), mask.astype(bool), strict=True):
        i = [PROMPTS[1], PROMPTS[5], PROMPTS[3]].index(row)
        np.testing.assert_allclose(out.logits[i, keep], logits_of(row), atol=1e-4)
        assert not out.logits[i, ~keep].any()
    with pytest.raises(errors.TokenLimitError):
        engine(np.ones((1, 65), np.int32))
    with pytest.raises(errors.PromptError, match="0 to 96"):
        engine([[97]])


def test_a_script_for_deepspeed(tiny, byte_tokenizer, tmp_path: Path, monkeypatch, capsys) -> None:
    """tests/data/deepspeed_script.py, of which the import and the line of the model were changed."""
    folder = shutil.copytree(tiny.folder, tmp_path / "model")
    (folder / "tokenizer.json").write_text(byte_tokenizer._backend.tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}')
    script = Path(__file__).parents[1] / "data" / "deepspeed_script.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--model", str(folder), "--local_rank", "0"])
    found = runpy.run_path(str(script), run_name="__main__")
    outputs, inputs = found["outputs"], found["inputs"]
    assert outputs.shape == (2, inputs["input_ids"].shape[1] + 8)
    assert (outputs[:, : inputs["input_ids"].shape[1]] == inputs["input_ids"]).all()
    assert len(capsys.readouterr().out.splitlines()) == 2
