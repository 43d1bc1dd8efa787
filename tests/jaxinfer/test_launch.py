"""One engine on several processes, started by `jaxinfer launch`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import golden_weights
import jax
import numpy as np
import pytest
from launching import ENV, LAUNCH, launched, one_goes
from small_families import greedy_ids
from tiny_llama import PROMPTS, tokens_of

import jaxinfer
from jaxinfer import SamplingParams, copying, errors
from jaxinfer.cli import main
from jaxinfer.placement import InMemory
from sharding.network import free_port
from sharding.partition import Units


def launch(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LAUNCH, *arguments], env=os.environ | ENV, capture_output=True, text=True, timeout=timeout)


def on_ranks(folder: Path, ranks: int, sizes: dict[str, int], **job: Any) -> subprocess.CompletedProcess[str]:
    return launched([*LAUNCH, "--nproc", str(ranks)], folder, sizes, **job)


def same_answer(done: subprocess.CompletedProcess[str], ranks: int) -> Any:
    """The JSON that each rank has said."""
    assert done.returncode == 0, done.stderr
    answers = [json.loads(done.stdout)]
    answers += [json.loads(line.partition("] ")[2]) for line in done.stderr.splitlines() if re.match(r"\[\d+\] \{", line)]
    assert len(answers) == ranks and all(answer == answers[0] for answer in answers), done.stderr
    return answers[0]


def check(done: subprocess.CompletedProcess[str], engine, ranks: int) -> None:
    """Every rank has what one process says."""
    answer = same_answer(done, ranks)
    expected = tokens_of(engine.generate(PROMPTS[:3], SamplingParams(max_tokens=8)))
    assert answer["all"] == answer["first"] == expected
    assert answer["sampled"] == tokens_of(engine.generate(PROMPTS[:3], SamplingParams(max_tokens=8, temperature=1.0, seed=3)))
    assert answer["piece"] == expected[1][: len(answer["piece"])] != []
    assert answer["after"] == expected[0]
    assert answer["logprob"] == pytest.approx(engine.score(PROMPTS[1]).total_logprob, abs=2e-3)
    assert "process 1 was given other prompts" in answer["differs"]
    assert "got None as a prompt" in answer["none"]
    assert answer["devices"] == [1, ranks]


@pytest.mark.slow
def test_two_processes_say_what_one_does(tiny, engine):
    check(on_ranks(tiny.folder, 2, {"tensor_parallel_size": 2}), engine, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [(4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}), (2, {"data_parallel_size": 2})],
    ids=["stages", "copies"],
)
def test_more_processes_say_what_one_does(tiny, engine, ranks, sizes):
    check(on_ranks(tiny.folder, ranks, sizes), engine, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"quantization": "w4a16-g32"}], ids=["floats", "int4"])
def test_a_checkpoint_that_only_process_0_has(tiny_model, make_engine, more):
    """Process 0 sends what process 1 keeps, padding included, and no more."""
    wide = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 6, "head_dim": 32}
    model = tiny_model(**(wide if more else {}))
    sizes = {"tensor_parallel_size": 2}
    config = {"inference_max_tokens": 64, "micro_batch_size": 4, "kernels": "xla", "engine": sizes, **more}
    done = on_ranks(Path(model.folder.name), 2, sizes, place=str(model.folder.parent), config=config)
    alone = make_engine(tp=2, model=model, kernels="xla", **more)
    check(done, alone, 2)
    assert f"{model.folder.name} is not on the hosts of processes 1: process 0 sends what they keep" in done.stderr
    [sent] = re.findall(r"sent (\d+) bytes of weights to process 1", done.stderr)
    leaves = jax.tree.leaves(alone.params)
    kept = sum(leaf.addressable_shards[1].data.nbytes for leaf in leaves)
    assert 0.9 * kept <= int(sent) <= 1.02 * kept < 0.8 * sum(leaf.nbytes for leaf in leaves)


def test_process_0_is_to_have_the_checkpoint(monkeypatch, tmp_path):
    """What another process alone has is refused, and says where it is."""
    talk = types.SimpleNamespace(exchange=lambda mine, decide: decide([False, mine]))
    monkeypatch.setattr(copying, "channel", lambda name: talk)
    monkeypatch.setattr(copying, "spans_processes", lambda mesh: True)
    with pytest.raises(errors.CheckpointNotFoundError, match="on the host of process 1 and not on that of process 0"):
        copying.understand_together(tmp_path, None, lambda: pytest.fail("it was opened"))


def test_weights_are_sent_to_those_who_know_the_key():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    port, key = copying.serve({"a": InMemory(array)}, 1)
    with pytest.raises(errors.CheckpointCopyError, match="open the ports between"):
        copying._Link("127.0.0.1", port, b"another", 1)
    link = copying._Link("127.0.0.1", port, key, 1)
    np.testing.assert_array_equal(link.read("a", (Units(1, (2, -1)), None)), [array[2], [0] * 4])
    with pytest.raises(KeyError):  # what reading raises comes back
        link.read("b", None)
    link.close()


# process 0 goes when the sixth slice is asked for
COPIED = """
import os, sys
from sharding import distributed
distributed.start()
import jax, jaxinfer
from jaxinfer import copying
source, place, number = sys.argv[1:]
os.chdir(place if jax.process_index() == 0 else "/")
serve, asked = copying.serve, []
class Going(dict):
    def __getitem__(self, path):
        asked.append(path)
        if len(asked) == 6:
            os.kill(os.getpid(), int(number))
        return super().__getitem__(path)
copying.serve = lambda tensors, clients: serve(Going(tensors), clients)
jaxinfer.init_inference(source, {"inference_max_tokens": 64, "engine": {"tensor_parallel_size": 3}})
print("placed", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_process_0_goes_while_it_copies(tiny, number):
    """No launcher: each of the others names it, and ends within the heartbeat with nothing placed."""
    port, children = free_port(), []
    for process in range(3):
        own = {"JAXINFER_PROCESSES": "3", "JAXINFER_PROCESS": str(process), "JAXINFER_COORDINATOR": f"127.0.0.1:{port}"}
        env = os.environ | ENV | own | {"JAX_NUM_CPU_DEVICES": "1"}
        command = [sys.executable, "-c", COPIED, tiny.folder.name, str(tiny.folder.parent), str(int(number))]
        children.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        stopped = number == signal.SIGSTOP
        gone = os.waitid(os.P_PID, children[0].pid, (os.WSTOPPED if stopped else os.WEXITED) | os.WNOWAIT)
        began = time.monotonic()
        assert gone is not None and gone.si_status == number
        for child in children[1:]:
            said, error = child.communicate(timeout=60)
            assert child.returncode and not said, error
            assert re.search(
                "process 0 has sent nothing of .* for 5 s" if stopped else "process 0 has gone while it sent", error
            )
        assert time.monotonic() - began < 15
    finally:
        for child in children:
            child.kill()
            child.communicate()


OVER_PROCESSES: dict[int, list[tuple[str, dict[str, int]]]] = {
    2: [("llama", {"stage": 2}), ("gpt2", {"tensor": 2}), ("gemma2", {"stage": 2}), ("mixtral", {"expert": 2})],
    4: [
        ("llama", {"tensor": 4}),
        ("gpt2", {"stage": 2, "data": 2}),
        ("gemma2", {"tensor": 2, "stage": 2}),
        ("mixtral", {"tensor": 2, "expert": 2}),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", OVER_PROCESSES)
def test_every_family_on_several_processes(ranks, smollm2_gguf):
    """The ids of one device; the real model, on 2 stages of 2 tensor shards, says what transformers does."""
    job: dict[str, Any] = {"meshes": OVER_PROCESSES[ranks]}
    real = json.loads((golden_weights.GOLDEN / "smollm2.json").read_text())["prompts"]["english"]
    if ranks == 4:
        sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
        job["gguf"] = str(smollm2_gguf), real["prompt"], 24, sizes
    script = str(Path(__file__).with_name("launched_families.py"))
    found = same_answer(launch("--nproc", str(ranks), script, json.dumps(job), timeout=900), ranks)["ids"]
    for (family, sizes), ids in zip(OVER_PROCESSES[ranks], found, strict=False):
        assert ids == greedy_ids(family), f"{family} on {sizes}"
    if ranks == 4:
        step = golden_weights.first_difference(found[-1], real["ids"][:24], real["gaps"][:24], real["runner_up"][:24])
        assert step is None and len(found) == 5, f"step {step}: {found[-1]}"


@pytest.mark.full
def test_experts_on_several_processes(tmp_path):
    """Tokens travel between processes."""
    folder = golden_weights.write_case_folder(golden_weights.load_case("mixtral_window"), tmp_path / "mixtral")
    engine = jaxinfer.init_inference(folder, {"inference_max_tokens": 64, "micro_batch_size": 4, "kernels": "xla"})
    check(on_ranks(folder, 2, {"expert_parallel_size": 2}), engine, 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_rank_that_goes_in_mid_generation_is_named_and_ends_all(tiny, number):
    """All end, and the message says which one it was."""
    done = one_goes([*LAUNCH, "--nproc", "4"], tiny.folder, number)
    assert done.returncode == 128 + number
    assert re.search(
        r"rank 2 \(pid \d+ on localhost\) was the first of 4 to fail: (killed by SIGKILL|it was stopped)", done.stderr
    )


@pytest.mark.slow
def test_the_command_under_a_launch(tiny):
    """JSON on stdout and nothing else, once."""
    options = ["--tp", "2", "--max-tokens", "4", "--max-length", "64", "--kernels", "xla", "--json"]
    done = launch("--nproc", "2", "-m", "jaxinfer", "generate", str(tiny.folder), "--prompt-ids", "5,6,7", *options)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["results"][0]["token_ids"]) == 4


@pytest.mark.slow
def test_a_mesh_that_leaves_a_process_without_devices(tiny):
    options = ["--max-tokens", "4", "--prompt-ids", "5,6,7"]
    done = launch("--nproc", "2", "-m", "jaxinfer", "generate", str(tiny.folder), *options)
    assert done.returncode == 1 and done.stdout == ""
    assert "process 1 would have none of them; start 1 processes" in done.stderr
    assert "was the first of 2 to fail: exit status 1" in done.stderr


def test_a_chat_is_one_process(monkeypatch, capsys):
    for name, value in {"PROCESSES": "2", "PROCESS": "1", "COORDINATOR": "127.0.0.1:5"}.items():
        monkeypatch.setenv(f"JAXINFER_{name}", value)
    assert main(["chat", "nowhere"]) == 1 and "a chat is one process" in capsys.readouterr().err
