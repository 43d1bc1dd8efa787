"""A real model, SmolLM2-135M-Instruct from its GGUF file: the ids of transformers float32, and what loading takes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import golden_weights
import jax
import numpy as np
import pytest

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.models.decoder import embed, layer_spec, prefill_layers
from pallas_kernels.cpu.operations import head_argmax_counted
from pallas_kernels.head_argmax import make_sketch, sketch_refusal
from pallas_kernels.quant_matmul.fused import Norm

CASES = json.loads((golden_weights.GOLDEN / "smollm2.json").read_text())["prompts"]
ALL = list(CASES)
SHORT = ["english", "word"]
TOKENS = 64  # of a text; the golden ones are longer
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=64, ignore_eos=True, temperature=0.8, top_p=0.95, seed=7)

MB = 10**6
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model(smollm2_gguf: Path) -> Callable[..., jaxinfer.Engine]:
    """model(tp=, pp=): an engine in float32. One at a time is kept: each holds 540 MB."""
    kept: dict[tuple[int, int], jaxinfer.Engine] = {}

    def get(tp: int = 1, pp: int = 1) -> jaxinfer.Engine:
        if (tp, pp) not in kept:
            for engine in kept.values():
                engine.close()
            kept.clear()
            sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
            config = {"dtype": "float32", "inference_max_tokens": 320, "micro_batch_size": 8, "engine": sizes}
            kept[tp, pp] = jaxinfer.init_inference(smollm2_gguf, config)
        return kept[tp, pp]

    return get


def check(found: dict[str, list[int]], how: str, tokens: int = TOKENS) -> None:
    """The ids of transformers, up to ties."""
    for name, ids in found.items():
        case, wanted = CASES[name], CASES[name]["ids"][:tokens]
        step = golden_weights.first_difference(ids, wanted, case["gaps"], case["runner_up"])
        assert step is None, f"{name} {how}, step {step}: {ids} for {wanted}"


def generate(engine: jaxinfer.Engine, names: Sequence[str], params: SamplingParams = GREEDY) -> dict[str, list[int]]:
    """One batch of prompts."""
    results = engine.generate([CASES[name]["prompt"] for name in names], params)
    return {name: result.token_ids for name, result in zip(names, results, strict=True)}


def streamed(engine: jaxinfer.Engine, name: str, params: SamplingParams = GREEDY) -> tuple[list[int], str]:
    deltas = list(engine.stream(CASES[name]["prompt"], params))
    return [token for delta in deltas for token in delta.token_ids], "".join(delta.text for delta in deltas)


def sampled_in_a_batch(engine: jaxinfer.Engine) -> list[int]:
    """What the seed draws in the last row of eight, the others being greedy."""
    prompts = [CASES[name]["prompt"][:16] for name in [*ALL[1:], "english"]]
    params = [SamplingParams(max_tokens=2, ignore_eos=True)] * (len(ALL) - 1)
    return engine.generate(prompts, [*params, SAMPLED])[-1].token_ids


@pytest.fixture(scope="session")
def sampled(model) -> list[int]:
    """What the seed draws, alone on one device."""
    return model().generate(CASES["english"]["prompt"], SAMPLED).token_ids


# --- one device


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_alone(model, name: str) -> None:
    check(generate(model(), [name]), "alone")


def test_streamed(model) -> None:
    ids, text = streamed(model(), "english")
    check({"english": ids}, "streamed")
    whole = model().generate(CASES["english"]["source"], GREEDY)
    assert whole.prompt_token_ids == CASES["english"]["prompt"]
    assert whole.text == text and CASES["english"]["text"].startswith(text) and text.startswith(" Paris.")


@pytest.mark.slow
def test_sampled_text_is_streamed_alike(model, sampled) -> None:
    assert sampled != CASES["english"]["ids"][:TOKENS]
    assert streamed(model(), "english", SAMPLED)[0] == sampled


@pytest.mark.slow
def test_one_padded_batch(model, sampled) -> None:
    check(generate(model(), ALL), "in one padded batch")
    assert sampled_in_a_batch(model()) == sampled


# --- meshes


@pytest.mark.slow
def test_tensor_parallel(model, sampled) -> None:
    """Two devices: 9 heads and 3 kv heads do not divide."""
    check(generate(model(tp=2), SHORT), "at TP 2")
    assert generate(model(tp=2), SHORT, SAMPLED)["english"] == sampled


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (3, 1), (4, 1), (1, 2), (2, 2)])
def test_meshes(model, sampled, tp: int, pp: int) -> None:
    engine = model(tp, pp)
    how = f"at TP {tp} x PP {pp}"
    check(generate(engine, ALL), how)
    assert sampled_in_a_batch(engine) == sampled
    if (tp, pp) == (2, 2):
        check({"english": streamed(engine, "english")[0]}, f"{how}, streamed")


# --- loading, in processes of their own


def start(job: dict[str, Any]) -> subprocess.Popen[str]:
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
    }
    command = [sys.executable, str(Path(__file__).with_name("loading_child.py")), json.dumps(job)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(children: Sequence[subprocess.Popen[str]], seconds: int) -> list[dict[str, Any]]:
    """What the children print; none of them outlives this call."""
    answers = []
    try:
        for child in children:
            out, err = child.communicate(timeout=seconds)
            assert child.returncode == 0, err[-3000:]
            answers.append(json.loads(out.splitlines()[-1]))
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.communicate()
    return answers


def weigh(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    small = {"inference_max_tokens": 64, "micro_batch_size": 1}
    (answer,) = finish([start({"source": str(source), "config": small | config})], 120)
    print({key: round(answer[key] / MB) for key in ("peak", "bytes", "largest")}, "MB")
    assert answer["peak"] <= answer["bytes"] + answer["largest"] + 300 * MB
    return answer


def no_sketch() -> str | None:
    """Why the head has no sketch here, or None."""
    return sketch_refusal(np.empty((1, 1), np.float32), 576)


def test_few_rows_of_the_head_are_read(smollm2_gguf: Path) -> None:
    """For a token of text some dozens of the 1536 blocks of 32 rows; now and then, where no token stands out, many."""
    if reason := no_sketch():
        pytest.skip(reason)
    model = jaxinfer.load_model(smollm2_gguf)
    weights, config = model.weights(), model.config
    case = max(CASES.values(), key=lambda case: len(case["ids"]))
    ids = np.asarray([*case["prompt"], *case["ids"]])[None, -TOKENS:]
    lengths = np.asarray([ids.size], np.int32)
    hidden, _ = jax.jit(lambda ids: prefill_layers(weights.layers, embed(weights, ids), lengths, config, layer_spec(config)))(
        ids
    )
    norm = Norm(kind=config.norm, eps=config.norm_eps, scale=weights.norm)
    sketch = make_sketch(weights.table)
    run = jax.jit(lambda x: head_argmax_counted(x, weights.table, norm=norm, sketch=sketch, limit=config.vocab))
    looked = [int(run(hidden[:, i])[2][0]) for i in range(TOKENS)]
    print(sorted(looked))
    assert np.median(looked) < 80 and np.mean(looked) < 300


def test_memory_while_loading(smollm2_gguf: Path) -> None:
    sketch = 0 if no_sketch() else 20 * MB
    assert 530 * MB + sketch < weigh(smollm2_gguf, {"dtype": "float32"})["bytes"] < 545 * MB + sketch


@pytest.mark.slow
def test_memory_while_loading_other_precisions(smollm2_gguf: Path, tmp_path: Path) -> None:
    from convert.native import save_native
    from jaxinfer.config import QuantizationConfig
    from jaxinfer.loading import open_source

    sketch = 0 if no_sketch() else 20 * MB
    assert 265 * MB + sketch < weigh(smollm2_gguf, {"dtype": "bfloat16"})["bytes"] < 275 * MB + sketch
    assert weigh(smollm2_gguf, {})["bytes"] < 120 * MB + sketch  # packed as the file has it
    opened = open_source(smollm2_gguf)
    tensors = opened.stored_as(dtype=None, quantization=QuantizationConfig())
    save_native(tmp_path / "int8", config=opened.config.to_dict(), tensors=tensors, assets=opened.assets)
    assert 134 * MB + sketch < weigh(tmp_path / "int8", {})["bytes"] < 140 * MB + sketch


@pytest.mark.parametrize(
    ("kernels", "cores"),
    [
        pytest.param(*case, marks=mark)
        for mark, cases in ((pytest.mark.slow, [("native", 2), ("xla", 1)]), (pytest.mark.full, [("native", 1), ("xla", 2)]))
        for case in cases
    ],
)
def test_all_golden_tokens(smollm2_gguf: Path, kernels: str, cores: int) -> None:
    """All golden tokens of every prompt, in a batch of all and alone, with as many threads as cores."""
    if len(os.sched_getaffinity(0)) < cores:
        pytest.skip(f"this process may use fewer than {cores} cores")
    tokens = min(len(case["ids"]) for case in CASES.values())
    config = {"dtype": "float32", "inference_max_tokens": 448, "micro_batch_size": 8, "kernels": kernels}
    job = {"source": str(smollm2_gguf), "config": config, "cores": cores, "tokens": tokens, "alone": True}
    (answer,) = finish([start(job | {"prompts": {name: case["prompt"] for name, case in CASES.items()}})], 600)
    how = f"with {kernels} on {cores} cores"
    check(answer["ids"], f"in a batch {how}", tokens)
    check(answer["alone"], f"alone {how}", tokens)


@pytest.mark.slow
def test_four_processes(smollm2_gguf: Path) -> None:
    """TP 4 over jax.distributed: every process reads and keeps about a quarter, and all say what transformers says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"tensor_parallel_size": 4}
    config = {"dtype": "float32", "inference_max_tokens": 96, "micro_batch_size": 2, "engine": sizes}
    job = {"source": str(smollm2_gguf), "config": config, "processes": 4, "port": port}
    job["prompts"] = {name: CASES[name]["prompt"] for name in SHORT}
    answers = finish([start(job | {"process": i}) for i in range(4)], 300)
    for answer in answers:
        print({key: round(answer[key] / MB) for key in ("peak", "kept", "read", "bytes", "largest")}, "MB")
        assert answer["devices"] == [1, 4]
        check(answer["ids"], "at TP 4 in 4 processes")
        # 3 kv heads are padded to 4, mlp and vocabulary divide
        assert 0.24 * answer["bytes"] < answer["kept"] < 0.26 * answer["bytes"]
        assert answer["read"] < 1.05 * answer["kept"]
        assert answer["peak"] < answer["kept"] + answer["largest"] / 4 + 300 * MB
        assert answer["peak"] <= 0.30 * answer["bytes"] + 300 * MB
