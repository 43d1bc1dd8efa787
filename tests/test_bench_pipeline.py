"""scripts/bench/pipeline.py: the ticks of a compiled decode, and stages that are timed one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_stages_are_busy():
    """Fewer than one in twenty stage-ticks without work, the filling of the pipe counted; none once it is full."""
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "pipeline.py"), "random", "--stages", "3", "--layers", "5"]
    more = ["--tokens", "32", "--calls", "2", "--json"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, *more], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    first, second = facts["calls"]
    assert facts["busy"] >= 0.95 and first["busy"] < first["stage_ticks"] and second["busy"] == second["stage_ticks"]
    assert [stage["layers"] for stage in facts["report"]["stages"]] == [[0, 1], [2, 3], [4]]
    assert all(stage["seconds"] > 0 for stage in facts["report"]["stages"]) and facts["report"]["spread"] >= 0
