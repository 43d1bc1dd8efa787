"""scripts/gpu_check.sh without a GPU: its dry run goes through every part, and the tiles that it would measure follow from the card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.gpus import KNOWN
from pallas_kernels.quant_matmul.tiles import SMALL, Problem, blocks, heuristic, needed, under_way

ROOT = Path(__file__).parents[1]


def check(*arguments: str, platform: str = "cpu") -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": platform}
    command = [str(ROOT / "scripts" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
def test_a_dry_run(tmp_path):
    done = check("--dry-run", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    decode = json.loads((tmp_path / "decode.json").read_text())
    assert decode["dry_run"] and [row["form"] for row in decode["rows"]] == ["bfloat16", "int8", "int4"]
    rows = json.loads((tmp_path / "kernels.json").read_text())
    assert {"rms_norm", "argmax"} <= {row["op"] for row in rows} and all(row["seconds"] > 0 for row in rows)
    assert all("xla" in row["beside"] for row in rows)
    assert "test_on_gpu.py" in (tmp_path / "tests.txt").read_text()
    assert (tmp_path / "gpu_check.png").read_bytes().startswith(b"\x89PNG")


PROBLEMS = [
    Problem(rows=rows, outputs=outputs, inputs=4096, bits=bits, group=group, terms=terms, parts=1, quantised=False)
    for rows in (1, 4, SMALL)
    for outputs in (4096, 14336)
    for bits, group, terms in ((16, None, 1), (8, None, 2), (4, 128, 2))
]


@pytest.mark.parametrize("name", ["a100", "a10", "l40s", "h100"])
def test_memory_is_kept_busy(name):
    """By little's law for the rows of a decode step; a B200 has more bandwidth than the shared memory of these tiles is enough for."""
    gpu = KNOWN[name]
    for p in PROBLEMS:
        tile = heuristic(p, gpu)
        assert blocks(tile, p) >= 0.4 * gpu.processors
        assert p.rows > 4 or under_way(tile, p, gpu) >= needed(tile, p, gpu), (p, tile)
