"""scripts/bench: what is measured, how it is put together, and what is printed; with stand-ins for the peers."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import golden_weights
import numpy as np
import pytest
from tiny_llama import TINY, check, tensor_shapes

from pallas_kernels import registry

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "scripts" / "bench"
sys.path.append(str(BENCH))  # its scripts import each other by name, as scripts do
cpu_peers: Any = importlib.import_module("cpu_peers")
peers_report: Any = importlib.import_module("peers_report")
worker: Any = importlib.import_module("worker")
dequantize_gguf: Any = importlib.import_module("dequantize_gguf")

IDS = list(range(100, 116))


def system(name: str) -> Any:
    return cpu_peers.parse_system(name, "MOSTLY_Q4_1")


def result(speed: float, *, workloads: Sequence[str] = ("decode",), ids: Sequence[int] = IDS, **changes: Any) -> dict[str, Any]:
    """What a worker prints."""
    measured = {"tokens_per_second": speed, "repetitions": [speed], "ids": list(ids)}
    values = {
        "system": "a system 1.0",
        "precision": "float32",
        "cache": "float32",
        "kernels": "attention_block: reference",
        "threads": 2,
        "bytes_per_token": 500_000_000,
        "import_seconds": 0.5,
        "load_seconds": 1.0,
        "first_token_seconds": 2.0,
        "peak_memory_bytes": 600_000_000,
        "bandwidth_gb_per_second": 50.0,
    }
    return values | {"workloads": dict.fromkeys(workloads, measured)} | changes


def report(runs: dict[str, list[dict]], workloads: Sequence[str] = ("decode",), **changes: Any) -> dict[str, Any]:
    """A whole report with these results."""
    settings = {"model": "some/model.gguf", "threads": 2, "rounds": 3, "tokens": 128, "workloads": list(workloads)}
    whole = {
        "version": peers_report.VERSION,
        "machine": {"processor": "a processor", "cores": 2, "system": "Linux"},
        "settings": settings,
        **peers_report.summarise([system(name) for name in runs], runs, workloads),
        "left_out": {},
        "failed": {},
        "runs": runs,
    }
    return whole | changes


THREE = {
    "jaxinfer:float32": [result(s) for s in (10.0, 30.0, 20.0)],
    "transformers:float32": [result(s, ids=[*IDS[:7], 0, *IDS[8:]]) for s in (10.0, 10.0, 20.0)],
    "ctranslate2:float32": [result(s) for s in (5.0, 5.0, 40.0)],
    "jaxinfer:stored": [result(s, bytes_per_token=100_000_000) for s in (90.0, 90.0, 80.0)],
    "llama.cpp:Q4_0": [result(s) for s in (30.0, 45.0, 80.0)],
    "llama.cpp:Q8_0": [result(s) for s in (20.0, 20.0, 20.0)],
}


def row_of(whole: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in whole["rows"] if row["name"] == name)


# --- putting together


def test_ratios_are_taken_within_a_round():
    ratio = row_of(report(THREE), "transformers:float32")["workloads"]["decode"]["ratio"]
    assert ratio == {"median": 1.0, "min": 1.0, "max": 3.0}  # of 1, 3, 1; the ratio of the medians would be 2


def test_a_row_is_compared_with_its_own_precision():
    whole = report(THREE)
    baselines = {row["name"]: row["baseline"] for row in whole["rows"]}
    assert baselines == {
        "jaxinfer:float32": "jaxinfer:float32",
        "transformers:float32": "jaxinfer:float32",
        "ctranslate2:float32": "jaxinfer:float32",
        "jaxinfer:stored": "jaxinfer:stored",
        "llama.cpp:Q4_0": "jaxinfer:stored",
        "llama.cpp:Q8_0": None,
    }
    for name in ("jaxinfer:float32", "llama.cpp:Q8_0"):  # itself, and nobody to compare with
        assert row_of(whole, name)["workloads"]["decode"]["ratio"] is None
    assert row_of(whole, "llama.cpp:Q4_0")["workloads"]["decode"]["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_peer_is_compared_with_the_same_file():
    more = {"jaxinfer:Q4_0": [result(8.0)] * 3, "llama.cpp:Q4_1": [result(1.0)] * 3}
    whole = report(THREE | more)
    baselines = {name: row_of(whole, name)["baseline"] for name in ("jaxinfer:Q4_0", "llama.cpp:Q4_0", "llama.cpp:Q4_1")}
    stored = "jaxinfer:stored"
    assert baselines == {"jaxinfer:Q4_0": stored, "llama.cpp:Q4_0": "jaxinfer:Q4_0", "llama.cpp:Q4_1": stored}
    found = next(f for f in whole["fastest"] if f["group"] == "int4")
    assert found["baseline"] == "jaxinfer:Q4_0" and found["peer"] == "llama.cpp:Q4_0"


def test_the_fastest_peer_has_the_best_median():
    fastest = report(THREE)["fastest"]
    assert [(f["group"], f["peer"]) for f in fastest] == [("float32", "transformers:float32"), ("int4", "llama.cpp:Q4_0")]
    assert fastest[1]["ratio"]["median"] == 2.0
    slower = report(THREE | {"jaxinfer-xla:float32": [result(900.0)] * 3})
    assert slower["fastest"] == fastest, "jaxinfer is no peer of itself"
    assert row_of(slower, "jaxinfer-xla:float32")["workloads"]["decode"]["ratio"]["max"] == 30 / 900


def test_bytes_bandwidth_and_starts():
    runs = {
        "jaxinfer:float32": [result(s, first_token_seconds=9.0 / s, bandwidth_gb_per_second=b) for s, b in ((60, 40), (80, 50))]
    }
    row = report(runs)["rows"][0]
    assert row["megabytes_per_token"] == 500
    assert row["gb_per_second"] == {"median": 35.0, "min": 30.0, "max": 40.0}
    assert row["bandwidth_share"] == {"median": 0.775, "min": 0.75, "max": 0.8}  # of each process's own bandwidth
    assert row["first_start_seconds"] == 0.15
    assert row["start_seconds"]["median"] == pytest.approx(9 / 80)
    assert report({"jaxinfer:float32": runs["jaxinfer:float32"][:1]})["rows"][0]["start_seconds"] is None


def test_texts_are_compared_to_transformers_in_float32():
    whole = report(THREE)
    assert whole["text_reference"] == "transformers:float32"
    assert row_of(whole, "transformers:float32")["same_tokens"] == 16
    assert row_of(whole, "jaxinfer:float32")["same_tokens"] == 7
    short = {"jaxinfer:float32": [result(1.0, ids=IDS[:4])]}  # a trial with fewer tokens
    row = report(short)["rows"][0]
    assert (row["same_tokens"], row["compared_tokens"]) == (4, 4)
    assert "the same" in peers_report.tables(report(short))


def test_without_decode_there_is_no_text_and_no_rate_of_reading():
    runs = {"jaxinfer:float32": [result(700.0, workloads=["prefill_512"], ids=[1])]}
    whole = report(runs, ["prefill_512"])
    row = whole["rows"][0]
    assert whole["text_reference"] is row["same_tokens"] is row["gb_per_second"] is row["bandwidth_share"] is None
    assert "prefill 512" in peers_report.tables(whole)


# --- printing


def test_the_layout_is_the_documented_one():
    whole = report(THREE)
    described = peers_report.__doc__
    for keys in (whole, whole["machine"], whole["settings"], whole["rows"][0], whole["fastest"][0]):
        assert [key for key in keys if not re.search(rf"\b{key}\b", described)] == []
    assert whole == json.loads(json.dumps(whole))
    assert f"version {peers_report.VERSION};" in described


def test_text_table():
    text = peers_report.tables(report(THREE, failed={"openvino:Q4_1": "its last words\nand more"}, left_out={"x": "not there"}))
    lines = text.splitlines()
    line = next(line for line in lines if line.startswith("llama.cpp Q4_0"))
    assert line.split() == ["llama.cpp", "Q4_0", "45.0", "(30.0-80.0)", "2.00x", "(1.00-3.00)", "other", "from", "token", "8"]
    assert next(line for line in lines if line.startswith("jaxinfer int4")).split()[4:7] == ["90.0", "(80.0-90.0)", "1"]
    names = [re.split("  +", line)[0] for line in lines]
    assert names.index("llama.cpp Q8_0") < names.index("llama.cpp Q4_0"), "rows stand by precision"
    assert "Failed: openvino:Q4_1: its last words" in lines
    assert "Left out: x: not there" in lines


def test_markdown_tables_are_whole():
    workloads = list(worker.WORKLOADS)
    runs = {name: [result(3.0, workloads=workloads), result(4.0, workloads=workloads)] for name in cpu_peers.DEFAULT_SYSTEMS}
    blocks = [b.splitlines() for b in peers_report.tables(report(runs, workloads), markdown=True).split("\n\n") if b[0] == "|"]
    assert [len(block) for block in blocks] == [2 + len(cpu_peers.DEFAULT_SYSTEMS)] * 4 + [2 + 4 * len(workloads)]
    for block in blocks:
        assert {line.count("|") for line in block} == {block[0].count("|")}
        assert set(block[1]) == set("| -")
    for title in (w.title for w in worker.WORKLOADS.values()):
        assert any(f"| {title} |" in block[0] for block in blocks)


def test_chart(tmp_path):
    from matplotlib import image

    workloads = list(worker.WORKLOADS)
    rows = {name: [result(3.0, workloads=workloads), result(4.0, workloads=workloads)] for name in cpu_peers.DEFAULT_SYSTEMS}
    heights = []
    for names in (workloads[:1], workloads):
        peers_report.chart(report(rows, names), tmp_path / "chart.png")
        pixels = image.imread(tmp_path / "chart.png")
        heights.append(pixels.shape[0])
        ours = np.abs(pixels[..., :3] - [0xD1 / 255, 0x49 / 255, 0x5B / 255]).max(-1) < 0.01
        assert ours.sum() > 1000 * len(names), "bars in jaxinfer's colour"
    assert heights[1] > 1.5 * heights[0]  # 8 panels in two lines


# --- running


def test_rounds_take_turns():
    systems = [system(name) for name in THREE]
    orders = [cpu_peers.order(systems, turn) for turn in range(6)]
    assert all(sorted(s.name for s in o) == sorted(THREE) for o in orders)
    assert len({o[0].name for o in orders}) == 6
    neighbours = [[list(p) for p in itertools.pairwise(s.name for s in o)] for o in orders[:2]]
    assert not [p for p in neighbours[0] if p in neighbours[1]], "who follows whom changes"


def test_a_failure_leaves_the_others(capsys):
    systems = [system(name) for name in ("jaxinfer:float32", "transformers:float32")]
    asked = []

    def run(one: Any) -> dict:
        asked.append(one.name)
        if one.engine == "transformers":
            raise cpu_peers.LeftOutError("no memory")
        return result(2.0)

    runs, failed = cpu_peers.measure(systems, 3, run)
    assert failed == {"transformers:float32": "no memory"}
    assert {name: len(r) for name, r in runs.items()} == {"jaxinfer:float32": 3}
    assert asked.count("transformers:float32") == 1
    assert "no memory" in capsys.readouterr().err


def test_an_interrupted_run_keeps_whole_rounds():
    systems = [system(name) for name in ("jaxinfer:float32", "transformers:float32")]

    def run_until(limit: int) -> Any:
        counter = itertools.count()

        def run(one: Any) -> dict:
            if next(counter) == limit:
                raise KeyboardInterrupt
            return result(2.0)

        return cpu_peers.measure(systems, 4, run)

    runs, failed = run_until(5)  # in the middle of the third round
    assert ({name: len(r) for name, r in runs.items()}, failed) == ({s.name: 2 for s in systems}, {})
    with pytest.raises(KeyboardInterrupt):
        run_until(1)


FAKE = """
import json, sys
arguments = sys.argv[1:]
if "--quantize" in arguments:
    open(arguments[arguments.index("--quantize") + 1], "w").write("rounded")
elif "broken" in sys.argv[0]:
    sys.exit("this peer is broken")
else:
    print("some noise")
    print(json.dumps(RESULT | {"system": " ".join(arguments)}))
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """stand_ins(broken=...): every engine's worker is a script that prints a fixed result, in this very Python."""
    monkeypatch.setattr(cpu_peers, "limit_cores", lambda threads: None)
    monkeypatch.setattr(cpu_peers, "CACHE", tmp_path / "cache")

    def make(broken: Sequence[str] = (), missing: Sequence[str] = ()) -> None:
        for name, engine in cpu_peers.ENGINES.items():
            script = tmp_path / f"{'broken-' * (name in broken)}{name}.py"
            script.write_text(f"RESULT = {result(2.0)!r}\n{FAKE}")
            python = "nowhere" if name in missing else None
            fake = cpu_peers.dataclasses.replace(engine, script=str(script), python=python)
            monkeypatch.setitem(cpu_peers.ENGINES, name, fake)

    return make


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    """A GGUF file with one Q4_1 and one float tensor."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 2])
    values = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("output_norm.weight", np.array([1.5, -2.0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_the_command_from_model_to_files(stand_ins, quantised, tmp_path, capsys):
    stand_ins(broken=["transformers"], missing=["openvino"])
    ours = ["jaxinfer:stored+int8", "jaxinfer:Q8_0"]
    names = [*ours, "transformers:float32", "llama.cpp:Q4_1", "llama.cpp:Q8_0", "openvino:Q4_1"]
    saved = tmp_path / "run.json"
    status = cpu_peers.main(
        [str(quantised), "--systems", *names, "--workloads", "decode", "--rounds", "2", "--json", str(saved)]
    )
    printed = capsys.readouterr().out
    whole = json.loads(saved.read_text())
    assert status == 1, "a worker failed"
    assert [row["name"] for row in whole["rows"]] == [*ours, "llama.cpp:Q4_1", "llama.cpp:Q8_0"]
    assert whole["failed"].keys() == {"transformers:float32"}
    assert whole["failed"]["transformers:float32"].startswith("ended with code 1: this peer is broken\n")
    assert "peers_env.sh openvino-genai" in whole["left_out"]["openvino:Q4_1"]
    stored, rounded, same, other = (row["system"].split() for row in whole["rows"])
    assert stored[0] == same[0] == str(quantised), "the file itself, where it has the precision already"
    assert Path(other[0]).read_text() == "rounded" and rounded[0] == other[0]
    assert stored[stored.index("--cache") + 1] == "int8"
    assert rounded[rounded.index("--precision") + 1] == "stored-a8" and other[other.index("--precision") + 1] == "Q8_0"
    assert row_of(whole, "llama.cpp:Q8_0")["baseline"] == "jaxinfer:Q8_0"
    assert row_of(whole, "llama.cpp:Q4_1")["baseline"] == "jaxinfer:stored+int8"

    assert cpu_peers.main(["--from", str(saved)]) == 1
    assert capsys.readouterr().out == printed, "printed again from the file"
    saved.write_text(json.dumps(whole | {"version": 0}))
    assert cpu_peers.main(["--from", str(saved)]) == 2
    assert "layout 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vllm:float32", ["ENGINE:PRECISION", "llama.cpp"]),
        ("jaxinfer", ["ENGINE:PRECISION"]),
        ("transformers:int8", ["float32, bfloat16", "'int8'"]),
        ("llama.cpp:Q8_0+u8", ["'u8'", "f16", "q8_0"]),
        ("ctranslate2:int8+int8", ["it has none"]),
    ],
)
def test_unknown_systems_are_refused(name, words):
    with pytest.raises(cpu_peers.BenchmarkError) as error:
        cpu_peers.parse_system(name, None)
    check(error, *words)


def test_the_default_systems_are_known():
    groups = [system(name).group for name in cpu_peers.DEFAULT_SYSTEMS]
    assert groups == sorted(groups, key=peers_report.GROUPS.index)
    assert {system(name).engine for name in cpu_peers.DEFAULT_SYSTEMS} == set(cpu_peers.ENGINES) - {"jaxinfer-xla"}


def test_how_much_is_measured():
    asked = lambda *words: cpu_peers.arguments(["model.gguf", *words])
    assert (asked().rounds, asked("--quick").rounds, asked("--quick", "--rounds", "2").rounds) == (3, 1, 2)
    assert asked("--workloads", "all").workloads == tuple(worker.WORKLOADS)
    assert set(asked("--quick").workloads) < set(asked().workloads) < set(worker.WORKLOADS)
    assert asked("--workloads", "prefill_512", "decode").workloads == ("decode", "prefill_512")
    for words in (["--rounds", "0"], ["--tokens", "1"], ["--threads", "0"], ["--workloads", "nothing"]):
        with pytest.raises(SystemExit):
            asked(*words)


def test_too_many_threads_are_refused(quantised, capsys):
    assert cpu_peers.main([str(quantised), "--threads", "4000"]) == 2
    assert "--threads 4000" in capsys.readouterr().err


def test_float32_gguf_holds_the_same_numbers(quantised, tmp_path):
    dequantize_gguf.dequantize(quantised, tmp_path / "float32.gguf")
    before, after = gguf.GGUFReader(quantised), gguf.GGUFReader(tmp_path / "float32.gguf")
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, new.tensor_type) == (new.name, gguf.GGMLQuantizationType.F32)
        np.testing.assert_array_equal(new.data, gguf.dequantize(old.data, old.tensor_type))
    changed = {n for n, f in after.fields.items() if not n.startswith("GGUF.") and f.contents() != before.fields[n].contents()}
    assert changed == {"general.file_type"}
    assert after.fields.keys() == before.fields.keys()
    assert worker.gguf_bytes_per_token(quantised) == 2 * 2 * 20 + 8  # 20 bytes for 32 weights; the tied table is read whole


def test_the_script_that_makes_environments_knows_the_peers():
    script = str(BENCH / "peers_env.sh")
    wanted = [engine.environment for engine in cpu_peers.ENGINES.values() if engine.environment]
    text = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert [name for name in wanted if name not in text] == []
    unknown = subprocess.run([script, "vllm"], capture_output=True, text=True, check=False)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "vllm" in unknown.stderr


# --- a worker


class Clockwork:
    """A peer that takes 1 s until its first token and 0.5 s for each later one."""

    system, kernels, cache, compiles = "clockwork", "gears", "none", True

    def __init__(self, missing: int = 0) -> None:
        self.calls: list[tuple[list[list[int]], int]] = []
        self.missing = missing

    def bytes_per_token(self) -> int:
        return 7

    def generate(self, prompts: Sequence[list[int]], new: int) -> Any:
        self.calls.append((list(prompts), new))
        ids = [list(range(new)) for _ in prompts]
        ids[-1] = ids[-1][self.missing :]
        return worker.Generated(ids=ids, first_seconds=1.0, seconds=1.0 + 0.5 * (new - 1))


@pytest.fixture
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "read_bandwidth", lambda threads: 12.5)


def ask(*words: str) -> argparse.Namespace:
    return worker.parser(None, ("float32",), ()).parse_args(["model", *words])


def test_worker_prints_one_object(quick_bandwidth, capsys):
    peer = Clockwork()
    worker.main(lambda args: peer, ask("--workloads", "prefill_128", "batch_8", "decode"))
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == result(1.0).keys()
    assert [line for line in result(1.0) if line not in worker.__doc__] == []
    rates = {name: w["tokens_per_second"] for name, w in printed["workloads"].items()}
    # 127 later tokens in 63.5 s; 8 x 64 tokens in 32.5 s; 128 tokens in 1 s
    assert rates == {"decode": 2.0, "batch_8": pytest.approx(8 * 64 / 32.5), "prefill_128": 128.0}
    assert [len(w["repetitions"]) for w in printed["workloads"].values()] == [3, 3, 3]
    assert printed["workloads"]["decode"]["ids"] == list(range(16))
    assert printed["bytes_per_token"] == 7
    assert 0 < printed["import_seconds"] <= printed["first_token_seconds"]
    assert printed["peak_memory_bytes"] >= 0
    assert len(peer.calls[0][0]) == 1 and peer.calls[0][1] == 1, "the first token of a prompt comes first"


@pytest.mark.parametrize("workload", ["decode", "batch_8", "prefill_128"])
def test_worker_counts_tokens(workload):
    with pytest.raises(worker.WorkerError) as error:
        worker.measure(Clockwork(missing=1), worker.WORKLOADS[workload], 128)
    check(error, workload, "tokens instead of")


def test_prompts_are_not_in_anyones_cache():
    for workload in worker.WORKLOADS.values():
        prompts = worker.prompts_of(workload, 1)
        assert {len(p) for p in prompts} == {workload.prompt}
        assert len({tuple(p) for p in prompts}) == len(prompts) == workload.batch
        if workload.prompt > 5:
            assert prompts[0][:16] != worker.prompts_of(workload, 2)[0][:16]
        else:
            assert prompts[0] == worker.PROMPT, "its text is compared"


def test_only_what_compiles_warms_up_with_a_long_prompt():
    peer, eager = Clockwork(), Clockwork()
    eager.compiles = False
    for one in (peer, eager):
        worker.measure(one, worker.WORKLOADS["decode_4k"], 128)
    assert [new for _, new in peer.calls] == [2, 33, 33, 33]
    assert [new for _, new in eager.calls] == [33, 33, 33]


@pytest.fixture
def unchanged_registry() -> Iterator[None]:
    before = [one for op in registry.operations() for one in registry.implementations(op)]
    yield
    for one in before:
        registry.register(one.op, one.name, one.function, supports=one.supports, priority=one.priority, replace=True)


@pytest.mark.slow
def test_worker_runs_jaxinfer(quick_bandwidth, unchanged_registry, tmp_path, capsys):
    config = TINY | {"vocab_size": 5000, "max_position_embeddings": 256, "num_hidden_layers": 1}
    folder = golden_weights.write_folder(tmp_path / "model", config, golden_weights.make_tensors(tensor_shapes(config), seed=4))
    module = importlib.import_module("worker_jaxinfer")
    words = [
        str(folder),
        "--precision",
        "int8",
        "--cache",
        "int8",
        "--workloads",
        "decode",
        "--tokens",
        "3",
        "--kernels",
        "xla",
    ]
    worker.main(module.Jaxinfer, module.command().parse_args(words))
    printed = json.loads(capsys.readouterr().out)
    assert printed["workloads"]["decode"]["tokens_per_second"] > 0
    assert len(printed["workloads"]["decode"]["ids"]) == 3
    assert (printed["precision"], printed["cache"]) == ("int8", "int8")
    weights = sum(int(np.prod(shape)) for name, shape in tensor_shapes(config).items() if "embed" not in name)
    assert weights < printed["bytes_per_token"] < 1.5 * weights, "a byte each and their scales, the table aside"
    assert "attention_block reference, mlp_block reference" in printed["kernels"], "what --kernels xla leaves"
