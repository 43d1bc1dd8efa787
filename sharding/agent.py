"""Runs one rank on another host for `jaxinfer launch`, which talks to it through ssh: python -m sharding.agent.

The first line of stdin is a job as JSON; the lines after it are the numbers of signals for the rank. When stdin ends, the launcher or the
connection is gone, and so is the rank soon after. What the agent itself says are lines on stderr that begin with MARK. Imports no jax.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sharding.errors import LaunchError
from sharding.network import join_address, listen

MARK = "\x1ejaxinfer-agent "
LOOK = 0.5  # seconds between looks at a rank
KILL_AFTER = 2.0  # seconds from SIGTERM to SIGKILL


def say(**values: Any) -> None:
    sys.stderr.write(MARK + json.dumps(values) + "\n")
    sys.stderr.flush()


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal, as by SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def end(process: subprocess.Popen, wait: float = KILL_AFTER) -> None:
    """End a rank and what it has started: first they are asked to; one that is stopped cannot hear it."""
    for number, patience in ((signal.SIGTERM, wait), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            if number == signal.SIGTERM:
                os.killpg(process.pid, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def run(job: dict[str, Any]) -> int:
    """Start the rank that a job describes (command, env, cwd), and end with it."""
    cwd = job["cwd"] if Path(job["cwd"]).is_dir() else None
    try:
        rank = subprocess.Popen(
            job["command"], env=os.environ | job["env"], cwd=cwd, stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        say(error=f"{job['command'][0]} cannot be started on {socket.gethostname()}: {error.strerror}")
        return 127
    say(pid=rank.pid)
    threading.Thread(target=_obey, args=(rank,), daemon=True).start()
    stopped = False
    while rank.poll() is None:
        if stopped != is_stopped(rank.pid):
            stopped = not stopped
            say(stopped=stopped)
        time.sleep(LOOK)
    say(ended=rank.returncode)
    return rank.returncode if rank.returncode >= 0 else 128 - rank.returncode


def _obey(rank: subprocess.Popen) -> None:
    for line in sys.stdin:
        with contextlib.suppress(ValueError, ProcessLookupError):
            os.killpg(rank.pid, int(line))
    end(rank)


def probe(job: dict[str, Any]) -> int:
    """Look whether this host can be what it is to be: the coordinator's, which listens for a moment, or one that reaches it."""
    host, port, seconds = job["host"], job["port"], job["seconds"]
    if not job["listens"]:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
        except OSError as error:
            say(
                error=f"{socket.gethostname()} does not reach the coordinator at {join_address(host, port)}: {error.strerror or error}"
            )
            return 1
        say(reached=True)
        return 0
    try:
        with listen(port, 64) as server:
            say(port=server.getsockname()[1])
            sys.stdin.read()  # until the launcher has heard from all others
    except LaunchError as error:
        say(error=str(error))
        return 1
    return 0


def main() -> int:
    job = json.loads(sys.stdin.readline())
    return probe(job["probe"]) if "probe" in job else run(job)


if __name__ == "__main__":
    sys.exit(main())
