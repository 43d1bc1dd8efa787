"""All processes of a run meet at the coordinator's port before jax connects them, and learn on which host each one is.

jax ends a process with SIGABRT when a peer is missing or the coordinator cannot be reached; here each of these is a message. Process 0
listens, every other one says who it is, and all get one answer: the hosts, or what is wrong. Then jax takes the port. Imports no jax.

One line of JSON each way: {"process": 1, "processes": 4, "host": "...", "versions": "..."} and {"hosts": [...]} or {"error": "..."}.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import socket
import sys
import time
from pathlib import Path

from sharding.errors import LaunchError
from sharding.network import is_loopback, listen, resolve

PATIENCE = 5.0  # seconds until it is said what is waited for
_HELLO_SECONDS = 2.0  # that a connection may take to say who it is


def host_name() -> str:
    """A name of this host that no other host has: containers share a kernel, and machines may share a name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}"


def versions() -> str:
    """What all processes must have alike."""
    found = ["Python " + ".".join(platform.python_version_tuple()[:2])]
    for name in ("jax", "jaxlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guest:
    """One process that came: its number, the number of processes that it was told of, its host, its versions."""

    process: int
    processes: int
    host: str
    versions: str

    def line(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"


def meet(host: str, port: int, *, process: int, processes: int, timeout: float) -> list[str]:
    """The host of every process, in their order, the same list everywhere.

    host, port: of process 0. timeout: seconds until all must be there; after 5 s it is said on stderr who is waited for. Raises LaunchError
    on every process that could be told: a port that is taken, a process that is missing, there twice, of another count, or of another
    version, or something else that listens there.
    """
    me = Guest(process=process, processes=processes, host=host_name(), versions=versions())
    if process == 0:
        with listen(port, processes) as server:
            return _receive(server, me, timeout)
    return _visit(host, port, me, timeout)


def _receive(server: socket.socket, me: Guest, timeout: float) -> list[str]:
    began, noted = time.monotonic(), False
    guests: dict[int, Guest] = {0: me}
    error: str | None = None
    with contextlib.ExitStack() as open_:
        lines = []
        while error is None and len(guests) < me.processes:
            waited = time.monotonic() - began
            missing = _listed(i for i in range(me.processes) if i not in guests)
            if waited > timeout:
                error = f"{missing} of {me.processes} did not come within {timeout:.0f} s; start as many as were announced"
                break
            if waited > PATIENCE and not noted:
                noted = _note(f"process 0 of {me.processes} waits for {missing}")
            server.settimeout(min(0.5, max(0.01, timeout - waited)))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            open_.enter_context(connection)
            connection.settimeout(_HELLO_SECONDS)
            try:
                guest = Guest(**json.loads(_line(connection)))
            except (OSError, ValueError, TypeError):
                continue  # nobody of ours
            lines.append(connection)
            error = _wrong(guest, me, guests)
            guests[guest.process] = guest
        hosts = [guests[i].host for i in sorted(guests)]
        answer = json.dumps({"error": error} if error else {"hosts": hosts}).encode() + b"\n"
        for connection in lines:
            with contextlib.suppress(OSError):
                connection.sendall(answer)
    if error:
        raise LaunchError(error)
    return hosts


def _wrong(guest: Guest, me: Guest, guests: dict[int, Guest]) -> str | None:
    """What keeps a process from taking part, or None."""
    who = f"process {guest.process} on {guest.host.partition('/')[0]}"
    if guest.processes != me.processes:
        return f"{who} was told of {guest.processes} processes, process 0 of {me.processes}; start all with one count"
    if guest.process in guests:
        other = guests[guest.process].host.partition("/")[0]
        return (
            f"{who} is there twice, also on {other}; give every process a number of its own, or another port to the other run"
        )
    if guest.versions != me.versions:
        return f"{who} has {guest.versions}, process 0 has {me.versions}; install the same versions on every host"
    return None


def _visit(host: str, port: int, me: Guest, timeout: float) -> list[str]:
    began, noted, reason, where = time.monotonic(), False, "", _named(host, port)
    who = f"process {me.process} of {me.processes}"
    while (waited := time.monotonic() - began) <= timeout:
        if waited > PATIENCE and not noted:
            noted = _note(f"{who} waits for the coordinator, process 0, at {where}: {reason or 'others are missing'}")
        try:
            connection = socket.create_connection((host, port), timeout=2)
        except OSError as refused:
            reason = refused.strerror or str(refused)
            time.sleep(0.1)
            continue
        with connection:
            try:
                connection.sendall(me.line())
                # process 0 gives up first, and says who is missing
                connection.settimeout(max(1.0, timeout - waited) + 2)
                answer = json.loads(_line(connection))
                found = answer.get("error"), answer.get("hosts")
            except (OSError, ValueError, AttributeError):
                found = None, None
            error, hosts = found
        if error:
            raise LaunchError(error)
        if hosts:
            return hosts
        reason = "what listens there is not process 0 of this run"
        time.sleep(0.5)  # the port of an earlier run may be on its way out
    raise LaunchError(
        f"{who} found no coordinator, process 0, at {where} within {timeout:.0f} s: {reason}; check that it runs, its host name, and "
        "that no firewall closes the port"
    )


def _named(host: str, port: int) -> str:
    """A coordinator's place, with a word on a name that leads nowhere else: on its own host that is no matter, on another one it is."""
    with contextlib.suppress(LaunchError):
        if is_loopback(address := resolve(host)) and host not in (address, "localhost"):
            hint = f"{host} leads to {address} here, which is this host itself: write its address into DNS or /etc/hosts"
            return f"{host} port {port} ({hint})"
    return f"{host} port {port}"


def _line(connection: socket.socket) -> bytes:
    """Up to a newline, which is not read past."""
    out = b""
    while not out.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more or len(out) > 1 << 24:
            raise ValueError("no line")
        out += more
    return out


def _listed(numbers) -> str:
    shown = list(numbers)
    names = ", ".join(map(str, shown[:8])) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
    return f"process{'es' if len(shown) > 1 else ''} {names}"


def _note(text: str) -> bool:
    print(f"jaxinfer: {text}", file=sys.stderr, flush=True)
    return True
