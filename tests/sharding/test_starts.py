"""Starts that cannot be, with real processes and their real patience: what is wrong is said within ten seconds."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sharding.network import free_port, listen

ROOT = Path(__file__).parents[2]
SECONDS = 10
# the time that an import takes is not the start's
JOIN = "import jax\nprint('begins', flush=True)\nfrom sharding import distributed\ndistributed.start()\n"


class Process:
    """A process of a run, and when it said what on stderr, counted from the moment at which it began to join."""

    def __init__(
        self, number: int, count: int, coordinator: str, *, before: tuple[str, ...] = (), program: str = JOIN, **env: str
    ):
        own = {"JAXINFER_PROCESSES": str(count), "JAXINFER_PROCESS": str(number), "JAXINFER_COORDINATOR": coordinator}
        own |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "TF_CPP_MIN_LOG_LEVEL": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([*before, sys.executable, "-c", program], env=os.environ | own | env, **pipes)
        self.began, self.said = 0.0, list[tuple[float, str]]()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout and self.process.stderr
        assert self.process.stdout.readline() == "begins\n"
        self.began = time.monotonic()
        for line in self.process.stderr:
            self.said.append((time.monotonic() - self.began, line))

    def says(self, pattern: str) -> bool:
        """Whether such a line comes in time."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            found = [seconds for seconds, line in list(self.said) if re.search(pattern, line)]
            if found:
                return found[0] < SECONDS
            if not self._reader.is_alive() or (self.began and time.monotonic() - self.began > SECONDS):
                return False
            time.sleep(0.05)
        return False

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5.0)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe
            pipe.close()


@pytest.mark.slow
def test_what_is_wrong_is_said_in_time():
    """All at once: nobody at the coordinator's port, a process that does not come, a port that is taken, counts that differ, a number
    that is there twice, a coordinator's name that has no address."""
    with contextlib.ExitStack() as open_:

        def start(*arguments: Any) -> Process:
            return open_.enter_context(Process(*arguments))

        local = lambda: f"127.0.0.1:{free_port()}"
        taken = open_.enter_context(listen(0)).getsockname()[1]
        counts, twice = local(), local()
        due = [
            (
                start(1, 2, local()),
                r"process 1 of 2 waits for the coordinator, process 0, at 127.0.0.1 port \d+: Connection refused",
            ),
            (start(0, 3, local()), "process 0 of 3 waits for processes 1, 2"),
            (start(0, 2, f"127.0.0.1:{taken}"), f"cannot listen on port {taken} of .*: it is taken"),
            (start(0, 2, counts), "was told of 3 processes, process 0 of 2"),
            (start(1, 3, counts), "was told of 3 processes, process 0 of 2"),
            (start(0, 3, twice), "process 1 on .* is there twice"),
            (start(1, 3, twice), "process 1 on .* is there twice"),
            (start(1, 3, twice), "process 1 on .* is there twice"),
            (start(1, 2, "no-such-host.invalid:5"), "no-such-host.invalid"),
        ]
        for process, pattern in due:
            assert process.says(pattern), (pattern, process.said)


# --- two hosts of one machine, each with its own name and its own /etc/hosts


HOSTS = ("nodea", "nodeb")
ADDRESSES = ("10.81.0.1", "10.81.0.2")


@contextlib.contextmanager
def two_hosts(folder: Path, names: Mapping[str, str]) -> Iterator[list[tuple[str, ...]]]:
    """For each of two network namespaces that are joined by a link the words before a command that let it run there, under the host's name.
    names: of each host, what its /etc/hosts says."""
    spaces, links = ([f"{kind}{os.getpid()}{end}" for end in "ab"] for kind in ("host", "l"))
    run = lambda *words: subprocess.run(words, check=True, capture_output=True, text=True)
    try:
        try:
            for space in spaces:
                run("ip", "netns", "add", space)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
        run("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        before = []
        for space, link, address, host in zip(spaces, links, ADDRESSES, HOSTS, strict=True):
            run("ip", "link", "set", link, "netns", space)
            run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", link)
            for each in (link, "lo"):
                run("ip", "-n", space, "link", "set", each, "up")
            (folder / host).write_text(f"127.0.0.1 localhost\n{names[host]}\n")
            own = f'hostname {host}; mount --bind {folder / host} /etc/hosts; exec "$@"'
            before.append(("ip", "netns", "exec", space, "unshare", "-m", "-u", "sh", "-c", own, "sh"))
        yield before
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


SUMS = JOIN + (
    "import os, sys\nimport jax.numpy as jnp\nfrom jax.sharding import PartitionSpec as P\n"
    "mesh = jax.make_mesh((2,), ('hosts',))\n"
    "total = jax.jit(jax.shard_map(lambda: jax.lax.psum(jnp.float32(1 + jax.lax.axis_index('hosts')), 'hosts'), mesh=mesh,"
    " in_specs=(), out_specs=P()))()\n"
    "print('sum', int(total), 'over', os.environ.get('NCCL_SOCKET_IFNAME'), file=sys.stderr, flush=True)\n"
)


@pytest.mark.slow
@pytest.mark.root
def test_a_host_name_that_leads_to_loopback(tmp_path):
    """As on Debian, where /etc/hosts gives the own name 127.0.1.1. It does no harm to a host itself, which announces another address; where
    none can be found, and where another host has it, that is said."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare"))):
        pytest.skip("needs root, ip and unshare")
    names = {"nodea": f"127.0.1.1 nodea\n{ADDRESSES[1]} nodeb", "nodeb": f"127.0.1.1 nodeb\n{ADDRESSES[0]} nodea"}
    with two_hosts(tmp_path, names) as (first, second), contextlib.ExitStack() as open_:

        def start(number: int, port: int, before: tuple[str, ...], **env: str) -> Process:
            program = Process(number, 2, f"nodea:{port}", before=before, program=SUMS, **env)
            return open_.enter_context(program)

        # the interface by the way to the other host, and as it is given
        found = [start(0, 5501, first, JAXINFER_INTERFACE=f"l{os.getpid()}a"), start(1, 5501, second)]
        for process, link in zip(found, "ab", strict=True):
            assert process.says(rf"^sum 3 over l{os.getpid()}{link}$"), process.said
        # without a default route nobody knows which of its addresses the other host reaches
        found = [start(0, 5502, first), start(1, 5502, second)]
        assert found[0].says("leads to 127.0.1.1 on this host, .* give the interface that the hosts share"), found[0].said
    names["nodeb"] = "127.0.1.1 nodea nodeb"
    with two_hosts(tmp_path, names) as (first, second), Process(1, 2, "nodea:5503", before=second) as lost:
        assert lost.says("nodea leads to 127.0.1.1 here, which is this host itself"), lost.said
