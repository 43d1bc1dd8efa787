"""Real launchers on this machine: Open MPI, a one-node Slurm that the test starts, ssh to a loopback sshd. All need root."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from launching import ENV, LAUNCH, one_goes

from jaxinfer import SamplingParams
from sharding.network import free_port, listen

pytestmark = [pytest.mark.slow, pytest.mark.root]

ADMIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where servers are
PROMPT = [5, 17, 3]


def need(*programs: str) -> list[str]:
    """Where these programs are; skips the test where one is missing."""
    found = [shutil.which(program, path=ADMIN) for program in programs]
    if missing := [program for program, path in zip(programs, found, strict=True) if path is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return [str(path) for path in found]


@pytest.fixture
def check(tiny, engine) -> Callable[..., None]:
    """check(command, env): a launcher's command, followed by `jaxinfer generate` for two ranks, prints what one process says, once."""

    def run(command: Sequence[str], env: Mapping[str, str] = {}) -> None:
        options = ["--tp", "2", "--max-tokens", "6", "--max-length", "64", "--kernels", "xla", "--json"]
        program = ["generate", str(tiny.folder), "--prompt-ids", ",".join(map(str, PROMPT)), *options]
        done = subprocess.run(
            [*command, "-m", "jaxinfer", *program], env=os.environ | ENV | env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        expected = engine.generate(PROMPT, SamplingParams(max_tokens=6)).token_ids
        assert json.loads(done.stdout)["results"][0]["token_ids"] == expected

    return run


def launch(*options: str) -> list[str]:
    return [*LAUNCH, *options]


def blamed(command: Sequence[str], tmp_path: Path, env: Mapping[str, str]) -> str:
    """What a launch of two ranks says, of which rank 1 ends with status 3."""
    program = tmp_path / "fails.py"
    program.write_text(
        "import sys, time\nfrom sharding.distributed import detect\nif detect().process: sys.exit(3)\ntime.sleep(60)\n"
    )
    done = subprocess.run([*command, str(program)], env=os.environ | ENV | env, capture_output=True, text=True, timeout=50)
    assert done.returncode
    return done.stderr


MPIRUN = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]


def test_open_mpi(check, tmp_path):
    need("mpirun")
    check([*MPIRUN, "-n", "2", sys.executable])
    check(launch("--nproc", "2", "--backend", "mpi"))
    assert "rank 1 (on localhost) was the first of 2 to fail: exit status 3" in blamed(
        launch("--nproc", "2", "--backend", "mpi"), tmp_path, {}
    )


def said_at_once(command: Sequence[str], env: Mapping[str, str] = {}) -> str:
    """What a launch that cannot be says on stderr, long before the patience of its ranks is at its end."""
    program = [*command, "-m", "jaxinfer", "generate", "demo", "--prompt-ids", "1"]
    done = subprocess.run(program, env=os.environ | ENV | env, capture_output=True, text=True, timeout=60)
    assert done.returncode and done.stdout == "", done.stderr
    return done.stderr


def test_what_open_mpi_cannot_start_is_said(tmp_path):
    need("mpirun")
    with listen(0) as server:
        port = server.getsockname()[1]
        assert f"port {port} of" in (said := said_at_once(launch("--nproc", "2", "--backend", "mpi", "--port", str(port))))
        assert "it is taken" in said
        # without our launcher process 0 says it
        alone = [*MPIRUN, "-x", f"JAXINFER_COORDINATOR=127.0.0.1:{port}", "-n", "2", sys.executable]
        assert "it is taken" in said_at_once(alone)
    assert "has started 2 processes, JAXINFER_PROCESSES says 4" in said_at_once(
        launch("--nproc", "2", "--backend", "mpi"), {"JAXINFER_PROCESSES": "4"}
    )
    assert "'no-such-host.invalid' has no address here" in said_at_once(
        launch("--hosts", "no-such-host.invalid:1,localhost:1", "--backend", "mpi")
    )


# who went: by our launcher, and by what the others say of it where mpirun or srun starts them
FIRST = {
    signal.SIGKILL: r"rank 2 \(on localhost\) was the first of 4 to fail: .*(killed by SIGKILL|Killed)",
    signal.SIGSTOP: r"rank 2 \(on localhost\) was the first of 4 to fail: the others did not hear of it for 10 s",
}
OF_OTHERS = {signal.SIGSTOP: r"stopped sending heartbeats\):\s+(0: )?2\n"}
SIGNALS = pytest.mark.parametrize("number", FIRST, ids=lambda number: number.name)


@SIGNALS
def test_a_rank_of_open_mpi_that_goes(tiny, number):
    need("mpirun")
    assert re.search(FIRST[number], one_goes(launch("--nproc", "4", "--backend", "mpi"), tiny.folder, number).stderr)
    said = one_goes([*MPIRUN, "-n", "4", sys.executable], tiny.folder, number).stderr
    assert re.search(OF_OTHERS.get(number, r"process rank 2 with PID \d+ on node \S+ exited on\s+signal 9"), said), said


# --- Slurm

SLURM = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """A cluster of this machine with two CPUs, as the variables that lead to it."""
    munged, slurmctld, slurmd, *_ = need("munged", "slurmctld", "slurmd", "srun", "sinfo")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    names = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "munged.seed",
    }
    ports = (free_port(), free_port())
    (folder / "slurm.conf").write_text(SLURM.format(host=socket.gethostname().partition(".")[0], ports=ports, folder=folder))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    files = [f"--{name}={folder / file}" for name, file in names.items()]
    commands = [[munged, "--foreground", "--force", *files], [slurmctld, "-D"], [slurmd, "-D"]]
    servers = []
    try:
        for command in commands:
            with (folder / f"{Path(command[0]).name}.out").open("w") as log:
                servers.append(subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log))
            time.sleep(1)
        until = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo", "-h"], env=os.environ | env, capture_output=True, text=True).stdout:
            if time.monotonic() > until:
                pytest.skip(f"Slurm does not start on this machine: {(folder / 'slurmd.out').read_text()[-1000:]}")
            time.sleep(0.5)
        yield env
    finally:
        for server in reversed(servers):
            server.terminate()
            server.wait(20)


def test_slurm(check, slurm, tmp_path):
    check(["srun", "-K", "-n", "2", sys.executable], slurm)
    check(launch("--nproc", "2", "--backend", "slurm"), slurm)
    said = blamed(launch("--nproc", "2", "--backend", "slurm"), tmp_path, slurm)
    assert "rank 1 (on localhost) was the first of 2 to fail: Exited with exit code 3" in said
    assert "Slurm cannot start 99 ranks: allocation failure" in said_at_once(
        launch("--nproc", "99", "--backend", "slurm"), slurm
    )
    with listen(0) as server:
        port = server.getsockname()[1]
        here = socket.gethostname().partition(".")[0]
        said = said_at_once(launch("--hosts", f"{here}:2", "--backend", "slurm", "--port", str(port)), slurm)
        assert f"port {port} of" in said and "it is taken" in said
    differs = said_at_once(launch("--nproc", "2", "--backend", "slurm"), slurm | {"JAXINFER_PROCESSES": "4"})
    assert "Slurm has started 2 processes, JAXINFER_PROCESSES says 4" in differs


@SIGNALS
def test_a_rank_of_slurm_that_goes(slurm, tiny, number):
    """Four tasks on two CPUs."""
    env = slurm | {"SLURM_OVERCOMMIT": "1"}
    assert re.search(FIRST[number], one_goes(launch("--nproc", "4", "--backend", "slurm"), tiny.folder, number, env).stderr)
    said = one_goes(["srun", "-K", "-n", "4", sys.executable], tiny.folder, number, env).stderr
    assert re.search(OF_OTHERS.get(number, r"error: \S+: task 2: Killed"), said), said


# --- ssh


@pytest.fixture
def ssh(tmp_path) -> Iterator[str]:
    """A command that reaches this machine by ssh, for a key of its own."""
    sshd, keygen, _ = need("sshd", "ssh-keygen", "ssh")
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "key"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    port = free_port()
    options = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "key.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": tmp_path / "pid",
    }
    (tmp_path / "conf").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    server = subprocess.Popen([sshd, "-D", "-f", str(tmp_path / "conf")])
    time.sleep(1)
    try:
        yield f"ssh -p {port} -i {tmp_path / 'key'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    finally:
        server.terminate()
        server.wait(20)


def test_ssh(check, ssh, tmp_path):
    options = ["--hosts", "localhost:1,127.0.0.1:1", "--backend", "ssh", "--ssh", ssh]
    check(launch(*options))
    assert (
        "rank 1 (pid " in (said := blamed(launch(*options), tmp_path, {}))
        and "on 127.0.0.1) was the first of 2 to fail: exit status 3" in said
    )
    began = time.monotonic()
    done = subprocess.run(
        [*launch("--hosts", "localhost:1,192.0.2.7:1", "--backend", "ssh", "--ssh", ssh), __file__],
        env=os.environ | ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "host 192.0.2.7" in done.stderr and time.monotonic() - began < 15


@SIGNALS
def test_a_rank_over_ssh_that_goes(ssh, tiny, number):
    command = launch("--hosts", "localhost:2,127.0.0.1:2", "--backend", "ssh", "--ssh", ssh)
    done = one_goes(command, tiny.folder, number)
    how = {signal.SIGKILL: "killed by SIGKILL", signal.SIGSTOP: "it was stopped"}[number]
    assert re.search(rf"rank 2 \(pid \d+ on 127.0.0.1\) was the first of 4 to fail: {how}", done.stderr), done.stderr
    assert done.returncode == 128 + number
