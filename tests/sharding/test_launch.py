"""The launcher: what it starts, what it prints, which rank it blames; with programs that need no jax."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sharding.errors import LaunchError
from sharding.job import Host, Job, assign, parse_hosts, read_hostfile
from sharding.launch import coordinator_host, launch
from sharding.network import free_port, listen

ROOT = Path(__file__).parents[2]


# the launching parent knows no jax; where other tests of this process have imported it, it warns of every fork
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


@pytest.fixture
def start(tmp_path):
    """start(source, *options): `jaxinfer launch` of a program, with its output in pipes."""

    def run(source: str, *options: str) -> subprocess.Popen[str]:
        script = tmp_path / "program.py"
        script.write_text(
            "import os, signal, sys, time\nrank = int(os.environ['JAXINFER_PROCESS'])\n" + textwrap.dedent(source)
        )
        command = [sys.executable, "-m", "jaxinfer", "launch", *options, str(script), "an argument"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return run


def test_output(start):
    """Stdout is that of rank 0 and nothing else, byte for byte; the rest has a rank's number before it."""
    run = start(
        """
        print("out", rank, sys.argv[1], end="")
        print("error", rank, file=sys.stderr)
        if rank == 0: print(sys.stdin.read(), end="")
        """,
        "--nproc",
        "3",
    )
    out, error = run.communicate(" from stdin", timeout=30)
    assert run.returncode == 0 and out == "out 0 an argument from stdin"
    lines = ["[0] error 0", "[1] error 1", "[1] out 1 an argument", "[2] error 2", "[2] out 2 an argument"]
    assert sorted(error.splitlines()) == lines


def test_tagged_output(start):
    out, _ = start("print(rank)", "--nproc", "2", "--tag").communicate(timeout=30)
    assert sorted(out.splitlines()) == ["[0] 0", "[1] 1"]


def test_the_first_rank_that_fails_is_named_and_the_others_end(start):
    run = start(
        """
        print("pid", os.getpid(), flush=True)
        if rank == 1: sys.exit("what went wrong")
        time.sleep(60)
        """,
        "--nproc",
        "3",
    )
    out, error = run.communicate(timeout=50)
    assert run.returncode == 1
    assert "was the first of 3 to fail: exit status 1" in error and "\n  | what went wrong" in error and "rank 1 (pid " in error
    assert not Path(f"/proc/{out.split()[1]}").exists()


def test_a_rank_that_ends_because_of_another_one_is_not_blamed(start):
    """Who notices a killed peer may be seen to end before it."""
    run = start(
        """
        ready = os.path.join(os.path.dirname(__file__), "ready")
        if rank == 0:
            while not os.path.exists(ready): time.sleep(0.01)
            print("Connection closed by peer", flush=True)
            os._exit(1)
        open(ready, "w").close()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        "--nproc",
        "2",
    )
    _, error = run.communicate(timeout=30)
    assert run.returncode == 137 and "rank 1 (pid" in error and "killed by SIGKILL" in error, error


def test_a_rank_that_is_stopped(start):
    run = start("if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)", "--nproc", "2", "--heartbeat", "1")
    _, error = run.communicate(timeout=30)
    assert run.returncode == 128 + signal.SIGSTOP and "rank 1 (pid" in error and "stopped by a signal" in error


def test_signals_are_forwarded(start):
    run = start(
        """
        def end(number, frame):
            print("got", number, flush=True)
            sys.exit(0)
        signal.signal(signal.SIGINT, end)
        print("ready", flush=True)
        time.sleep(60)
        """,
        "--nproc",
        "2",
    )
    assert run.stdout and run.stdout.readline() == "ready\n"
    time.sleep(0.5)  # the other one, too
    run.send_signal(signal.SIGINT)
    out, error = run.communicate(timeout=30)
    assert out == "got 2\n" and "[1] got 2" in error and run.returncode == 130 and "ended by SIGINT" in error


def test_ranks_end_with_a_launcher_that_is_killed(start):
    run = start("print(os.getpid(), flush=True)\ntime.sleep(60)", "--nproc", "1")
    assert run.stdout
    rank = Path(f"/proc/{int(run.stdout.readline())}")
    run.kill()
    run.communicate()
    until = time.monotonic() + 5
    while rank.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not rank.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nproc", "2", "--port", "{taken}"], "port {taken} of .*taken.*--port"),
        (["--nproc", "3", "--hosts", "localhost:2"], "3 ranks for 2 slots on 1 hosts"),
        (["--nproc", "3", "--hosts", "localhost,127.0.0.1"], "3 ranks are not spread evenly over 2 hosts"),
        (["--nproc", "0"], "0 ranks; start at least 1"),
        (["--hosts", "no-such-host.invalid"], "'no-such-host.invalid' has no address here"),
        (["--hosts", "a b"], "--hosts has 'a b'"),
        (["--hostfile", "/no/such/file"], "host file /no/such/file cannot be read"),
        (["--hosts", "192.0.2.7", "--backend", "local"], "192.0.2.7 is another host.*choose ssh"),
        (["--hosts", "localhost", "--ssh", "/no/such/ssh", "--backend", "ssh"], "/no/such/ssh cannot be started"),
        (["--hosts", "localhost", "--ssh", "false", "--backend", "ssh"], "host localhost: false ended with status 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_started_is_said_at_once(start, options, words):
    began = time.monotonic()
    with listen(0) as server:
        taken = str(server.getsockname()[1])
        run = start("", *(option.replace("{taken}", taken) for option in options))
        out, error = run.communicate(timeout=30)
    assert run.returncode == 1 and out == "" and time.monotonic() - began < 10
    assert re.search(words.replace("{taken}", taken), error), error


def test_hosts(tmp_path):
    assert parse_hosts("a, b:3,[::1]:2") == [Host("a"), Host("b", 3), Host("::1", 2)]
    file = tmp_path / "hosts"
    file.write_text("# of the lab\na slots=2\n\nb  # the other\n")
    assert read_hostfile(file) == [Host("a", 2), Host("b")]
    file.write_text("a slots=two\n")
    with pytest.raises(LaunchError, match=r"line 1 of .* is 'a slots=two'"):
        read_hostfile(file)
    assert assign([Host("a"), Host("b")], 4) == ["a", "a", "b", "b"]
    assert assign([Host("a", 1), Host("b")], 3) == ["a", "b", "b"]
    assert assign([Host("a", 2), Host("b", 2)], 3) == ["a", "a", "b"]
    assert assign([Host("a", 2), Host("b")], None) == ["a", "a", "b"]


def test_a_first_host_that_leads_to_loopback():
    """Its address in the network is taken, for hosts that are elsewhere; where there is none, that is said."""
    assert coordinator_host(["localhost", "127.0.0.1"]) in ("127.0.0.1", "::1")
    try:
        address = coordinator_host(["localhost", "192.0.2.7"])
    except LaunchError as error:
        assert "localhost leads to" in str(error) and "which 192.0.2.7 cannot reach" in str(error)
    else:
        assert not address.startswith("127.") and address != "::1"


def test_other_launchers_must_be_installed(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for backend, program in (("mpi", "mpirun"), ("slurm", "srun")):
        with pytest.raises(LaunchError, match=f"{program} is not in PATH"):
            launch(Job(command=["true"], ranks=2, backend=backend))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(program, hosts, variables): a launcher that starts sharding.probe on hosts as Open MPI or Slurm does, and nothing else.
    variables: of each process, a format of its number and their count. script: what it does before that."""

    def make(program: str, hosts: int, variables: dict[str, str], script: str = "") -> None:
        rank = " ".join(f'{name}="{value.format(n="$i", of=hosts)}"' for name, value in variables.items())
        lines = [
            "#!/bin/sh",
            '[ "$1" = --version ] && { echo "mpirun (Open MPI) 4.1.4"; exit; }',
            'while [ "$1" != -x ] && [ -n "${1##--export*}" ]; do shift; done',
            'while [ "$1" = -x ]; do export "$2"; shift 2; done',
            '[ -z "${1##--export*}" ] && { for v in $(echo "$1" | tr "," " "); do export "${v##--export=}"; done 2>/dev/null; shift; }',
            'case "$*" in *sharding.probe) ;; *) exit 0 ;; esac',
            script,
            f'pids=; for i in $(seq 0 {hosts - 1}); do env {rank} "$@" & pids="$pids $!"; done',
            # the first that fails ends the others, as both launchers do
            "for pid in $pids; do wait $pid || { kill $pids; exit 1; }; done 2>/dev/null",
        ]
        path = tmp_path / program
        path.write_text("\n".join(lines))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


MPI = {"OMPI_COMM_WORLD_SIZE": "{of}", "OMPI_COMM_WORLD_RANK": "{n}"}
MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
NODES = {"SLURM_STEP_NUM_TASKS": "{of}", "SLURM_PROCID": "{n}", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "{of}"}
NODES |= {"SLURM_STEP_NODELIST": "localhost,127.0.0.1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "{n}"}
HOSTS = [Host("localhost", 1), Host("127.0.0.1", 1)]


@pytest.mark.parametrize(
    ("backend", "program", "variables"), [("mpi", "mpirun", MPI), pytest.param("slurm", "srun", NODES, marks=pytest.mark.slow)]
)
def test_hosts_of_other_launchers_meet_before_the_start(stand_in, monkeypatch, backend, program, variables):
    """A message before anything is started: a port that is taken, a coordinator that does not come, another count."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("sharding.launch.PROBE_SECONDS", 60.0)  # also on a machine whose cores are busy
    # another host's port cannot be looked at from here; there process 0 says it
    monkeypatch.setattr("sharding.launch.is_local", lambda name: False)
    monkeypatch.setattr("sharding.launch.coordinator_host", lambda places: "127.0.0.1")
    job = Job(command=["true"], hosts=HOSTS, backend=backend, port=free_port())
    stand_in(program, 2, variables)
    assert launch(job) == 0
    with listen(0) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"cannot listen on port {port} of .*: it is taken"):
            launch(dataclasses.replace(job, port=port))
    absent = {name: value.replace("{n}", "$((i + 1))").replace("{of}", "3") for name, value in variables.items()}
    stand_in(program, 2, absent)
    with pytest.raises(LaunchError, match=r"process \d of 3 found no coordinator, process 0, at 127.0.0.1 port \d+ within 4 s"):
        launch(job)
    stand_in(program, 2, {**variables, "JAXINFER_PROCESSES": "5"})
    with pytest.raises(LaunchError, match="has started 2 processes, JAXINFER_PROCESSES says 5"):
        launch(job)
    stand_in(program, 2, variables, script="echo what went wrong; exit 9")
    with pytest.raises(LaunchError, match=f"{program} ended with status 9: what went wrong"):
        launch(job)


def test_ports_of_other_launchers(stand_in):
    stand_in("mpirun", 1, {})
    with listen(0) as server, pytest.raises(LaunchError, match="it is taken"):
        launch(Job(command=["true"], ranks=2, backend="mpi", port=server.getsockname()[1]))
    stand_in("srun", 1, {})
    with pytest.raises(LaunchError, match="nobody knows whose port 77 is"):
        launch(Job(command=["true"], ranks=2, backend="slurm", port=77))


def test_more_ranks_than_slurm_has_room_for(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    script = tmp_path / "srun"
    script.write_text(
        '#!/bin/sh\n[ "$1 $2 $3" = "--test-only -n 99" ] && { echo "allocation failure: not available" >&2; exit 1; }\nexit 0\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(LaunchError, match="Slurm cannot start 99 ranks: allocation failure: not available; start as many"):
        launch(Job(command=["true"], ranks=99, backend="slurm"))
    assert launch(Job(command=["true"], ranks=2, backend="slurm")) == 0


def test_a_port_is_free():
    listen(free_port()).close()


NOTICED = "noticed that process rank 1 with PID 5 on node a exited on"
UNHEARD = (
    "E1201 10:47:12.1 7 coordination_service.cc:1518] [1] {}: The following tasks are unhealthy (stopped sending heartbeats):"
)
SAID = [
    ("mpirun", [f"mpirun {NOTICED} signal 9 (Killed)."], r"rank 1 \(on localhost\) .*killed by SIGKILL"),
    ("mpirun", [f"prterun {NOTICED}", "signal 9 (Killed)."], "rank 1 .*killed by SIGKILL"),
    ("mpirun", ["  Process name: [[26803,1],1]", "  Exit code:    3"], "rank 1 .*exit status 3"),
    ("mpirun", ["   Process name: [prterun-a-32492@1,0]", "   Exit code:    3"], "rank 0 .*exit status 3"),
    ("srun", ["srun: error: a: task 1: Killed"], "rank 1 .*Killed"),
    (
        "srun",
        [
            "1: Connection closed by peer",
            "srun: error: a: tasks 1,3: Exited with exit code 1",
            "srun: error: a: task 0: Aborted",
        ],
        "rank 0 .*Aborted",
    ),
    (
        "srun",
        [
            f"0: {UNHEARD}",
            "0: 2",
            "0: The tasks have crashed.",
            "srun: error: a: tasks 0-1,3: Aborted",
            "srun: error: a: task 2: Killed",
        ],
        "rank 2 .*the others did not hear of it for 10 s",
    ),
    (
        "mpirun",
        [f"[1,1]<stderr>: {UNHEARD}", "[1,1]<stderr>: 3", f"prterun {NOTICED}", "signal 6 (Aborted)."],
        "rank 3 .*the others did not hear of it for 10 s",
    ),
    ("srun", ["2: it went wrong"], "a rank, which one is not said"),
    (
        "srun",
        ["srun: error: Unable to allocate resources"],
        r"srun failed before any of 4 ranks .* 1, (.|\n)*\| srun: error: Unable",
    ),
]


@pytest.mark.parametrize(("program", "lines", "who"), SAID, ids=[str(i) for i in range(len(SAID))])
def test_what_other_launchers_say_of_a_failure(tmp_path, monkeypatch, capfd, program, lines, who):
    """A stand-in for the launcher prints these lines and fails."""
    script = tmp_path / program
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo "mpirun (Open MPI) 5.0.11"; exit; }\n[ "$1" = --test-only ] && exit\n'
    )
    with script.open("a") as file:
        file.writelines(f"echo '{line}' >&2\n" for line in lines)
        file.write("exit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    backend = {"mpirun": "mpi", "srun": "slurm"}[program]
    assert launch(Job(command=["true"], hosts=[Host("localhost", 4)], backend=backend)) == 1
    assert re.search(who, capfd.readouterr().err)


def test_tags_of_open_mpi_5_are_taken_off(tmp_path, monkeypatch, capfdbinary):
    script = tmp_path / "mpirun"
    version = '[ "$1" = --version ] && { echo "mpirun (Open MPI) 5.0.11"; exit; }'
    script.write_text(f'#!/bin/sh\n{version}\necho "[1,1]<stdout>:   b"; echo "[1,0]<stdout>: a"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launch(Job(command=["true"], ranks=2, backend="mpi")) == 0
    out, err = capfdbinary.readouterr()
    assert out == b"a\n" and err == b"[1]   b\n"
