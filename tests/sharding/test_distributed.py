"""The start of a process: who started it, and how all meet."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from sharding import rendezvous
from sharding.distributed import detect, first_node
from sharding.errors import LaunchError
from sharding.network import free_port, interface_of, listen, own_address, resolve
from sharding.rendezvous import meet

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "node[007-008],other",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_NODEID": "2",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}


def test_nobody_started_it():
    assert detect({"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is None  # a batch script outside of srun
    assert detect({"JAXINFER_PROCESSES": "1", "JAXINFER_PROCESS": "0", "JAXINFER_COORDINATOR": "a:1"}) is None


def test_our_own_launcher():
    env = {
        "JAXINFER_PROCESSES": "4",
        "JAXINFER_PROCESS": "2",
        "JAXINFER_COORDINATOR": "10.0.0.1:1234",
        "JAXINFER_HEARTBEAT": "5",
    }
    found = detect(env)
    assert found and (found.coordinator, found.processes, found.process, found.heartbeat) == ("10.0.0.1:1234", 4, 2, 5)
    for wrong, words in (
        ({"JAXINFER_PROCESS": "4"}, "process 4 of 4"),
        ({"JAXINFER_PROCESSES": "four"}, "JAXINFER_PROCESSES is 'four'"),
        ({"JAXINFER_COORDINATOR": "10.0.0.1"}, "give host:port"),
    ):
        with pytest.raises(LaunchError, match=words):
            detect(env | wrong)
    del env["JAXINFER_COORDINATOR"]
    with pytest.raises(LaunchError, match="JAXINFER_COORDINATOR is not"):
        detect(env)


def test_open_mpi():
    four = detect(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "15315.0;tcp://10.96.0.1,10.148.0.1:34911", "PMIX_NAMESPACE": "15315.1"})
    assert four and four.coordinator.startswith("10.96.0.1:") and (four.process, four.local_process) == (3, 1)
    five = OPEN_MPI | {"PMIX_NAMESPACE": "prterun-a-12@1"}
    with pytest.raises(LaunchError, match="mpirun -x JAXINFER_COORDINATOR=HOST:PORT"):
        detect(five)
    alone = detect(five | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert alone and alone.coordinator.startswith("127.0.0.1:") and alone.one_host
    named = detect(five | {"JAXINFER_COORDINATOR": "a:5"})
    assert named and named.coordinator == "a:5"


def test_another_count_than_the_launchers():
    with pytest.raises(LaunchError, match="Open MPI has started 4 processes, JAXINFER_PROCESSES says 8"):
        detect(OPEN_MPI | {"JAXINFER_PROCESSES": "8", "JAXINFER_COORDINATOR": "a:5"})


def test_slurm():
    found = detect(SLURM)
    assert found and found.coordinator.startswith("node007:") and (found.processes, found.process) == (6, 5)
    assert (found.local_process, found.local_processes, found.one_host) == (1, 2, False)
    other = detect(SLURM | {"SLURM_STEP_ID": "1"})
    assert other and other.coordinator != found.coordinator  # two steps of a job run side by side
    assert [first_node(n) for n in ("a", "a,b", "n[3,5]", "n[003-7]-x,b")] == ["a", "a", "n3", "n003-x"]


def test_kubernetes():
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    assert detect(pod) is None
    found = detect(pod | {"JAXINFER_PROCESSES": "2", "JAXINFER_COORDINATOR": "run-workers-0-0.run:8476"})
    assert found and (found.launcher, found.process, found.processes) == ("Kubernetes", 1, 2)


# --- meeting


def together(processes: int, *, timeout: float = 5, port: int | None = None, **wrong) -> list:
    """What each of several threads has of meet(): hosts, or the error."""
    port, out = port or free_port(), [None] * len(wrong.get("numbers", range(processes)))

    def run(place: int, number: int) -> None:
        try:
            count = wrong.get("counts", {}).get(place, processes)
            out[place] = meet("127.0.0.1", port, process=number, processes=count, timeout=timeout)
        except LaunchError as error:
            out[place] = str(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(wrong.get("numbers", range(processes)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_all_meet():
    assert together(3) == [[rendezvous.host_name()] * 3] * 3


def test_a_process_is_missing():
    began = time.monotonic()
    said = together(4, timeout=1.0, numbers=[0, 1])
    assert all("processes 2, 3 of 4 did not come within 1 s" in text for text in said) and time.monotonic() - began < 5


def test_wrong_counts_and_numbers():
    said = together(3, timeout=1, numbers=[0, 1, 2], counts={1: 4})
    assert all("was told of 4 processes, process 0 of 3" in text for text in (said[0], said[1]))
    said = together(3, timeout=1, numbers=[0, 1, 1])
    assert all("process 1 on" in text and "is there twice" in text for text in said)


def test_no_coordinator(capsys, monkeypatch):
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.3)
    with pytest.raises(LaunchError, match=r"found no coordinator, process 0, at 127\.0\.0\.1 port"):
        meet("127.0.0.1", free_port(), process=1, processes=2, timeout=1.0)
    assert "process 1 of 2 waits for the coordinator" in capsys.readouterr().err


def test_a_coordinator_whose_name_leads_to_this_host(capsys, monkeypatch):
    """As 127.0.1.1 in a hosts file that lists the coordinator's name on another host, too."""
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.1)
    monkeypatch.setattr(rendezvous, "resolve", lambda host: "127.0.1.1")
    monkeypatch.setattr(
        "socket.create_connection", lambda *_, **__: (_ for _ in ()).throw(ConnectionRefusedError(111, "refused"))
    )
    with pytest.raises(LaunchError, match=r"node1 port 5 \(node1 leads to 127.0.1.1 here, which is this host itself"):
        meet("node1", 5, process=1, processes=2, timeout=0.5)
    assert "node1 leads to 127.0.1.1" in capsys.readouterr().err


def test_something_else_listens():
    def answer():
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"SSH-2.0\r\n")

    with listen(0) as server:
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(LaunchError, match="is not process 0 of this run"):
            meet("127.0.0.1", server.getsockname()[1], process=1, processes=2, timeout=0.3)


def test_the_port_is_taken():
    with listen(0) as server, pytest.raises(LaunchError, match=r"cannot listen on port \d+ of .*: it is taken"):
        meet("127.0.0.1", server.getsockname()[1], process=0, processes=2, timeout=1)


# --- addresses


def test_addresses(monkeypatch):
    assert own_address("127.0.0.1", interface=None, one_host=True) == "127.0.0.1"
    assert own_address("10.255.255.1", interface="lo", one_host=False) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") is None
    with pytest.raises(LaunchError, match=r"the interface 'eth77' has no IPv4 address here.*lo"):
        own_address("127.0.0.1", interface="eth77", one_host=True)
    with pytest.raises(LaunchError, match=r"'nowhere.invalid' has no address here"):
        resolve("nowhere.invalid")


def test_a_host_name_that_leads_to_loopback(monkeypatch):
    """With other hosts the address of the default route is taken; where there is none, that is said."""
    from sharding import network

    monkeypatch.setattr(network, "_ELSEWHERE", "127.0.0.5")
    with pytest.raises(LaunchError, match=r"leads to 127.0.1.1 on this host, which no other host can reach.*--interface"):
        own_address("127.0.1.1", interface=None, one_host=False)
    assert socket.inet_aton(own_address("127.0.1.1", interface=None, one_host=True))
