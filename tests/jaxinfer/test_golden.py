"""The decoder and the engine against what transformers computed (tests/golden, written by scripts/make_golden.py).

`--golden DIR` takes the files of another folder, so that fresh seeds can be compared. No torch is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import golden_weights
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer

# Relative to the largest logit. Float32 against float64 is within 5e-6 in transformers itself.
TOLERANCE = 1e-4

# An engine compiles for ten seconds. By default those cases that the loop itself could get wrong: cached keys of rotary
# tables that change with the length, odd sizes, a shared head. The logits tell the others apart.
QUICK_GREEDY = {"odd_shape", "dynamic", "longrope"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden", default=None) or golden_weights.GOLDEN)
        names = golden_weights.case_names(folder)
        slow = [n for n in names if metafunc.function is test_greedy and n not in QUICK_GREEDY]
        cases = [
            pytest.param(functools.partial(_load_case, n, folder), id=n, marks=[pytest.mark.slow] if n in slow else [])
            for n in names
        ]
        metafunc.parametrize("case", cases, indirect=True)


@functools.cache
def _load_case(name: str, folder: Path) -> dict:
    return golden_weights.load_case(name, folder)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> dict:
    return request.param()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict], Path]:
    """Writes the Hugging Face folder of a case, once a session."""
    root = tmp_path_factory.mktemp("golden")

    def folder(case: dict) -> Path:
        path = root / case["case"]
        return path if path.exists() else golden_weights.write_case_folder(case, path)

    return folder


def _pad(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [B, T] and lengths [B]; the padding is a token that means something elsewhere."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.full((len(prompts), lengths.max()), 7, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_logits(case: dict, model_folder: Callable[[dict], Path]) -> None:
    """Every position of every prompt, each prompt alone and all of them in one padded batch."""
    model = jaxinfer.load_model(model_folder(case), dtype="float32")
    prompts, expected = case["prompts"], case["logits"]
    for prompt, logits in zip(prompts, expected, strict=True):
        ids, lengths = _pad([prompt])
        found = np.asarray(model(jnp.asarray(ids), lengths=jnp.asarray(lengths)))[0]
        assert _distance(found, logits) < TOLERANCE, f"prompt of {len(prompt)} tokens alone"
    ids, lengths = _pad(prompts)
    together = np.asarray(model(jnp.asarray(ids), lengths=jnp.asarray(lengths)))
    for row, length, logits in zip(together, lengths, expected, strict=True):
        assert _distance(row[:length], logits) < TOLERANCE, f"prompt of {length} tokens in the padded batch"


def test_greedy(case: dict, model_folder: Callable[[dict], Path]) -> None:
    """The ids of `generate` in transformers, alone and in one padded batch, up to ties of the oracle's logits."""
    prompts, expected = case["prompts"], case["greedy"]
    count = len(expected[0]["ids"])
    longest = max(len(prompt) for prompt in prompts) + count
    engine = jaxinfer.init_inference(model_folder(case), {"dtype": "float32", "inference_max_tokens": longest})
    sampling = jaxinfer.SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    alone = [engine.generate([prompt], sampling)[0] for prompt in prompts]
    together = engine.generate(prompts, sampling)
    for how, results in (("alone", alone), ("in the padded batch", together)):
        for prompt, result, answer in zip(prompts, results, expected, strict=True):
            step = golden_weights.first_difference(result.token_ids, answer["ids"], answer["gaps"], answer["runner_up"])
            assert step is None, f"prompt of {len(prompt)} tokens {how}, step {step}: {result.token_ids} for {answer['ids']}"


def test_first_difference_excuses_ties_only() -> None:
    ids, runner_up = [5, 6, 7, 8], [1, 2, 3, 4]
    clear, tied = [1.0, 1.0, 1.0, 1.0], [1.0, 5e-5, 1.0, 1.0]
    differ = functools.partial(golden_weights.first_difference, expected=ids, runner_up=runner_up)
    assert differ(ids, gaps=clear) is None
    assert differ([5, 2, 9, 9], gaps=tied) is None
    assert differ([5, 2, 9, 9], gaps=clear) == 1
    assert differ([5, 9, 9, 9], gaps=tied) == 1
    assert differ([5, 6, 7], gaps=clear) == 3
