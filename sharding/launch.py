"""Starts the processes of a run: `jaxinfer launch`. Imports no jax.

Four ways: `local` starts them here, `ssh` starts sharding.agent on each host, `mpi` and `slurm` leave it to mpirun and srun. Before
that it looks whether it can work, on other hosts by agents, or by sharding.probe under mpirun and srun; afterwards sharding.supervise
looks after them. Each rank finds out who it is in sharding.distributed.
"""

import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharding import agent
from sharding.distributed import PREFIX
from sharding.errors import LaunchError
from sharding.job import Job, assign
from sharding.network import free_port, is_local, is_loopback, join_address, listen, resolve, source_address
from sharding.probe import MARK
from sharding.supervise import Run

PROBE_SECONDS = 8.0


def launch(job: Job) -> int:
    """Run a job to its end: 0, the status of the rank that failed first (128 + n for signal n), or 128 + n where signal n ended it all.

    Raises LaunchError, within 10 seconds and before any rank is started, for hosts that cannot be reached or resolved, a port that is
    taken, a number of ranks that does not fit, and a launcher that is not installed. Where srun has to wait for hosts first, nothing is
    probed, and the ranks say the same once they run (sharding.rendezvous).
    """
    backend = job.backend or ("ssh" if job.hosts and not all(is_local(host.name) for host in job.hosts) else "local")
    places = assign(job.hosts, job.ranks) if job.hosts else ["localhost"] * (job.ranks or 1)
    run = Run(job, places)
    if backend == "local":
        if far := [name for name in dict.fromkeys(places) if not is_local(name)]:
            raise LaunchError(f"{far[0]} is another host, which the backend local does not reach; choose ssh")
        coordinator = join_address("127.0.0.1", job.port or free_port())
        if job.port is not None:
            listen(job.port).close()  # where it is taken, this says so
        run.start_local(coordinator)
    elif backend == "ssh":
        run.start_ssh(_probed(job, places))
    elif backend == "mpi":
        words = _mpirun(job, places)
        run.start_other([*words, *job.command], spaced=_mpirun_version() >= 5)
    else:
        run.start_other([*_srun(job, places), *job.command])
    return run.wait()


# --- looking before anything is started


def coordinator_host(names: Sequence[str]) -> str:
    """The address at which all hosts reach the first one. Raises LaunchError where its name leads nowhere, or to loopback only."""
    first, *others = dict.fromkeys(names)
    address = resolve(first)
    far = [other for other in others if not is_local(other)]
    if not far or not is_loopback(address):
        return "127.0.0.1" if not others and is_local(first) else address
    outside = source_address(resolve(far[0]))
    if outside is None or is_loopback(outside):
        raise LaunchError(
            f"{first} leads to {address} here, which {far[0]} cannot reach; give its address in the network instead, or correct /etc/hosts"
        )
    return outside


class _Probe:
    """One agent that looks, and what it said; ends within PROBE_SECONDS."""

    def __init__(self, job: Job, host: str, question: Mapping[str, Any]):
        self.host, self._program, self.answers = host, job.ssh[0], queue.SimpleQueue[dict[str, Any]]()
        question = {"probe": {"seconds": PROBE_SECONDS / 2, **question}}
        try:
            self.process = subprocess.Popen(
                job.agent_command(host), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise LaunchError(
                f"{job.ssh[0]} cannot be started: {error.strerror}; install it, or choose another backend"
            ) from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        last, stream = "", self.process.stderr
        assert stream
        for line in stream:
            text = line.decode(errors="replace").rstrip()
            if text.startswith(agent.MARK):
                self.answers.put(json.loads(text.removeprefix(agent.MARK)))
            elif text:
                last = text
        self.answers.put({"error": f"host {self.host}: {self._program} ended with status {self.process.wait()}: {last}"})

    def answer(self, until: float) -> dict[str, Any]:
        try:
            found = self.answers.get(timeout=max(0.01, until - time.monotonic()))
        except queue.Empty:
            raise LaunchError(
                f"host {self.host} did not answer within {PROBE_SECONDS:.0f} s; check that ssh reaches it"
            ) from None
        if "error" in found:
            raise LaunchError(found["error"])
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(1.0)
        for stream in (self.process.stdin, self.process.stderr):
            with contextlib.suppress(OSError):
                assert stream
                stream.close()


def _probed(job: Job, places: Sequence[str]) -> str:
    """The coordinator's address, after each host was reached, and reached it. Raises LaunchError."""
    names, until = list(dict.fromkeys(places)), time.monotonic() + PROBE_SECONDS
    address = coordinator_host(names)
    with contextlib.ExitStack() as open_:

        def ask(name: str, **question: Any) -> _Probe:
            found = _Probe(job, name, question)
            open_.callback(found.close)
            return found

        first = ask(names[0], host=address, port=job.port or 0, listens=True)
        port = first.answer(until)["port"]
        others = [ask(name, host=address, port=port, listens=False) for name in names[1:]]
        for other in others:
            other.answer(until)
    return join_address(address, port)


def _mpirun(job: Job, places: Sequence[str]) -> list[str]:
    """mpirun with its options for a job, after its hosts have met. Raises LaunchError."""
    _need("mpirun", "Open MPI")
    names = list(dict.fromkeys(places))
    settings = dict(job.settings)
    here = all(map(is_local, names))
    if job.port is not None and here:
        listen(job.port).close()  # where it is taken, this says so
    if job.hosts:
        settings[f"{PREFIX}COORDINATOR"] = join_address(coordinator_host(places), job.port or free_port())
    elif job.port is not None:
        settings[f"{PREFIX}COORDINATOR"] = join_address("127.0.0.1", job.port)
    exported = [word for name, value in settings.items() for word in ("-x", f"{name}={value}")]
    exported += ["-x", "PYTHONPATH"] if "PYTHONPATH" in os.environ else []  # to other hosts nothing goes by itself
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    slots = ",".join(f"{name}:{places.count(name)}" for name in names)
    hosts = ["--host", slots] if job.hosts else []
    if not here:
        _meet(["mpirun", "-n", str(len(names)), *root, *hosts, "--bind-to", "none", "--map-by", "ppr:1:node", *exported])
    # a rank bound to one core would starve XLA's threads
    places_ = ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    return ["mpirun", "-n", str(len(places)), *root, *hosts, *places_, "--tag-output", *exported]


def _meet(launcher: Sequence[str]) -> None:
    """Let one process of each host meet the others, started as the ranks will be. Raises LaunchError."""
    command = [*launcher, sys.executable, "-m", "sharding.probe"]
    root = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            # on many hosts, or slow ones, that is no error: the ranks meet again, with their own patience
            print(f"jaxinfer launch: {command[0]} took longer than {PROBE_SECONDS:.0f} s to look at its hosts", file=sys.stderr)
            return
        finally:
            if process.poll() is None:
                agent.end(process)
    if process.returncode:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        found = [line.partition(MARK)[2] for line in lines if MARK in line]
        raise LaunchError(found[0] if found else f"{command[0]} ended with status {process.returncode}: {' '.join(lines[-3:])}")


def _mpirun_version() -> int:
    said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"Open MPI\)? v?(\d+)", said)
    if found is None:
        raise LaunchError(f"mpirun says it is {said.partition(chr(10))[0]!r}; Open MPI 4 and 5 are known")
    return int(found[1])


def _srun(job: Job, places: Sequence[str]) -> list[str]:
    """srun with its options for a job, after its hosts have met where they are there already. Raises LaunchError."""
    _need("srun", "Slurm")
    names = list(dict.fromkeys(places))
    settings = dict(job.settings)
    if job.port is not None:
        if not job.hosts:
            raise LaunchError(
                f"Slurm chooses the hosts, so that nobody knows whose port {job.port} is; give --hosts, or leave --port out"
            )
        settings[f"{PREFIX}COORDINATOR"] = join_address(coordinator_host(places), job.port)
    hosts = ["--nodelist", ",".join(names), "--nodes", str(len(names))] if job.hosts else []
    exported = ",".join(["ALL", *(f"{name}={value}" for name, value in settings.items())])
    own = ["--kill-on-bad-exit=1", *hosts, f"--export={exported}"]
    if "SLURM_JOB_ID" not in os.environ:
        _try_out(["srun", "--test-only", "-n", str(len(places)), *own, "true"], len(places))
    else:  # outside of a job the probe would stand in the queue before the ranks do
        count = len(names) if job.hosts else min(len(places), int(os.environ.get("SLURM_JOB_NUM_NODES") or 1))
        if count > 1:
            _meet(["srun", "--overlap", "-n", str(count), "--ntasks-per-node=1", *own])
    return ["srun", "-n", str(len(places)), "--label", *own]


def _try_out(command: Sequence[str], ranks: int) -> None:
    """Ask Slurm whether it could ever run this. Raises LaunchError."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"Slurm did not answer within {PROBE_SECONDS:.0f} s; check with `sinfo` that its controller runs, and SLURM_CONF"
        ) from None
    if done.returncode:
        said = " ".join((done.stderr + done.stdout).split())
        raise LaunchError(
            f"Slurm cannot start {ranks} ranks: {said}; start as many as it has room for, on hosts that `sinfo` lists"
        )


def _need(program: str, package: str) -> None:
    if shutil.which(program) is None:
        raise LaunchError(f"{program} is not in PATH; install {package}, or choose another backend")
