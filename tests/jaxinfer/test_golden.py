"""The decoder and the engine against what transformers computed (tests/golden, written by scripts/make_golden.py).

`--golden DIR` takes the files of another folder, so that fresh seeds can be compared. No torch is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxinfer
from jaxinfer import generation
from jaxinfer.models.decoder import cached_layers, embed, head_logits, layer_spec, prefill_layers
from jaxinfer.placement import local_layers, place
from pallas_kernels.layer_cache import LayerCache
from sharding.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("rough_programs")

# Relative to the largest logit. Float32 against float64 is within 5e-6 in transformers itself.
TOLERANCE = 1e-4

# One of each family, with the most that it has. On a mesh of stages the first slot of qwen2_window holds layers with and without a window.
ONE_EACH = {"odd_shape", "mistral_window", "qwen2_window", "qwen3_window", "gpt2", "phi3_partial_longrope", "gemma2"}
ONE_EACH |= {"qwen3_moe_mixed"}  # layers with experts and without
# An engine compiles for seconds. By default a few cases that the loop itself could get wrong: cached keys of rotary tables that change
# with the length, learned positions, windows, experts. The logits tell the others apart.
GROWING = {"odd_shape", "dynamic", "longrope", "phi3_longrope_crossing"}
QUICK_GREEDY = {"gemma2", "mixtral"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden", default=None) or golden_weights.GOLDEN)
        quick = {
            "test_logits": set(golden_weights.case_names(folder)),
            "test_cached": ONE_EACH,
            "test_greedy": QUICK_GREEDY,
            "test_on_a_mesh": ONE_EACH,
        }.get(metafunc.function.__name__, set())
        cases = []
        for name in golden_weights.case_names(folder):
            if metafunc.function in (test_one_on_each_mesh, test_greedy_on_a_mesh) and name not in ONE_EACH:
                continue
            # every case through a cache and on a mesh is more than a machine that waits for it should do
            full = metafunc.function in (test_cached, test_on_a_mesh)
            load = functools.partial(_load_case, name, folder)
            marks = [] if name in quick else [pytest.mark.full if full else pytest.mark.slow]
            cases.append(pytest.param(load, id=name, marks=marks))
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


def _pad(prompts: list[list[int]], width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [B, T] and lengths [B]; the padding is a token that means something elsewhere."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.full((len(prompts), max(width, lengths.max())), 7, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths


def _check(rows: np.ndarray, case: dict, how: str) -> None:
    """Logits of each prompt's row [T, V] against the oracle's."""
    for row, expected in zip(rows, case["logits"], strict=True):
        found = row[: len(expected)]
        assert found.shape == expected.shape
        distance = float(np.abs(found - expected).max() / np.abs(expected).max())
        assert distance < TOLERANCE, f"prompt of {len(expected)} tokens {how}: {distance:.1e}"


def test_logits(case: dict, model_folder: Callable[[dict], Path]) -> None:
    """Every position of every prompt, all of them in one padded batch; the oracle had each of them alone. Here one of each family too."""
    model = jaxinfer.load_model(model_folder(case), dtype="float32")
    run = jax.jit(lambda ids, lengths: model(ids, lengths=lengths))
    ids, lengths = _pad(case["prompts"])
    _check(np.asarray(run(ids, lengths)), case, "in the padded batch")
    if case["case"] in ONE_EACH:
        alone = [np.asarray(run(*_pad([prompt], ids.shape[1])))[0] for prompt in case["prompts"]]
        _check(np.stack(alone), case, "alone")


def test_cached(case: dict, model_folder: Callable[[dict], Path]) -> None:
    """The longest prompt's end after its beginning, through a cache: what a forward of the whole gives."""
    model = jaxinfer.load_model(model_folder(case), dtype="float32")
    config, rope = model.config, model.config.attention.rope
    # where angles depend on the length, a cache keeps those of the shorter row: no row that grows past the trained context
    most = rope.original_positions if rope is not None and rope.depends_on_length else config.max_positions
    fitting = [pair for pair in zip(case["prompts"], case["logits"], strict=True) if len(pair[0]) <= most]
    prompt, expected = max(fitting, key=lambda pair: len(pair[0]))
    first, spec = len(prompt) // 3, layer_spec(config)

    @jax.jit
    def run(ids):
        weights, whole = model.weights(), ids.shape[1]
        positions = jnp.arange(whole, dtype=jnp.int32)[None]
        _, fresh = prefill_layers(weights.layers, embed(weights, ids[:, :first]), jnp.array([first]), config, spec)
        put = lambda part: jnp.full((1, part.shape[1], whole + 3, part.shape[3]), 1e3).at[:, :, :first].set(part)
        caches = [LayerCache(k=put(cache.k), v=put(cache.v)) for cache in fresh]
        x = embed(weights, ids[:, first:], positions=positions[:, first:])
        y, _ = cached_layers(weights.layers, x, caches, positions[:, first:], config, spec, rows=None)
        return head_logits(weights, y, config)

    found = np.asarray(run(np.array([prompt], np.int32)))[0]
    assert np.abs(found - expected[first:]).max() / np.abs(expected).max() < TOLERANCE


def _greedy(case: dict, engine: jaxinfer.Engine, batches: dict[str, list[list[int]]]) -> None:
    """The engine's texts of prompts, by batch, against the oracle's, up to ties of the oracle's logits."""
    expected = {tuple(prompt): answer for prompt, answer in zip(case["prompts"], case["greedy"], strict=True)}
    sampling = jaxinfer.SamplingParams(max_tokens=len(case["greedy"][0]["ids"]), temperature=0.0, ignore_eos=True)
    for how, prompts in batches.items():
        for prompt, result in zip(prompts, engine.generate(prompts, sampling), strict=True):
            answer = expected[tuple(prompt)]
            step = golden_weights.first_difference(result.token_ids, answer["ids"], answer["gaps"], answer["runner_up"])
            assert step is None, f"prompt of {len(prompt)} tokens {how}, step {step}: {result.token_ids} for {answer['ids']}"


def _longest(case: dict) -> int:
    return max(len(prompt) + len(answer["ids"]) for prompt, answer in zip(case["prompts"], case["greedy"], strict=True))


def test_greedy(case: dict, model_folder: Callable[[dict], Path]) -> None:
    """The ids of `generate` in transformers, all prompts in one padded batch; and a row alone that grows past its trained context."""
    engine = jaxinfer.init_inference(model_folder(case), {"dtype": "float32", "inference_max_tokens": _longest(case)})
    alone = {"alone": case["prompts"][1:2]} if case["case"] in GROWING else {}
    _greedy(case, engine, {"in the padded batch": case["prompts"], **alone})


def _check_on_mesh(case: dict, folder: Path, stage: int, tensor: int) -> None:
    mesh = make_mesh(stage=stage, tensor=tensor)
    placed = place(jaxinfer.load_model(folder, dtype="float32"), mesh)
    forward = lambda weights, *rows: generation.forward(local_layers(weights), *rows, plan=placed.plan)
    run = jax.jit(jax.shard_map(forward, mesh=mesh, in_specs=(placed.specs, P(), P()), out_specs=P(), check_vma=False))
    _check(np.asarray(run(placed.weights, *_pad(case["prompts"]))), case, f"on {stage} stages of {tensor}")


def test_on_a_mesh(case: dict, model_folder: Callable[[dict], Path]) -> None:
    """Logits with heads over two tensor shards and layers over two stages, in one program."""
    _check_on_mesh(case, model_folder(case), stage=2, tensor=2)


@pytest.mark.parametrize(("stage", "tensor"), [(1, 2), (2, 1)])
def test_one_on_each_mesh(case: dict, model_folder: Callable[[dict], Path], stage: int, tensor: int) -> None:
    _check_on_mesh(case, model_folder(case), stage, tensor)


@pytest.mark.parametrize(("stages", "tensor"), [(1, 2), (2, 1)])
def test_greedy_on_a_mesh(case: dict, model_folder: Callable[[dict], Path], stages: int, tensor: int) -> None:
    """The ids of `generate`, on meshes."""
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages}
    config = {"dtype": "float32", "inference_max_tokens": _longest(case), "engine": sizes}
    engine = jaxinfer.init_inference(model_folder(case), config)
    _greedy(case, engine, {f"on {stages} stages of {tensor}": case["prompts"]})


def test_first_difference_excuses_ties_only() -> None:
    ids, runner_up = [5, 6, 7, 8], [1, 2, 3, 4]
    clear, tied = [1.0, 1.0, 1.0, 1.0], [1.0, 5e-5, 1.0, 1.0]
    differ = functools.partial(golden_weights.first_difference, expected=ids, runner_up=runner_up)
    assert differ(ids, gaps=clear) is None
    assert differ([5, 2, 9, 9], gaps=tied) is None
    assert differ([5, 2, 9, 9], gaps=clear) == 1
    assert differ([5, 9, 9, 9], gaps=tied) == 1
    assert differ([5, 6, 7], gaps=clear) == 3
