"""scripts/bench/collectives.py: two network namespaces and a slow link between them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "collectives.py"


@pytest.mark.slow
@pytest.mark.root
def test_layers_send_less_over_the_link():
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc"))):
        pytest.skip("needs root, ip and tc")
    command = [sys.executable, str(SCRIPT), "--json", "--kib", "1024", "--repetitions", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    flat, layered, int8 = json.loads(done.stdout)
    assert layered["of_flat_bytes"] <= 0.70 and int8["of_flat_bytes"] <= 0.20
    assert layered["speed_up"] > 1 and int8["speed_up"] > 1.3  # also on a machine whose cores are busy
    assert flat["largest_error"] < 1e-5 and layered["largest_error"] < 1e-5 and int8["largest_error"] < 0.15
