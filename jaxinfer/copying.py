"""A checkpoint that only process 0 of a run has: it sends every other process the slices that this one keeps, one at a time.

What is sent is what is kept: quantised, cast and cut on process 0. No process has more than a slice of a tensor on its way.
"""

import contextlib
import dataclasses
import os
import secrets
import select
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from convert.readers.base import LazyTensor, PackedFormat, Shard, TokenizerAssets
from jaxinfer.errors import CheckpointCopyError, CheckpointNotFoundError
from jaxinfer.models.config import ModelConfig
from pallas_kernels.qtensor import QTensor
from sharding.distributed import channel, coordinator_host, heartbeat, spans_processes

PATIENCE = 60.0  # seconds until process 0 must have answered
PARTS = ("values", "scales", "zeros", "order", "input_scale")  # of a QTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Understood:
    """A checkpoint as an engine needs it: tensors by module path in the form in which they are kept, none read. path: None where it lies on
    process 0. close: called when what is to be read has been read."""

    tensors: Mapping[str, LazyTensor]
    model: ModelConfig
    assets: TokenizerAssets
    path: Path | None
    close: Callable[[], None] = lambda: None


def understand_together(source: str | Path, mesh: Mesh, understand: Callable[[], Understood]) -> Understood:
    """What `understand` gives, on a process that lacks the path through process 0, where that has it.

    mesh: whose processes all call this. Raises what `understand` raises, CheckpointNotFoundError where process 0 lacks what another has,
    and on reading CheckpointCopyError.
    """
    if not spans_processes(mesh):
        return understand()
    talk = channel("checkpoints")

    def decide(here: list[bool]) -> tuple[int, ...]:
        if not here[0] and any(here):
            raise CheckpointNotFoundError(
                f"{source} is on the host of process {here.index(True)} and not on that of process 0, which would send it to the others; "
                "put it there, or on all hosts"
            )
        return tuple(i for i, found in enumerate(here) if here[0] and not found)

    lacking = talk.exchange(Path(source).expanduser().exists(), decide)
    if not lacking:
        return understand()
    own: list[Understood] = []

    def tell() -> tuple[Any, ...]:
        own.append(understand())
        kinds = {path: (t.name, t.shape, t.dtype, t.packed) for path, t in own[0].tensors.items()}
        numbers = ", ".join(map(str, lacking))
        print(f"jaxinfer: {source} is not on the hosts of processes {numbers}: process 0 sends what they keep", file=sys.stderr)
        return kinds, own[0].model, dataclasses.replace(own[0].assets, folder=None), serve(own[0].tensors, len(lacking))

    kinds, model, assets, (port, key) = talk.from_first(tell)
    if talk.process == 0:
        return own[0]
    if talk.process not in lacking:
        return understand()
    link = _Link(coordinator_host(), port, key, talk.process)
    tensors = {path: _Far(link, path, *kind) for path, kind in kinds.items()}
    return Understood(tensors=tensors, model=model, assets=assets, path=None, close=link.close)


# --- process 0


def serve(tensors: Mapping[str, LazyTensor], clients: int) -> tuple[int, bytes]:
    """Answer requests for shards of tensors until so many clients have come and gone: (port, the key that they must know)."""
    key = secrets.token_bytes(32)
    if socket.has_dualstack_ipv6():
        door = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        door = socket.create_server(("0.0.0.0", 0))
    met: list[Connection] = []

    def meet(link: socket.socket) -> None:
        with contextlib.suppress(EOFError, OSError, AuthenticationError):
            connection = _greeted(link, key, server=True)
            met.append(connection)
            _answer(connection, tensors)

    def admit() -> None:
        door.settimeout(1.0)
        with door:
            while len(met) < clients:
                # whoever else finds the port waits in a thread of its own, and learns nothing without the key
                with contextlib.suppress(TimeoutError):
                    threading.Thread(target=meet, args=(door.accept()[0],), name="jaxinfer copy", daemon=True).start()

    threading.Thread(target=admit, name="jaxinfer copies", daemon=True).start()
    return int(door.getsockname()[1]), key


def _greeted(link: socket.socket, key: bytes, *, server: bool) -> Connection:
    """A connection of two that have shown each other that they know the key."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.settimeout(None)
    connection: Connection = Connection(link.detach())
    for step in (deliver_challenge, answer_challenge) if server else (answer_challenge, deliver_challenge):
        step(connection, key)
    return connection


def _answer(connection: Connection, tensors: Mapping[str, LazyTensor]) -> None:
    sent, process = 0, "?"
    with connection, contextlib.suppress(EOFError, OSError):
        process = connection.recv()
        while True:
            path, units = connection.recv()
            try:
                value = tensors[path].read(units)
            except Exception as error:
                connection.send(error)
                continue
            form = PackedFormat.of(value) if isinstance(value, QTensor) else None
            parts: dict[str, Any] = {"": value}
            if form is not None:
                parts = {name: a for name in PARTS if (a := getattr(value, name)) is not None}
            connection.send((form, {name: (a.shape, a.dtype) for name, a in parts.items()}))
            for a in parts.values():
                left = memoryview(_bytes(np.ascontiguousarray(a)))
                while left:
                    left = left[os.write(connection.fileno(), left) :]
                sent += a.nbytes
    print(f"jaxinfer: sent {sent} bytes of weights to process {process}", file=sys.stderr, flush=True)


def _bytes(array: np.ndarray) -> np.ndarray:
    """The same memory, uint8 [bytes]."""
    return array.reshape(-1).view(np.uint8)


# --- the others


class _Link:
    """The connection to process 0."""

    def __init__(self, host: str, port: int, key: bytes, process: int):
        self._lock = threading.Lock()
        try:
            self._connection = _greeted(socket.create_connection((host, port), timeout=PATIENCE), key, server=False)
            self._connection.send(process)
        except (OSError, EOFError, AuthenticationError) as error:
            raise CheckpointCopyError(
                f"process 0 cannot be reached at {host}, port {port}, from which it sends weights ({error}); open the ports between the "
                "hosts, or put the checkpoint on all of them"
            ) from error

    def read(self, path: str, units: Shard) -> np.ndarray | QTensor:
        with self._lock:
            try:
                self._connection.send((path, units))
                self._wait(path)
                answer = self._connection.recv()
                parts = {}
                if not isinstance(answer, Exception):
                    form, kinds = answer
                    parts = {name: self._array(path, *kind) for name, kind in kinds.items()}
            except (EOFError, OSError) as error:
                raise CheckpointCopyError(
                    f"process 0 has gone while it sent {path}; look at why it ended, and start all processes again"
                ) from error
        if isinstance(answer, Exception):
            raise answer
        return parts[""] if form is None else form.tensor(**parts)

    def _array(self, path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        out = np.empty(shape, dtype)
        left = memoryview(_bytes(out))
        while left:
            self._wait(path)
            if not (count := os.readv(self._connection.fileno(), [left])):
                raise EOFError
            left = left[count:]
        return out

    def _wait(self, path: str) -> None:
        """Until something comes; if not, that is said after half a heartbeat: after a whole one jax ends this process, and names none."""
        here, silence = select.poll(), heartbeat() / 2
        here.register(self._connection.fileno(), select.POLLIN)
        if not here.poll(silence * 1000):
            print(f"jaxinfer: process 0 has sent nothing of {path} for {silence:g} s", file=sys.stderr, flush=True)
            here.poll()

    def close(self) -> None:
        self._connection.close()


class _Far(LazyTensor):
    """A tensor of process 0."""

    def __init__(self, link: _Link, path: str, name: str, shape: tuple[int, ...], dtype: np.dtype, packed: PackedFormat | None):
        self.name, self.shape, self.dtype, self.packed = name, shape, dtype, packed
        self._link, self._path = link, path

    def read(self, units: Shard = None) -> np.ndarray | QTensor:
        return self._link.read(self._path, units)
