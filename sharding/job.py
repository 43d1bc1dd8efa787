"""What `jaxinfer launch` is asked to run: the command, how many ranks, on which hosts. Imports no jax."""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sharding.distributed import HEARTBEAT, PATIENCE, PREFIX
from sharding.errors import LaunchError

BACKENDS = ("local", "ssh", "mpi", "slurm")


@dataclasses.dataclass(frozen=True)
class Host:
    """A host, and how many ranks it takes; None: as many as the others."""

    name: str
    slots: int | None = None


def parse_hosts(text: str) -> list[Host]:
    """Of "a,b:4". Raises LaunchError."""
    hosts = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([\w.-]+|\[[\w:%.]+\])(?::(\d+))?\s*", part)
        if found is None or found[2] == "0":
            raise LaunchError(
                f"--hosts has {part.strip()!r}; give names or addresses, each with :N for N ranks, such as a:4,b:4"
            )
        hosts.append(Host(found[1].strip("[]"), int(found[2]) if found[2] else None))
    return hosts


def read_hostfile(path: Path) -> list[Host]:
    """One host a line, `name` or `name slots=4`; # begins a remark. Raises LaunchError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise LaunchError(f"the host file {path} cannot be read: {error.strerror}") from error
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([1-9]\d*)", words[1]) if len(words) == 2 else None
        if len(words) > 2 or (len(words) == 2 and slots is None):
            raise LaunchError(f"line {number} of {path} is {line.strip()!r}; write a host name, or a name and slots=4")
        hosts.append(Host(words[0], int(slots[1]) if slots else None))
    if not hosts:
        raise LaunchError(f"the host file {path} names no host")
    return hosts


def assign(hosts: Sequence[Host], ranks: int | None) -> list[str]:
    """The host of every rank, neighbours together. ranks: None for as many as the hosts have slots, one where nothing is said of them.

    Raises LaunchError for a number that does not fit.
    """
    known = [host.slots for host in hosts]
    if ranks is None:
        return [host.name for host in hosts for _ in range(host.slots or 1)]
    if None in known:
        rest = ranks - sum(n for n in known if n)
        each, odd = divmod(rest, known.count(None))
        if odd or each < 1:
            raise LaunchError(
                f"{ranks} ranks are not spread evenly over {len(hosts)} hosts; say how many each takes, as a:3,b:1 or slots=3"
            )
        known = [n or each for n in known]
    places = [host.name for host, n in zip(hosts, known, strict=True) for _ in range(n or 0)]
    if len(places) < ranks:
        raise LaunchError(f"{ranks} ranks for {len(places)} slots on {len(hosts)} hosts; start fewer, or raise the slots")
    return places[:ranks]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to run, and how.

    command: of one rank. ranks: how many, None for as many as the hosts take. hosts: none for this one. backend: None for ssh where other
    hosts are given, else local. port: of the coordinator, None for a free one. interface: of the network between hosts, None to go by the
    routes. heartbeat: seconds after which a rank that is not heard of ends the others. patience: seconds until all must have started.
    tagged: stdout of every rank goes to stdout, each line with its number. env: variables of every rank. ssh: the command that reaches a
    host. Raises LaunchError.
    """

    command: Sequence[str]
    ranks: int | None = None
    hosts: Sequence[Host] = ()
    backend: str | None = None
    port: int | None = None
    interface: str | None = None
    heartbeat: int = HEARTBEAT
    patience: int = PATIENCE
    tagged: bool = False
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ssh: Sequence[str] = ("ssh",)

    def __post_init__(self):
        if self.backend not in (None, *BACKENDS):
            raise LaunchError(f"the backend is {self.backend!r}; choose one of {', '.join(BACKENDS)}")
        if self.ranks is not None and self.ranks < 1:
            raise LaunchError(f"{self.ranks} ranks; start at least 1")
        if self.ranks is None and not self.hosts:
            raise LaunchError("give the number of ranks with --nproc, or hosts with --hosts or --hostfile")
        if self.port is not None and not 0 < self.port < 65536:
            raise LaunchError(f"the port is {self.port}; give one from 1 to 65535")
        if self.heartbeat < 1 or self.patience < 1:
            raise LaunchError(f"heartbeat is {self.heartbeat} s, patience {self.patience} s; give at least 1")

    @property
    def settings(self) -> dict[str, str]:
        """Variables that every rank gets."""
        own = {f"{PREFIX}HEARTBEAT": str(self.heartbeat), f"{PREFIX}PATIENCE": str(self.patience)}
        if self.interface is not None:
            own[f"{PREFIX}INTERFACE"] = self.interface
        return {**self.env, **own}

    def agent_command(self, host: str) -> list[str]:
        """What runs sharding.agent on a host, with this Python at the same place there."""
        root = Path(__file__).resolve().parents[1]
        path = [] if "site-packages" in root.parts else [str(root)]
        path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        variables = [f"PYTHONPATH={os.pathsep.join(path)}"] if path else []
        remote = shlex.join(["env", *variables, sys.executable, "-m", "sharding.agent"])
        # no questions, and a connection that has broken is noticed
        options = {"BatchMode": "yes", "ConnectTimeout": "5", "ServerAliveInterval": "5", "ServerAliveCountMax": "2"}
        flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return [*self.ssh, *flags, host, f"exec {remote}"]
