"""Texts of one model computed in other orders: on meshes, in batches, by other kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import golden_weights

from jaxinfer import GenerationResult, SamplingParams

# Inputs are rounded to levels, and a level turns with the last bit of a sum: logits of small random models move by as much as this.
LEVELS = 2e-2


def with_runner_up(params: SamplingParams) -> SamplingParams:
    """The same request, which reports the two most probable tokens."""
    return dataclasses.replace(params, logprobs=2)


def assert_same_texts(found: Sequence[GenerationResult], expected: Sequence[GenerationResult], tie: float) -> None:
    """Greedy texts are the same, up to a step whose two best log-probabilities lie within `tie` in the expected text.

    expected: of a request `with_runner_up`. At such a step the second best may be taken; what follows are different texts.
    """
    for text, wanted in zip(found, expected, strict=True):
        assert wanted.logprobs is not None, "ask for the expected text with the runner-up"
        best = [sorted(step.top.items(), key=lambda token: -token[1]) for step in wanted.logprobs]
        gaps, runner_up = [one[1] - two[1] for one, two in best], [two[0] for _, two in best]
        step = golden_weights.first_difference(text.token_ids, wanted.token_ids, gaps, runner_up, tie)
        assert step is None, f"step {step}, gap {gaps[step]:.1e}: {text.token_ids} for {wanted.token_ids}"
