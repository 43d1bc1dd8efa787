"""Every family against transformers as it runs here, with weights and prompts that were never seen before."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import golden_weights
import pytest

from jaxinfer.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
# logits in a padded batch, through a cache and on a mesh of both kinds; greedy ids in a padded batch
CHECKS = ("test_logits", "test_cached", "test_greedy", "test_on_a_mesh", "test_one_on_each_mesh", "test_greedy_on_a_mesh")
AT_LEAST = 5  # configurations of a family


def cases_of(architecture: str) -> list[str]:
    config = lambda name: json.loads((golden_weights.GOLDEN / f"{name}.json").read_text("utf-8"))["config"]
    return [name for name in golden_weights.case_names() if config(name)["architectures"][0] == architecture]


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_family_has_configurations(architecture: str) -> None:
    assert len(cases_of(architecture)) >= AT_LEAST


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_fresh_models(architecture: str, tmp_path: Path) -> None:
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    names = cases_of(architecture)
    only = [part for name in names for part in ("--only", name)]
    script = [os.environ["JAXINFER_ORACLE_PYTHON"], ROOT / "scripts" / "make_golden.py", "--seed", str(seed), "--out", tmp_path]
    subprocess.run([*script, *only], check=True)
    tests = [f"{Path(__file__).with_name('test_golden.py')}::{name}" for name in CHECKS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--golden", str(tmp_path), *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-5000:])
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 4 * len(names)
