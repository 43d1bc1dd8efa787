"""Looks after the processes of a run: what they print, which one fails first, and that the others end. Imports no jax.

Stdout is that of rank 0, byte for byte; everything else goes to stderr, a rank's number before each line. When a rank fails, the first one
is named with its status and last lines, and the others are ended.
"""

import collections
import contextlib
import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from sharding import agent
from sharding.distributed import PREFIX
from sharding.errors import LaunchError
from sharding.job import Job

TAIL = 12  # lines of a rank that failed
LONGEST = 1 << 16  # bytes of an unfinished line that are kept
LINGER = 1.0  # seconds that the others have to say something, once one has failed
INTERRUPT_SECONDS = 5.0  # that ranks have to end by themselves after Ctrl-C
PASSED_ON = ("JAX_", "XLA_", "NCCL_", "HF_", "TF_CPP_", PREFIX)  # variables that ranks on other hosts get


@dataclasses.dataclass
class _Rank:
    """What is known of a rank. process: here, or the ssh that holds it. stopped: since when. aborted: jax ends it because of others. lists:
    its next lines are the numbers of ranks that it does not hear of."""

    index: int
    host: str
    process: subprocess.Popen | None = None
    remote: bool = False
    pid: int | None = None
    status: int | None = None
    stopped: float | None = None
    aborted: bool = False
    lists: bool = False
    tail: collections.deque[str] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=TAIL))

    @property
    def is_victim(self) -> bool:
        """Whether it ended because of another one."""
        return self.aborted or any(_VICTIM.search(line) for line in self.tail)

    @property
    def name(self) -> str:
        where = f"pid {self.pid} on {self.host}" if self.pid else f"on {self.host}"
        return f"rank {self.index} ({where})"

    def look(self) -> None:
        """Since when it is stopped, where the launcher sees it itself."""
        if self.remote or self.pid is None or self.status is not None:
            return
        self.stopped = (self.stopped or time.monotonic()) if agent.is_stopped(self.pid) else None


def _how(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"


# what mpirun and srun say of the rank that failed: its number, and how
_MPIRUN = re.compile(r"noticed that process rank (\d+) with PID \d+ on node \S+ exited on(?: signal)?")
_MPIRUN_NAME = re.compile(r"Process name: \[.*,\s?(\d+)\]")
_MPIRUN_STATUS = re.compile(r"(?:Exit code:\s+(\d+)|signal (\d+) \()")
_SRUN = re.compile(r"error: \S+: tasks? (\d+)[\d,-]*: (.*)")
# "[1,0]<stdout>:" in version 4, also where a program writes a line piece by piece; "[1,0]<stdout>: " in version 5
_TAGGED = re.compile(rb"\[\d+,(\d+)\]<(stdout|stderr)>:")
_LABELLED = re.compile(rb"^ *(\d+): ")
# what jax's coordination service prints when it ends a process because of another one: a page, of which the first line says it all
_ABORTED = re.compile(r"[EF]\d{4} \S+ +\d+ (?:coordination_service|client\.h)")
# what a process says that fails because another one has gone
_VICTIM = re.compile(r"Connection (?:closed|reset) by peer|Gloo \S+ failed|remote process exited|another task died")
# tasks that are not heard of: in the line that says so, or one in each of the lines after it
_UNHEARD, _LISTED = re.compile(r"task:(\d+)"), re.compile(r"(?:\S*task:)?(\d+)")
_EARLY = re.compile(r"The first task at the barrier: (\d+)")


class Run:
    """Ranks that run. Threads read what they print and wait for their ends; the main thread decides."""

    def __init__(self, job: Job, places: Sequence[str]):
        self.job, self.ranks = job, [_Rank(i, host) for i, host in enumerate(places)]
        self.began = time.monotonic()
        self._events: queue.SimpleQueue[tuple[_Rank | None, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the two streams, so that lines stay whole
        self._pumps: list[threading.Thread] = []
        self._other: subprocess.Popen | None = None  # mpirun or srun
        self._spaced, self._program = False, ""
        self._own_lines: collections.deque[str] = collections.deque(maxlen=TAIL)  # of mpirun or srun itself
        self._unheard: list[int] = []  # ranks that others say they do not hear of
        self._early: list[int] = []  # the rank that waited for the others to end
        self._said: list[tuple[int, str]] = []  # what mpirun or srun says of failures: of which rank, and how
        self._failed: list[tuple[_Rank | None, int]] = []  # in their order
        self._signal: int | None = None
        self._no_reader = False

    # starting

    def start_local(self, coordinator: str) -> None:
        for rank in self.ranks:
            env = os.environ | self._identity(rank, coordinator)
            stdin = None if rank.index == 0 else subprocess.DEVNULL
            with self._ended_on_error():
                rank.process = self._popen(self.job.command, env=env, stdin=stdin)
            rank.pid = rank.process.pid
        self._watch()

    def start_ssh(self, coordinator: str) -> None:
        passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        for rank in self.ranks:
            env = passed | self._identity(rank, coordinator)
            if "PYTHONPATH" in os.environ:
                env.setdefault("PYTHONPATH", os.environ["PYTHONPATH"])
            job = {"command": list(self.job.command), "env": env, "cwd": os.getcwd()}
            with self._ended_on_error():
                rank.process, rank.remote = self._popen(self.job.agent_command(rank.host), stdin=subprocess.PIPE), True
            self._tell(rank, json.dumps(job))
        self._watch()

    def start_other(self, command: Sequence[str], *, spaced: bool = False) -> None:
        """With mpirun or srun. spaced: a space follows mpirun's tag."""
        with self._ended_on_error():
            self._other = self._popen(command, env=os.environ | self.job.settings)
        self._spaced, self._program = spaced, command[0]
        label = _TAGGED if command[0] == "mpirun" else _LABELLED
        streams = ((self._other.stdout, True), (self._other.stderr, False))
        for stream, is_out in streams:
            self._thread(self._pump_labelled, stream, is_out, label)
        self._thread(lambda other: self._events.put((None, other.wait())), self._other, pump=False)

    def _identity(self, rank: _Rank, coordinator: str) -> dict[str, str]:
        """Variables that tell a rank who it is."""
        here = [other.index for other in self.ranks if other.host == rank.host]
        own = {
            "COORDINATOR": coordinator,
            "PROCESSES": len(self.ranks),
            "PROCESS": rank.index,
            "LOCAL_PROCESS": here.index(rank.index),
            "LOCAL_PROCESSES": len(here),
        }
        return self.job.settings | {f"{PREFIX}{name}": str(value) for name, value in own.items()}

    def _popen(self, command: Sequence[str], **more: Any) -> subprocess.Popen:
        # a session of its own: Ctrl-C reaches a rank through the launcher alone, and what the rank starts ends with it
        try:
            return subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                **more,
            )
        except OSError as error:
            raise LaunchError(f"{command[0]} cannot be started: {error.strerror}") from error

    @contextlib.contextmanager
    def _ended_on_error(self):
        try:
            yield
        except BaseException:
            self._end()
            raise

    def _watch(self) -> None:
        for rank in self.ranks:
            assert rank.process
            self._thread(self._pump, rank.process.stdout, rank, True)
            self._thread(self._pump, rank.process.stderr, rank, False)
            self._thread(self._await, rank, pump=False)

    def _thread(self, target: Callable, *arguments: Any, pump: bool = True) -> None:
        """pump: it reads its first argument to the end, and closes it."""

        def run() -> None:
            with arguments[0] if pump else contextlib.nullcontext():
                target(*arguments)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        if pump:
            self._pumps.append(thread)

    def _await(self, rank: _Rank) -> None:
        assert rank.process
        status = rank.process.wait()
        if rank.remote and status > 128:
            status = 128 - status  # as the agent gives it
        if rank.status is None:
            rank.status = status
        self._events.put((rank, rank.status))

    # output

    def _write(self, stream: IO[str], data: bytes) -> None:
        with self._lock:
            try:
                stream.buffer.write(data)  # type: ignore[attr-defined]
                stream.flush()
            except (BrokenPipeError, ValueError):
                self._no_reader = self._no_reader or stream is sys.stdout

    def _line(self, rank: _Rank, line: bytes, is_out: bool) -> None:
        text = line.decode(errors="replace").rstrip()
        if rank.remote and not is_out and text.startswith(agent.MARK):
            self._agent_said(rank, json.loads(text.removeprefix(agent.MARK)))
            return
        if "heartbeat" in text:
            self._unheard += [int(n) for n in _UNHEARD.findall(text)]
            rank.lists = text.endswith("heartbeats):")
        elif rank.lists and (found := _LISTED.fullmatch(text)):
            self._unheard.append(int(found[1]))
        else:
            rank.lists = False
        if not self._early and (found := _EARLY.search(text)):
            self._early.append(int(found[1]))
        if rank.aborted:
            return
        rank.aborted = _ABORTED.match(text) is not None
        if text and not rank.aborted:
            rank.tail.append(text)
        to_stdout = is_out and (self.job.tagged or rank.index == 0)
        clean = is_out and rank.index == 0 and not self.job.tagged
        end = b"" if line.endswith(b"\n") or clean else b"\n"
        self._write(sys.stdout if to_stdout else sys.stderr, line if clean else f"[{rank.index}] ".encode() + line + end)

    def _pump(self, stream: IO[bytes], rank: _Rank, is_out: bool) -> None:
        if is_out and rank.index == 0 and not self.job.tagged:
            begun = b""
            while data := os.read(stream.fileno(), 1 << 16):  # as it comes, also without a newline
                *lines, begun = (begun + data).split(b"\n")
                rank.tail.extend(line.decode(errors="replace") for line in lines)
                begun = begun[-LONGEST:]
                self._write(sys.stdout, data)
            if begun:
                rank.tail.append(begun.decode(errors="replace"))
            return
        for line in stream:
            self._line(rank, line, is_out)

    def _pump_labelled(self, stream: IO[bytes], is_out: bool, label: re.Pattern[bytes]) -> None:
        for line in stream:
            found = label.match(line)
            if found is not None and int(found[1]) < len(self.ranks):
                is_tag = found.re is _TAGGED
                kind = found[2] == b"stdout" if is_tag else is_out
                own = _TAGGED.sub(b"", line) if is_tag else line[found.end() :]
                self._line(self.ranks[int(found[1])], own.removeprefix(b" ") if is_tag and self._spaced else own, kind)
                continue
            text = line.decode(errors="replace").rstrip()
            self._other_said(text)
            if text:
                self._own_lines.append(text)
            self._write(sys.stderr, line)

    def _other_said(self, text: str) -> None:
        if found := _MPIRUN.search(text) or _SRUN.search(text):
            self._said.append((int(found[1]), found[2] if found.re is _SRUN else ""))
        elif found := _MPIRUN_NAME.search(text):
            self._said.append((int(found[1]), ""))
        if (found := _MPIRUN_STATUS.search(text)) and self._said and not self._said[-1][1]:
            self._said[-1] = self._said[-1][0], _how(int(found[1]) if found[1] else -int(found[2]))

    def _agent_said(self, rank: _Rank, values: Mapping[str, Any]) -> None:
        rank.pid = values.get("pid", rank.pid)
        if "stopped" in values:
            rank.stopped = time.monotonic() if values["stopped"] else None
        if "ended" in values:
            rank.status = values["ended"]
        if "error" in values:
            rank.tail.append(values["error"])

    # signals

    def _tell(self, rank: _Rank, line: str) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            assert rank.process and rank.process.stdin
            rank.process.stdin.write(line.encode() + b"\n")
            rank.process.stdin.flush()

    def _forward(self, number: int, _frame: Any = None) -> None:
        if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if self._signal is not None:
                self._end(wait=0.0)
            self._signal = number
        for rank in self.ranks:
            if rank.remote:
                self._tell(rank, str(number))
            elif rank.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, number)
        if self._other is not None:
            with contextlib.suppress(ProcessLookupError):
                self._other.send_signal(number)

    def _end(self, wait: float = agent.KILL_AFTER) -> None:
        """End every rank that still runs."""
        running = [r.process for r in self.ranks if r.process is not None and r.process.poll() is None]
        running += [self._other] if self._other is not None and self._other.poll() is None else []
        for rank in self.ranks:
            if rank.remote and rank.process is not None and rank.process.stdin:
                with contextlib.suppress(OSError):
                    rank.process.stdin.close()  # the agent ends its rank
        remote = {rank.process for rank in self.ranks if rank.remote}
        patience = {process: wait + 1.0 if process in remote else wait for process in running}
        threads = [threading.Thread(target=agent.end, args=(p, patience[p])) for p in running if p not in remote]
        for thread in threads:
            thread.start()
        for process in remote & set(running):
            assert process
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience[process])
            process.kill()
        for thread in threads:
            thread.join()

    # the end

    def wait(self) -> int:
        """Until all have ended: the status, see sharding.launch.launch."""
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
        before = {n: signal.signal(n, self._forward) for n in numbers}
        try:
            return self._wait()
        finally:
            self._end()
            for n, handler in before.items():
                signal.signal(n, handler)

    def _wait(self) -> int:
        running = 1 if self._other is not None else len(self.ranks)
        signalled: float | None = None
        while running and not self._failed:
            running -= self._take(0.25)
            now = time.monotonic()
            for rank in self.ranks:
                rank.look()
            if any(r.stopped is not None and now - r.stopped >= self.job.heartbeat for r in self.ranks):
                break
            if self._signal is not None:
                signalled = signalled or now
                if now - signalled > INTERRUPT_SECONDS:
                    break
            if self._no_reader:
                return 128 + signal.SIGPIPE
        until = time.monotonic() + LINGER
        while self._failed and running and time.monotonic() < until:  # let the others say why they end, too
            running -= self._take(0.1)
        stopped = [rank for rank in self.ranks if rank.stopped is not None]
        self._end()
        for pump in self._pumps:
            pump.join(2.0)
        if self._signal is not None:
            print(f"jaxinfer launch: ended by {signal.Signals(self._signal).name}", file=sys.stderr, flush=True)
            return 128 + self._signal
        return self._blame(stopped) if self._failed or stopped else 0

    def _take(self, seconds: float) -> int:
        """Wait for the end of a rank; how many have ended."""
        try:
            rank, status = self._events.get(timeout=seconds)
        except queue.Empty:
            return 0
        if status:
            self._failed.append((rank, status))
        return 1

    def _blame(self, stopped: Sequence[_Rank]) -> int:
        """Say who failed first, how, and what it last said; the status of the launch."""
        seconds = time.monotonic() - self.began
        unheard, early = ([self.ranks[n] for n in found if n < len(self.ranks)] for found in (self._unheard, self._early))
        rank: _Rank | None
        if stopped:  # the others end when they do not hear of it, and so before it
            rank, status, how = stopped[0], -signal.SIGSTOP, "it was stopped by a signal, and the others did not hear of it"
        else:
            # a process that is killed closes its connections before it is gone: who noticed may be seen to end before it
            culprits = [(failed, status) for failed, status in self._failed if failed is not None and not failed.is_victim]
            rank, status = (culprits or self._failed)[0]
            how = _how(status)
            said = [(self.ranks[n], words) for n, words in self._said if n < len(self.ranks)]
            # mpirun and srun end those that are left, and may say so of one that nobody has heard of
            victims = said[0][0].is_victim if said else not culprits
            if victims and unheard:
                rank, how = unheard[0], f"the others did not hear of it for {self.job.heartbeat} s"
            elif rank is None and said:
                rank, words = next((pair for pair in said if not pair[0].is_victim), said[0])
                how = words or how
            elif victims and early:
                rank, how = early[0], "it came to its end while the others had still to work"
        after, tail = f"{how}, {seconds:.1f} s after the start", rank.tail if rank else self._own_lines
        if rank is None and not any(each.tail for each in self.ranks):
            lines = [f"jaxinfer launch: {self._program} failed before any of {len(self.ranks)} ranks said anything: {after}"]
        else:
            who = rank.name if rank else "a rank, which one is not said,"
            lines = [f"jaxinfer launch: {who} was the first of {len(self.ranks)} to fail: {after}"]
        if tail:
            lines += ["its last lines:", *(f"  | {line}" for line in tail)]
        self._write(sys.stderr, "".join(f"{line}\n" for line in lines).encode())
        return status if status >= 0 else 128 - status


def _die_with_parent() -> None:
    """In a rank, before its program: end when the launcher is killed and can no longer end it. Linux only, nothing elsewhere."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _libc() -> Any:
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        return libc if libc.prctl else None
    return None


_LIBC = _libc()  # before any fork
