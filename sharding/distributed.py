"""The start of a process that is one of several, and what the processes of a run tell each other on the host.

Who started it is read from the environment: `jaxinfer launch`, Slurm's srun, Open MPI 4 and 5, or Kubernetes. All this is variables that a
launcher sets; what a user decides can also be given to `start`.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pickle
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sharding.errors import LaunchError
from sharding.network import interface_of, is_loopback, join_address, own_address, resolve, split_address
from sharding.rendezvous import meet

PREFIX = "JAXINFER_"
HEARTBEAT = 10  # seconds after which a process that is not heard of ends the others
PATIENCE = 120  # seconds until all processes must have started
_PORTS = (61440, 4096)  # the first port above those that Linux gives to clients, and how many there are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """Which process of which run this is.

    launcher: who started it. coordinator: "host:port" of process 0. local_process, local_processes: among those of its host, where the
    launcher says so. one_host: whether all are on one host, None where it is not known. interface: of the network between the hosts.
    heartbeat: seconds after which a process that is not heard of ends the others. patience: seconds until all must have started.
    Raises LaunchError for numbers that do not fit.
    """

    launcher: str
    coordinator: str
    processes: int
    process: int
    local_process: int = 0
    local_processes: int = 1
    one_host: bool | None = None
    interface: str | None = None
    heartbeat: int = HEARTBEAT
    patience: int = PATIENCE

    def __post_init__(self):
        if self.processes < 1 or not 0 <= self.process < self.processes:
            raise LaunchError(
                f"process {self.process} of {self.processes}, says {self.launcher}; processes are numbered from 0 to their number less one"
            )
        if self.heartbeat < 1 or self.patience < 1:
            raise LaunchError(f"heartbeat is {self.heartbeat} s, patience {self.patience} s; give at least 1")
        split_address(self.coordinator)


def detect(environ: Mapping[str, str] | None = None) -> Launch | None:
    """What the environment says about the run that this process belongs to; None where it is alone.

    Variables of our own come first: JAXINFER_PROCESSES, JAXINFER_PROCESS, JAXINFER_COORDINATOR, JAXINFER_INTERFACE, JAXINFER_HEARTBEAT,
    JAXINFER_PATIENCE. Raises LaunchError for values that cannot be, and where the coordinator is not to be found out.
    """
    e = _Environment(os.environ if environ is None else environ)
    for look in (_ours, _open_mpi, _slurm, _kubernetes):
        found = look(e)
        if found is not None:
            if (announced := e.number(f"{PREFIX}PROCESSES", found["processes"])) != found["processes"]:
                raise LaunchError(
                    f"{found['launcher']} has started {found['processes']} processes, {PREFIX}PROCESSES says {announced}; "
                    "start as many, or unset it"
                )
            if found["processes"] == 1:
                return None
            own: dict[str, Any] = {
                "heartbeat": e.number(f"{PREFIX}HEARTBEAT", HEARTBEAT),
                "patience": e.number(f"{PREFIX}PATIENCE", PATIENCE),
            }
            return Launch(**found, **own, interface=e.get(f"{PREFIX}INTERFACE"))
    return None


class _Environment:
    def __init__(self, values: Mapping[str, str]):
        self.get = values.get
        self.values = values

    def number(self, name: str, default: int) -> int:
        text = self.values.get(name)
        if text is None:
            return default
        try:
            return int(text)
        except ValueError as error:
            raise LaunchError(f"{name} is {text!r}; it must be a whole number") from error

    def numbers(self, *names: str) -> list[int] | None:
        """All of these, or None where one is missing."""
        return [self.number(name, 0) for name in names] if all(name in self.values for name in names) else None

    @property
    def coordinator(self) -> str | None:
        return self.values.get(f"{PREFIX}COORDINATOR")


def _port(job: str) -> int:
    """A port for a job, the same in all of its processes."""
    first, count = _PORTS
    return first + zlib.crc32(job.encode()) % count


def _ours(e: _Environment) -> dict[str, Any] | None:
    found = e.numbers(f"{PREFIX}PROCESSES", f"{PREFIX}PROCESS")
    if found is None:
        return None
    if e.coordinator is None:
        raise LaunchError(
            f"{PREFIX}PROCESSES and {PREFIX}PROCESS are set, {PREFIX}COORDINATOR is not; set it to host:port of process 0"
        )
    local = e.number(f"{PREFIX}LOCAL_PROCESSES", 1)
    return {
        "launcher": "jaxinfer launch",
        "coordinator": e.coordinator,
        "processes": found[0],
        "process": found[1],
        "local_process": e.number(f"{PREFIX}LOCAL_PROCESS", 0),
        "local_processes": local,
        "one_host": local == found[0] if f"{PREFIX}LOCAL_PROCESSES" in e.values else None,
    }


def _open_mpi(e: _Environment) -> dict[str, Any] | None:
    names = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
    found = e.numbers(*(f"OMPI_COMM_WORLD_{name}" for name in names))
    if found is None:
        return None
    size, rank, local, local_size = found
    coordinator = e.coordinator
    if coordinator is None:
        job = e.get("PMIX_NAMESPACE") or e.get("OMPI_MCA_ess_base_jobid") or "Open MPI"
        host = "127.0.0.1" if local_size == size else _mpirun_host(e)
        coordinator = join_address(host, _port(job))
    places = {"local_process": local, "local_processes": local_size, "one_host": local_size == size}
    return {"launcher": "Open MPI", "coordinator": coordinator, "processes": size, "process": rank, **places}


def _mpirun_host(e: _Environment) -> str:
    """Open MPI 4 tells every process where mpirun runs, which is where process 0 is; version 5 does not."""
    found = re.search(r"tcp://([^,:]+)", e.get("OMPI_MCA_orte_hnp_uri") or "")
    if found is None:
        raise LaunchError(
            f"Open MPI does not say on which host process 0 is; give mpirun -x {PREFIX}COORDINATOR=HOST:PORT, or start it with "
            "jaxinfer launch --backend mpi"
        )
    return found[1]


def _slurm(e: _Environment) -> dict[str, Any] | None:
    found = e.numbers("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES")
    nodes = e.get("SLURM_STEP_NODELIST")
    if found is None or nodes is None:  # in a batch script or a shell of salloc there is no step: those are one process
        return None
    tasks, process, local, hosts = found
    # "4(x2),3": tasks of each node
    counts = [int(n) for part in (e.get("SLURM_STEP_TASKS_PER_NODE") or "1").split(",") for n in _repeated(part)]
    node = e.number("SLURM_NODEID", 0)
    host = "127.0.0.1" if hosts == 1 else first_node(nodes)
    job = f"{e.get('SLURM_JOB_ID')}.{e.get('SLURM_STEP_ID')}"
    return {
        "launcher": "Slurm",
        "coordinator": e.coordinator or join_address(host, _port(job)),
        "processes": tasks,
        "process": process,
        "local_process": local,
        "local_processes": counts[node] if node < len(counts) else 1,
        "one_host": hosts == 1,
    }


def _repeated(part: str) -> list[str]:
    count, _, times = part.partition("(x")
    return [count] * int(times.rstrip(")") or 1)


def first_node(nodes: str) -> str:
    """The first host of Slurm's short form, such as "node[007-015,020],other"."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise LaunchError(
            f"Slurm's list of nodes is {nodes!r}, which is not understood; set {PREFIX}COORDINATOR to host:port of process 0"
        )
    return found[1] + (found[2] or "") + (found[3] or "")


def _kubernetes(e: _Environment) -> dict[str, Any] | None:
    """An Indexed Job, or a JobSet of one: the cluster gives the index, the template the rest."""
    if "KUBERNETES_SERVICE_HOST" not in e.values or "JOB_COMPLETION_INDEX" not in e.values:
        return None
    if e.coordinator is None or f"{PREFIX}PROCESSES" not in e.values:
        return None  # one of many pods that know nothing of each other
    return {
        "launcher": "Kubernetes",
        "coordinator": e.coordinator,
        "processes": e.number(f"{PREFIX}PROCESSES", 1),
        "process": e.number("JOB_COMPLETION_INDEX", 0),
    }


# --- the start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run that this process has joined. hosts: of every process, in their order."""

    launch: Launch
    hosts: tuple[str, ...]


_run: Run | None = None


def start(launch: Launch | None = None, environ: Mapping[str, str] | None = None) -> Run | None:
    """Join the run that this process belongs to, before the first use of jax; once, later calls change nothing.

    launch: instead of what the environment says. None where the process is alone, or jax.distributed was started by someone else.
    All processes meet first (sharding.rendezvous), the interface between them is chosen from the routes, and what native code prints on
    file descriptor 1, as Gloo does, goes to stderr from then on: sys.stdout keeps the real one. An exception that nobody catches ends
    the process at once, since jax would wait for the others. Raises LaunchError.
    """
    global _run
    if _run is not None:
        return _run
    launch = launch or detect(environ)
    if launch is None:
        return None
    import jax
    from jax._src import xla_bridge
    from jaxlib import _jax

    if jax.distributed.is_initialized():
        return None
    if xla_bridge.backends_are_initialized():
        raise LaunchError(
            f"this is process {launch.process} of {launch.processes}, started by {launch.launcher}, and jax was used before they were "
            "connected; call sharding.distributed.start() at the beginning of the program"
        )
    host, port = split_address(launch.coordinator)
    hosts = meet(host, port, process=launch.process, processes=launch.processes, timeout=launch.patience)
    address = own_address(resolve(host), interface=launch.interface, one_host=len(set(hosts)) == 1)
    interface = launch.interface or interface_of(address)
    if interface is not None and not is_loopback(address):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    # jax gives Gloo no address: it would announce what the own host name leads to
    _jax.make_gloo_tcp_collectives = functools.partial(_jax.make_gloo_tcp_collectives, hostname=address)
    guard_stdout()
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for a notice, and the process would live on
    jax.distributed.initialize(
        coordinator_address=launch.coordinator,
        num_processes=launch.processes,
        process_id=launch.process,
        local_device_ids=_own_gpu(launch, os.environ.get("CUDA_VISIBLE_DEVICES")),
        cluster_detection_method="deactivate",
        initialization_timeout=launch.patience,
        heartbeat_timeout_seconds=launch.heartbeat,
        shutdown_timeout_seconds=launch.heartbeat,
    )
    sys.excepthook = _end_at_once
    _run = Run(launch=launch, hosts=tuple(hosts))
    return _run


def _own_gpu(launch: Launch, visible: str | None) -> list[int] | None:
    """Which GPU is this process's: its own one of as many as there are processes here; None: all that it sees."""
    if launch.local_processes == 1 or (visible is not None and visible.count(",") + 1 < launch.local_processes):
        return None  # the launcher has given each process its own
    return [launch.local_process]


def guard_stdout() -> None:
    """Let sys.stdout have the process's stdout alone: what else is written to file descriptor 1 goes to stderr."""
    stream = sys.stdout
    try:
        if stream is None or stream.fileno() != 1:
            return
    except (OSError, ValueError):
        return
    stream.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(kept, "w", encoding=stream.encoding, errors=stream.errors, buffering=1)


def _end_at_once(kind, error, trace) -> None:
    traceback.print_exception(kind, error, trace)
    leave(130 if issubclass(kind, KeyboardInterrupt) else 1)


def leave(status: int) -> None:
    """End this process with a status that is not 0, if it is one of several: without the barrier at which jax waits for the others."""
    if status and is_one_of_many():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def is_one_of_many() -> bool:
    """Whether this process has joined others; imports no jax to find out."""
    if _run is not None:
        return True
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized() and sys.modules["jax"].process_count() > 1


def hosts_of(processes: Sequence[int]) -> list[int]:
    """For each process the number of its host; all on one where that is not known, since someone else has started jax.distributed."""
    if _run is None:
        return [0] * len(processes)
    number = {host: i for i, host in enumerate(dict.fromkeys(_run.hosts))}
    return [number[_run.hosts[process]] for process in processes]


def coordinator_host() -> str:
    """Name or address of the host of process 0, as the other processes reach it."""
    from jax._src import distributed

    return split_address(str(distributed.global_state.coordinator_address))[0]


def heartbeat() -> int:
    """Seconds after which a process that is not heard of ends the others; where someone else has started jax.distributed, HEARTBEAT."""
    return HEARTBEAT if _run is None else _run.launch.heartbeat


# --- what processes tell each other


def spans_processes(mesh: Any) -> bool:
    """Whether a mesh has devices of several processes."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def fetch(tree: Any) -> Any:
    """jax.device_get, also of arrays of which other processes hold a part: those come by a program that all processes run."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    leaves, structure = jax.tree.flatten(tree)
    far = [
        i for i, a in enumerate(leaves) if isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated)
    ]
    if far:
        everywhere = NamedSharding(leaves[far[0]].sharding.mesh, PartitionSpec())
        found = jax.jit(lambda *arrays: arrays, out_shardings=everywhere)(*(leaves[i] for i in far))
        for i, array in zip(far, found, strict=True):
            leaves[i] = array
    return jax.device_get(jax.tree.unflatten(structure, leaves))


@functools.cache
def channel(name: str) -> "Channel":
    """The one channel of a name."""
    return Channel(name)


class Channel:
    """Rounds in which every process says something and all hear what process 0 makes of it, over jax's coordination service.

    name: each channel counts its own rounds, and all processes must take the same ones in the same order; several threads may use
    several channels. Values are pickled: they come from the processes of one run.
    """

    def __init__(self, name: str):
        import jax
        from jax._src import distributed

        self._name, self._rounds = f"jaxinfer/{name}", itertools.count()
        self._client: Any = distributed.global_state.client
        self.process, self.processes = jax.process_index(), jax.process_count()

    def exchange(self, value: Any = None, decide: Callable[[list[Any]], Any] = lambda values: values) -> Any:
        """What `decide`, called on process 0 alone, makes of the values of all processes. Raises what it raises, everywhere."""
        turn = next(self._rounds)
        key = f"{self._name}/{turn}"
        if self.process:
            self._put(f"{key}/{self.process}", value)
            answer, error = self._get(f"{key}/answer", "process 0")
        else:
            values = [value, *(self._get(f"{key}/{i}", f"process {i}") for i in range(1, self.processes))]
            try:
                answer, error = decide(values), None
            except Exception as raised:
                answer, error = None, raised
            try:
                self._put(f"{key}/answer", (answer, error))
            except (pickle.PicklingError, AttributeError, TypeError) as raised:
                error = raised
                self._put(f"{key}/answer", (None, TypeError(f"what processes tell each other cannot be pickled: {raised}")))
            if turn:  # all have been there, so all have heard the answer before
                self._client.key_value_delete(f"{self._name}/{turn - 1}/")
        if error is not None:
            raise error
        return answer

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on process 0. Raises what it raises, everywhere."""
        return self.exchange(None, lambda _: make())

    def _put(self, key: str, value: Any) -> None:
        data = pickle.dumps(value)
        parts = range(0, len(data), _PART)
        for i, start_ in enumerate(parts[1:], 1):
            self._client.key_value_set_bytes(f"{key}.{i}", data[start_ : start_ + _PART])
        self._client.key_value_set_bytes(key, len(parts).to_bytes(4, "big") + data[:_PART])

    def _get(self, key: str, who: str) -> Any:
        first = self._wait(key, who)
        parts = [first[4:], *(self._wait(f"{key}.{i}", who) for i in range(1, int.from_bytes(first[:4], "big")))]
        return pickle.loads(b"".join(parts))

    def _wait(self, key: str, who: str) -> bytes:
        noted = False
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(key, _LOOK * 1000)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                if not noted:
                    noted = True
                    print(
                        f"jaxinfer: process {self.process} has waited {_LOOK} s for {who} ({self._name}); every process must make "
                        "the same calls in the same order",
                        file=sys.stderr,
                        flush=True,
                    )


_PART = 1 << 20  # bytes of a message of the coordination service
_LOOK = 60  # seconds between remarks
