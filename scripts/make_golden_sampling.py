"""Writes what the logits processors of transformers make of the rows of tests/sampling_cases.py.

Runs in the oracle environment (scripts/oracle_env.sh: torch, transformers; no jax). The file holds the rows and their logits before the
temperature and at the end. transformers has no presence and frequency penalties: these follow OpenAI's formula.

    python scripts/make_golden_sampling.py                            tests/data/sampling.npz
    python scripts/make_golden_sampling.py --seed 7 --out FILE.npz    other rows
"""

from __future__ import annotations

import argparse
import collections
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from sampling_cases import END_TOKENS, GOLDEN, Golden, make_cases  # noqa: E402


def penalised(scores: torch.Tensor, new: list[int], presence: float, frequency: float) -> torch.Tensor:
    scores = scores.clone()
    for token, count in collections.Counter(new).items():
        scores[0, token] -= presence + count * frequency
    return scores


def edited(scores: torch.Tensor, said: torch.Tensor, prompt: int, p: dict[str, Any]) -> torch.Tensor:
    """What comes before the temperature, scores float32 [1, V]."""
    if "repetition_penalty" in p:
        scores = transformers.RepetitionPenaltyLogitsProcessor(p["repetition_penalty"])(said, scores)
    scores = penalised(scores, said[0, prompt:].tolist(), p.get("presence_penalty", 0), p.get("frequency_penalty", 0))
    if "no_repeat_ngram_size" in p:
        scores = transformers.NoRepeatNGramLogitsProcessor(p["no_repeat_ngram_size"])(said, scores)
    if "bad_words" in p:
        scores = transformers.NoBadWordsLogitsProcessor(p["bad_words"])(said, scores)
    if "min_tokens" in p:
        keep = transformers.MinNewTokensLengthLogitsProcessor(prompt, p["min_tokens"], list(END_TOKENS), device="cpu")
        scores = keep(said, scores)
    if "logit_bias" in p:
        bias = [[[int(token)], value] for token, value in p["logit_bias"].items()]
        scores = transformers.SequenceBiasLogitsProcessor(bias)(said, scores)
    return scores


def filtered(scores: torch.Tensor, said: torch.Tensor, p: dict[str, Any]) -> torch.Tensor:
    """Temperature and what comes after it."""
    scores = transformers.TemperatureLogitsWarper(float(p["temperature"]))(said, scores)
    for name, warper in (
        ("top_k", transformers.TopKLogitsWarper),
        ("top_p", transformers.TopPLogitsWarper),
        ("min_p", transformers.MinPLogitsWarper),
    ):
        if name in p:
            scores = warper(p[name])(said, scores)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    args = parser.parse_args()
    cases = make_cases(args.seed)
    before, after = [], []
    for i, p in enumerate(cases.params):
        said = torch.tensor(cases.tokens[i : i + 1, : cases.lengths[i]], dtype=torch.long)
        scores = edited(torch.tensor(cases.logits[i : i + 1]), said, int(cases.prompt_lengths[i]), p)
        before.append(scores[0].numpy())
        after.append(filtered(scores, said, p)[0].numpy())
    Golden(cases, np.stack(before), np.stack(after)).save(args.out)


if __name__ == "__main__":
    main()
