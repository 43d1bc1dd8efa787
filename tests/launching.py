"""What tests of launches share: tests/jaxinfer/launched.py on several ranks, and one of four ranks that goes in mid-generation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_llama import PROMPTS

ROOT = Path(__file__).parents[1]
ENV = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "1"}
LAUNCH = [sys.executable, "-m", "jaxinfer", "launch"]
SECONDS = 15  # in which all ranks end once one has gone


def launched(
    command: Sequence[str], folder: Path, sizes: Mapping[str, int], env: Mapping[str, str] = {}, **job: Any
) -> subprocess.CompletedProcess[str]:
    """launched.py behind a launcher's command. sizes: of the mesh; job: more of what launched.py is told."""
    config = {"inference_max_tokens": 64, "micro_batch_size": 4, "kernels": "xla", "engine": sizes}
    job = {"source": str(folder), "config": config, "prompts": PROMPTS[:3], **job}
    script = Path(__file__).parent / "jaxinfer" / "launched.py"
    return subprocess.run(
        [*command, str(script), json.dumps(job)], env=os.environ | ENV | env, capture_output=True, text=True, timeout=300
    )


def one_goes(
    command: Sequence[str], folder: Path, number: int, env: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Four ranks, of which rank 2 gets a signal in mid-generation. The launcher and that rank have ended SECONDS later."""
    done = launched(command, folder, {"tensor_parallel_size": 4}, env, signal=int(number), victim=2, tokens=40)
    ended = time.time()
    [(pid, gone)] = set(re.findall(r"process (\d+) goes at (\S+)", done.stderr))  # said again where its last lines are
    assert ended - float(gone) < SECONDS, done.stderr
    while (left := Path(f"/proc/{pid}").exists()) and time.time() - float(gone) < SECONDS:
        time.sleep(0.1)
    assert not left and done.returncode, done.stderr
    return done
