"""Sums over hosts with a slow link between them: flat, in layers, and in layers with INT8 across hosts.

The hosts are network namespaces of this machine, so it needs root (and iproute2): two that are joined by a veth pair, or more of them, each
with a veth pair to a bridge. Both ends of a pair are limited. Each host runs one process with several CPU devices. What crosses the link of
the first host is counted by the kernel, headers and acknowledgements included.

The link's share is the time that the bytes sent take at its rate, over the time of the sum. The rest is what devices do before, between and
after, the same sums without a limit tell how much, and what the link stands idle beside that. All hosts do that on the cores of this
machine, before its other processes where it may (SCHED_RR); what these have of the cores meanwhile is said. The bucket that limits the link
lets BURST bytes through at once after a pause, 1.3 ms' worth at 100 Mbit/s. TCP's congestion control is reno, in all namespaces: every
kernel has it, while BBR, this machine's default or not, sends the less the longer acknowledgements wait behind what goes the other way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sharding.errors import LaunchError  # noqa: E402

METHODS = ("flat", "layered", "int8")
NETWORK = "10.79.0."  # of the hosts, which are numbered from 1
PORT = 62300
BURST = 16384  # bytes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=int, default=100, help="of the link, in each direction; 0 for no limit")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="of each host")
    parser.add_argument("--kib", type=int, default=2048, help="of float32 that every device adds")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        return work(args)
    try:
        rows = measure(args)
    except (LaunchError, subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"collectives.py: {getattr(error, 'stderr', None) or error}; it needs root, and `ip` and `tc`", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(rows, args))
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method, as process 0 measured it, also without the limit. Raises LaunchError where a process fails."""
    start, before = time.monotonic(), user_seconds_of_others()
    rows = run_on_hosts(args, args.mbit)
    busy = max(0.0, user_seconds_of_others() - before) / (time.monotonic() - start)
    unlimited = run_on_hosts(args, 0) if args.mbit else rows
    for row, free in zip(rows, unlimited, strict=True):
        row["of_flat_bytes"] = row["link_bytes"] / rows[0]["link_bytes"]
        row["speed_up"] = rows[0]["seconds"] / row["seconds"]
        row["unlimited_seconds"] = free["seconds"]
        row["cores_of_others"] = busy
        # that the link alone takes, and what part of the time it was busy: in the median turn, and in the best
        row["link_seconds"] = row["sent_bytes"] * 8 / (args.mbit * 1e6) if args.mbit else None
        for share, time_ in (("link_share", "seconds"), ("best_link_share", "best_seconds")):
            row[share] = row["link_seconds"] / row[time_] if args.mbit else None
    return rows


def user_seconds_of_others() -> float:
    """That this machine's cores have worked for processes other than this one's children, the system's own work left out."""
    of_all = psutil.cpu_times()
    return of_all.user + of_all.nice - os.times().children_user


def run_on_hosts(args: argparse.Namespace, mbit: int) -> list[dict[str, Any]]:
    with hosts(args.hosts, mbit) as (names, interfaces):
        options = [
            "--worker",
            "--hosts",
            args.hosts,
            "--devices",
            args.devices,
            "--kib",
            args.kib,
            "--repetitions",
            args.repetitions,
        ]
        children = []
        for number, (name, interface) in enumerate(zip(names, interfaces, strict=True)):
            env = os.environ | {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(args.devices),
                "JAXINFER_PROCESSES": str(args.hosts),
                "JAXINFER_PROCESS": str(number),
                "JAXINFER_COORDINATOR": f"{NETWORK}1:{PORT}",
                "JAXINFER_HEARTBEAT": "60",
                "BENCH_INTERFACE": interface,
            }
            command = ["ip", "netns", "exec", name, sys.executable, __file__, *map(str, options)]
            children.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        outputs = [child.communicate(timeout=300) for child in children]
        for child, (_, error) in zip(children, outputs, strict=True):
            if child.returncode:
                raise LaunchError(f"a process ended with status {child.returncode}: {error[-2000:]}")
    return json.loads(outputs[0][0])


@contextlib.contextmanager
def hosts(count: int, mbit: int) -> Iterator[tuple[list[str], list[str]]]:
    """Network namespaces that reach each other only: their names, and each one's interface."""
    names = [f"bench{os.getpid()}h{number}" for number in range(1, count + 1)]
    interfaces = [f"v{os.getpid()}h{number}" for number in range(1, count + 1)]
    hub = f"bench{os.getpid()}"
    run = lambda *words: subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)
    add = lambda space, link: run("tc", "-n", space, "qdisc", "add", "dev", link, "root", *limit)
    limit = ("tbf", "rate", f"{mbit}mbit", "burst", BURST, "latency", "200ms")
    try:
        for name in names:
            run("ip", "netns", "add", name)
        if count == 2:
            run("ip", "link", "add", interfaces[0], "type", "veth", "peer", "name", interfaces[1])
        else:
            run("ip", "netns", "add", hub)
            run("ip", "-n", hub, "link", "add", "hub", "type", "bridge")
            run("ip", "-n", hub, "link", "set", "hub", "up")
            for number, interface in enumerate(interfaces):
                port = f"p{number}"
                run("ip", "link", "add", interface, "type", "veth", "peer", "name", port, "netns", hub)
                run("ip", "-n", hub, "link", "set", port, "master", "hub", "up")
                if mbit:
                    add(hub, port)
        for number, (name, interface) in enumerate(zip(names, interfaces, strict=True), 1):
            inside = ("ip", "-n", name)
            run("ip", "link", "set", interface, "netns", name)
            run(*inside, "addr", "add", f"{NETWORK}{number}/24", "dev", interface)
            run(*inside, "link", "set", interface, "up")
            run(*inside, "link", "set", "lo", "up")
            run("ip", "netns", "exec", name, "sh", "-c", "echo reno > /proc/sys/net/ipv4/tcp_congestion_control")
            if mbit:
                add(name, interface)
        yield names, interfaces
    finally:
        for name in [*names, *([hub] if count > 2 else [])]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def work(args: argparse.Namespace) -> int:
    """In the process of each host."""
    with contextlib.suppress(PermissionError):  # of containers
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    from sharding import distributed

    distributed.start()
    import dataclasses

    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from sharding.collectives import leave
    from sharding.context import ParallelContext
    from sharding.mesh import make_mesh
    from sharding.rules import TENSOR_AXES

    count, size = args.hosts * args.devices, args.kib * 256
    mesh = make_mesh(tensor_hosts=args.hosts, tensor=args.devices)
    context = ParallelContext.from_mesh(mesh)
    sums = {
        "flat": lambda x: leave(x, TENSOR_AXES),
        "layered": context.leave,
        "int8": dataclasses.replace(context, int8_hosts=True).leave,
    }
    values = np.random.default_rng(7).standard_normal((count, size)).astype(np.float32)
    x = jax.make_array_from_callback(values.shape, NamedSharding(mesh, P(TENSOR_AXES)), lambda index: values[index])
    turns = distributed.channel("turns")
    programs, errors = {}, {}
    for name in METHODS:
        run = lambda x, name=name: sums[name](x[0])
        programs[name] = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P(TENSOR_AXES), out_specs=P(), check_vma=False))
        found = np.asarray(jax.block_until_ready(programs[name](x)).addressable_data(0))
        errors[name] = float(np.abs(found - values.astype(np.float64).sum(0)).max())
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    moved = {name: [0, 0] for name in METHODS}
    for _ in range(args.repetitions):
        for name in METHODS:  # in turn, so that what else the machine does meets all of them
            turns.exchange()
            before, start = counters(), time.perf_counter()
            jax.block_until_ready(programs[name](x))
            seconds[name].append(time.perf_counter() - start)
            turns.exchange()
            moved[name] = [m + b - a for m, a, b in zip(moved[name], before, counters(), strict=True)]
    rows = [
        {
            "method": name,
            "seconds": statistics.median(seconds[name]),
            "best_seconds": min(seconds[name]),
            "link_bytes": sum(moved[name]) / args.repetitions,
            "sent_bytes": moved[name][1] / args.repetitions,
            "largest_error": errors[name],
        }
        for name in METHODS
    ]
    print(json.dumps(rows))
    return 0


def counters() -> tuple[int, int]:
    """Bytes that this host's end of the link has received and sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == os.environ["BENCH_INTERFACE"]:
            fields = rest.split()
            return int(fields[0]), int(fields[8])
    raise LaunchError(f"there is no interface {os.environ['BENCH_INTERFACE']} here")


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """In Markdown."""
    link = f"{args.mbit} Mbit/s" if args.mbit else "no limit"
    lines = [
        f"Sum of {args.kib} KiB of float32 on each of {args.hosts} hosts x {args.devices} CPU devices, {link} between the hosts, in turn, "
        f"median of {args.repetitions}:",
        "",
        "| sum | ms | to flat | KiB over the link, both ways | to flat | link alone, ms | link used | in the best turn | without limit, ms "
        "| largest error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = ["", "", ""]
        if row["link_seconds"] is not None:
            shares = [f"{row['link_seconds'] * 1e3:.1f}", f"{row['link_share']:.0%}", f"{row['best_link_share']:.0%}"]
        lines.append(
            f"| {row['method']} | {row['seconds'] * 1e3:.1f} | {row['speed_up']:.2f}x | {row['link_bytes'] / 1024:.0f} | "
            f"{row['of_flat_bytes']:.2f}x | {' | '.join(shares)} | {row['unlimited_seconds'] * 1e3:.1f} | {row['largest_error']:.2g} |"
        )
    lines += ["", f"Meanwhile other processes kept {rows[0]['cores_of_others']:.1f} of {psutil.cpu_count()} cores busy."]
    if args.mbit:
        lines.append("")
        for row in rows:
            whole, link_, free = (1e3 * row[f"{name}seconds"] for name in ("", "link_", "unlimited_"))
            lines.append(
                f"{row['method']}: {whole:.1f} ms = {link_:.1f} of the link + {whole - link_:.1f}; without a limit it all takes {free:.1f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
