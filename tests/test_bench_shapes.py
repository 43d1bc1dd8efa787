"""scripts/bench/shapes.py: a checkpoint with made-up weights of a given shape, in several precisions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "bench" / "shapes.py")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_precisions_in_turn(tmp_path: Path):
    shape = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    more = [
        "--precisions",
        "float32,bfloat16,int8",
        "--tokens",
        "4",
        "--rounds",
        "2",
        "--batch",
        "4",
        "--cache",
        "int4",
        "--json",
    ]
    done = run(str(tmp_path / "config.json"), *more)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["precision"]: row for row in report["precisions"]}
    assert list(rows) == ["float32", "bfloat16", "int8"]
    # matrices of two layers and the tied head, which four sequences read; vectors stay float32, and the positions are not read
    weights = 2 * 12 * 64 * 64 + 96 * 64
    assert rows["float32"]["bytes"] > 4 * weights and rows["bfloat16"]["bytes"] > 2 * weights
    assert rows["float32"]["bytes"] - rows["bfloat16"]["bytes"] == 2 * weights
    assert rows["int8"]["bytes"] < rows["bfloat16"]["bytes"]
    assert rows["float32"]["ratios"] == [1.0, 1.0] and all(len(row["tokens_per_second"]) == 2 for row in rows.values())


@pytest.mark.slow
def test_refusals():
    for arguments, words in ((["none.json"], "neither a file nor one of"), (["--tokens", "1017"], "1024 positions")):
        done = run(*arguments)
        assert done.returncode == 2 and words in done.stderr
