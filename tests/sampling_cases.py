"""Random logits, histories and SamplingParams, and what an oracle makes of them.

`scripts/make_golden_sampling.py` (beside torch and transformers) and the tests (beside jax) import this module, so it needs numpy alone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "data" / "sampling.npz"

VOCAB, LONGEST = 97, 48
END_TOKENS = (3, 55)  # of every row

# One row each: every knob alone, then what is seldom met, then all together; the rest is random.
KNOBS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.2},
    {"presence_penalty": -0.8},
    {"frequency_penalty": 0.9},
    {"frequency_penalty": -0.4},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 500},
    {"bad_words": "some"},
    {"min_tokens": LONGEST},
    {"min_tokens": 1},
    {"logit_bias": "some"},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "temperature": 0.9},
    {"no_repeat_ngram_size": 2, "bad_words": "some", "min_tokens": LONGEST, "logit_bias": "some"},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 1,
        "frequency_penalty": -0.1,
        "no_repeat_ngram_size": 2,
        "bad_words": "some",
    }
    | {"min_tokens": LONGEST, "logit_bias": "some", "temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
]
RANDOM_ROWS = 15


@dataclasses.dataclass(frozen=True)
class Cases:
    """logits float32 [B, VOCAB]; tokens int32 [B, LONGEST], of which lengths [B] are real and prompt_lengths [B] the prompt's; params:
    SamplingParams as JSON has them."""

    logits: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    params: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Golden:
    """edited, expected: float32 [B, VOCAB], the logits before the temperature, and those that are drawn from, -inf where none is."""

    cases: Cases
    edited: np.ndarray
    expected: np.ndarray

    def save(self, path: Path) -> None:
        arrays = {k: v for k, v in vars(self.cases).items() if k != "params"}
        np.savez_compressed(path, params=json.dumps(self.cases.params), edited=self.edited, expected=self.expected, **arrays)

    @classmethod
    def load(cls, path: Path) -> Golden:
        with np.load(path) as file:
            arrays = dict(file)
        params = json.loads(str(arrays.pop("params")))
        edited, expected = arrays.pop("edited"), arrays.pop("expected")
        return cls(Cases(**arrays, params=params), edited, expected)


def make_cases(seed: int) -> Cases:
    """The rows of one batch, each with other knobs."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows = KNOBS + [_random_knobs(rng) for _ in range(RANDOM_ROWS)]
    B = len(rows)
    logits = (rng.random((B, VOCAB)) * 16 - 8).astype(np.float32)
    kinds = rng.permuted(np.tile(np.arange(VOCAB), (B, 1)), axis=1)[:, :6]  # few, so that they repeat
    tokens = np.take_along_axis(kinds, rng.integers(0, 6, (B, LONGEST)), 1).astype(np.int32)
    lengths = rng.integers(8, LONGEST + 1, B).astype(np.int32)
    prompt_lengths = rng.integers(1, lengths - 3).astype(np.int32)
    params = []
    for i, knobs in enumerate(rows):
        said = tokens[i, : lengths[i]].tolist()
        given: dict[str, Any] = {}
        if "bad_words" in knobs:
            # with the end of what was said, without it, of one token, and longer than all that was said
            after = [[*said[len(said) - n :], int(rng.integers(VOCAB))] for n in (1, 2, 5)]
            given["bad_words"] = [*after, [int(rng.integers(VOCAB))], [1, 2, 4], [int(rng.integers(VOCAB)) for _ in range(16)]]
        if "logit_bias" in knobs:
            given["logit_bias"] = {
                str(t): float(b) for t, b in zip(rng.permutation(VOCAB)[:9], rng.random(9) * 12 - 6, strict=True)
            }
        params.append({"temperature": 1.0} | knobs | given)
    return Cases(logits, tokens, lengths, prompt_lengths, params)


def _random_knobs(rng: np.random.Generator) -> dict[str, Any]:
    """Each knob with a chance of one half."""
    every = {
        "repetition_penalty": 0.5 + float(rng.random()) * 1.5,
        "presence_penalty": float(rng.random()) * 4 - 2,
        "frequency_penalty": float(rng.random()) * 4 - 2,
        "no_repeat_ngram_size": int(rng.integers(1, 5)),
        "bad_words": "some",
        "min_tokens": int(rng.integers(1, LONGEST)),
        "logit_bias": "some",
        "temperature": 0.2 + float(rng.random()) * 2,
        "top_k": int(rng.integers(1, VOCAB)),
        "top_p": 0.05 + 0.9 * float(rng.random()),
        "min_p": float(rng.random()) * 0.2,
    }
    return {name: value for name, value in every.items() if rng.random() < 0.5}
