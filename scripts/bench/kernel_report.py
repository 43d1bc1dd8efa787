#!/usr/bin/env python
"""What the GPU kernels take, per GPU generation, compiled without a GPU; with --measure, what they reach on the one that is here.

    python scripts/bench/kernel_report.py [--gpus a100,h100,b200] [--op attention] [--json] [--output benchmarks]
    python scripts/bench/kernel_report.py --measure [--dry-run]

Needs jax-cuda13-plugin, jax-cuda13-pjrt and CUDA's ptxas. Per case: the launches of the program; of its kernels the most registers a
thread, the bytes spilled and of shared memory, the least part of a processor's warps that fit at once, the widest global load of a thread,
the tensor-core instruction; and the floor: the time that its bytes or operations take at the data sheet's peak. Hopper's kernels through
Mosaic, which are taken by name only, have rows of their own; they copy without a thread's load. For what is bound by
reading its arguments: the bytes that the kernels read from device memory, in sectors of 32, and what their loads ask for, of which caches
give the rest; apart, the bytes that an earlier launch of the same program wrote, which are still in the L2. --output writes kernels.txt
and kernels.json, where rows of other GPUs and cases stay. Nothing is run: speed, races and numbers do
not show. --measure times it, and gives bytes and operations per second as percent of that peak, beside the time that XLA, other
implementations and torch take. --dry-run goes the same way with what is small, interpreted, on any device; its times say nothing.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from kernel_loads import NotDerivable, Reads, reads
from kernel_peers import beside, torch_seconds

from pallas_kernels import tuner
from pallas_kernels.cases import Case, cases, size
from pallas_kernels.deviceless import Kernel, compile_for, is_ours, kernels_of, lower_for, ptxas
from pallas_kernels.errors import BackendError
from pallas_kernels.gpus import GPUS, KNOWN, Gpu
from pallas_kernels.platforms import leave_out_absent_gpus
from pallas_kernels.registry import using
from pallas_kernels.target import interpreting

WARPS = 64  # that a processor holds
REGISTERS = 65536  # of a processor
SMALLEST = 600_000  # bytes of arguments that a dry run stops at
THROUGH_MOSAIC = ", through Mosaic"  # in the names of rows
HOPPER = (9, 0)
MOST_READ = 1.05  # of the arguments
MOST_OF_L2 = 0.5  # that what is handed on may take, to be there still when it is read


def floor(case: Case, gpu: Gpu) -> float:
    """Seconds that bytes or operations take at the peak of the data sheet, whichever is longer."""
    return max(case.moved / gpu.bandwidth, case.operations / (gpu.matrix if case.matrix else gpu.float32))


def occupancy(kernel: Kernel, gpu: Gpu) -> float:
    """The part of a processor's warps that fit at once, by registers, shared memory and threads. Registers come in eights a thread."""
    warps = max(1, kernel.threads // 32)
    by_registers = REGISTERS // (warps * 32 * max(1, math.ceil(kernel.registers / 8) * 8))
    by_shared = (gpu.shared + 1024) // (kernel.shared + 1024)
    return min(by_registers, by_shared, WARPS // warps, 32) * warps / WARPS


@functools.cache
def reads_of(op: str, name: str, device_kind: str) -> Reads | str | None:
    """What the kernels of a case that streams read, by their loads, or why that cannot be derived; None for other cases."""
    case = next(case for case in cases() if (case.op, case.name) == (op, name))
    if not case.streams:
        return None
    try:
        return reads(case.run, case.args, device_kind=device_kind)
    except NotDerivable as error:
        return str(error)


def takes(case: Case, implementation: str, name: str) -> bool:
    """Whether an implementation that is not chosen by itself has a kernel for a case."""
    try:
        with using({case.op: implementation}):
            lower_for(name, case.run, *case.args)
        return True
    except BackendError:  # or there is none of that name
        return False


def mosaic_kernels(folder: str) -> list[Kernel]:
    """What ptxas says of the kernels that Mosaic GPU has written to a folder; XLA holds their code and does not look."""
    found = []
    for ptx in sorted(Path(folder).glob("*.ptx")):
        shared = re.search(r"smem_scratch_bytes=(\d+)", ptx.with_suffix(".resources.txt").read_text())
        found += [dataclasses.replace(k, shared=int(shared[1]) if shared else k.shared) for k in kernels_of(ptx.read_text())]
    return found


def compiled(case: Case, name: str, implementation: str | None = None) -> dict:
    """A row of the report, of the kernel that is chosen by itself or of "mosaic"."""
    gpu = KNOWN[name]
    title = case.name if implementation is None else f"{case.name}{THROUGH_MOSAIC}"
    row = {"gpu": name, "op": case.op, "case": title, "moved_bytes": case.moved, "operations": case.operations}
    row["floor_us"] = round(floor(case, gpu) * 1e6, 3)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if implementation is not None:
            stack.enter_context(using({case.op: implementation}))
            stack.enter_context(unittest.mock.patch.dict(os.environ, {"MOSAIC_GPU_DUMP_TO": folder}))
        found = compile_for(name, case.run, *case.args)
        own = [k for k in found.kernels if is_ours(k)] + mosaic_kernels(folder)
    row["launches"] = [launch for launch in found.launches if launch != "kCopy"]
    row["kernels"] = [vars(k) | {"occupancy": round(occupancy(k, gpu), 4)} for k in own]
    read = reads_of(case.op, case.name, gpu.device_kind) if implementation is None else None
    if isinstance(read, Reads):
        row |= {"argument_bytes": size(case.args) - case.unused, "read_bytes": read.unique, "issued_bytes": read.issued}
        row["handed_on_bytes"] = read.handed_on
    row["problems"] = problems(row, case, gpu)
    if isinstance(read, str):
        row["problems"].append(f"what it reads cannot be derived: {read}")
    return row


def problems(row: dict, case: Case, gpu: Gpu) -> list[str]:
    """What is wrong with a row, in words."""
    kernels = row["kernels"]
    found = [] if kernels else ["no kernel"]
    found += [f"{k['spilled']} bytes spilled" for k in kernels if k["spilled"]]
    found += [f"{k['shared']} bytes of shared memory" for k in kernels if k["shared"] > gpu.shared]
    if case.matrix and kernels and not any(k["tensor_cores"] for k in kernels):
        found.append("no tensor-core instruction")
    if "read_bytes" in row:
        most = MOST_READ * row["argument_bytes"]
        if row["read_bytes"] - row["handed_on_bytes"] > most or row["read_bytes"] > most + case.accumulators * gpu.processors:
            found.append(
                f"reads {row['read_bytes']} bytes of {row['argument_bytes']}, {row['handed_on_bytes']} of them handed on"
            )
        if row["handed_on_bytes"] > MOST_OF_L2 * gpu.l2:
            found.append(f"hands on {row['handed_on_bytes']} bytes, and the L2 has {gpu.l2}")
    return found


def drawn(case: Case) -> tuple:
    """Operands on the device that is here: random floats, zeros of other kinds."""
    rng = np.random.default_rng(0)

    def random(a):
        if jnp.issubdtype(a.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(a.shape, np.float32), a.dtype)
        return jnp.zeros(a.shape, a.dtype)

    return jax.tree.map(random, case.args)


def seconds(case: Case, repeats: int = tuner.REPEATS) -> float:
    """Seconds a call on the device that is here, the median of several runs of many calls in one program."""
    operands, tree = jax.tree.flatten(drawn(case))
    places = tuner.updates(jax.eval_shape(case.run, *case.args), case.args)
    program = jax.jit(tuner.repeated(lambda *flat: case.run(*jax.tree.unflatten(tree, flat)), 1, repeats, places))
    return tuner.clock(program.lower(*operands).compile(), operands) / repeats


def measured(case: Case, device_kind: str, repeats: int) -> dict:
    """A row of the report."""
    row = {"op": case.op, "case": case.name, "device": device_kind, "moved_bytes": case.moved, "operations": case.operations}
    row |= {"seconds": seconds(case, repeats), "beside": {}}
    if (gpu := next((g for g in KNOWN.values() if g.device_kind == device_kind), None)) is not None:
        row["percent_of_peak"] = 100 * floor(case, gpu) / row["seconds"]
    return row


def measure(
    chosen: list[Case], *, repeats: int, peers: bool, torch_device: str, limit: float, show: Callable[[str], None]
) -> list[dict]:
    """Rows of the report: all kernels first, then what is beside them, until `limit` seconds are over."""
    kind, end = jax.devices()[0].device_kind, time.monotonic() + limit
    late = lambda: time.monotonic() > end
    rows = []
    for case in chosen:
        if late():
            break
        rows.append(measured(case, kind, repeats))
        show(measured_in_words(rows[-1]))
    if peers:
        by_torch = torch_seconds(chosen[: len(rows)], device=torch_device) if not late() else {}
        for case, row in zip(chosen, rows, strict=False):
            if (own := by_torch.get((row["op"], row["case"]))) is not None:
                row["beside"]["torch"] = own
            if not late():
                row["beside"] |= beside(case, functools.partial(seconds, repeats=repeats))
            if row["beside"]:
                show(measured_in_words(row))
    if late():
        alone = sum(not row["beside"] for row in rows) if peers else 0
        show(
            f"after {limit:.0f} seconds: {len(chosen) - len(rows)} of {len(chosen)} kernels not measured, {alone} beside nothing"
        )
    return rows


def measured_in_words(row: dict) -> str:
    line = (
        f"{row['op']:14} {row['case']:58} {row['seconds'] * 1e6:9.2f} us {row['moved_bytes'] / row['seconds'] / 1e9:7.0f} GB/s"
    )
    if "percent_of_peak" in row:
        line += f" {row['percent_of_peak']:5.1f} % of peak"
    return line + "".join(f", {name} {s * 1e6:.2f} us" for name, s in row["beside"].items())


def versions() -> dict[str, str]:
    ptxas_version = subprocess.run([ptxas(), "--version"], capture_output=True, text=True, check=True).stdout.split()
    return {name: version(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin")} | {"ptxas": ptxas_version[-1]}


def write(rows: list[dict], folder: Path) -> None:
    """Both files, with the rows that they have of other GPUs and cases."""
    path = folder / "kernels.json"
    key = lambda row: (row["op"], row["case"], row["gpu"])
    known = {key(row): row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}
    known |= {key(row): row for row in rows}
    titles = [(case.op, title) for case in cases() for title in (case.name, f"{case.name}{THROUGH_MOSAIC}")]
    order = {(*title, name): i for i, (title, name) in enumerate(itertools.product(titles, KNOWN))}
    kept = sorted((row for k, row in known.items() if k in order), key=lambda row: order[key(row)])
    facts = {"card": "deviceless", "date": datetime.date.today().isoformat(), "versions": versions()}
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in kept)
    path.write_text(f'{json.dumps(facts)[:-1]}, "rows": [\n{lines}\n]}}\n')
    head = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    text = [f"card: deviceless, {facts['date']}, {head}", *map(in_words, kept)]
    (folder / "kernels.txt").write_text("\n".join(text) + "\n")


def in_words(row: dict) -> str:
    kernels = row["kernels"]
    most = lambda key: max((k[key] for k in kernels), default=0)
    warps = 100 * min((k["occupancy"] for k in kernels), default=0)
    tensor = next((k["tensor_cores"] for k in kernels if k["tensor_cores"]), "-").replace(".sync.aligned", "")
    more = ""
    if "read_bytes" in row:
        own = row["read_bytes"] - row["handed_on_bytes"]
        more = f" reads {own / 1e6:.2f} MB, {100 * own / row['argument_bytes']:.1f} % of its arguments; "
        if row["handed_on_bytes"]:
            part = 100 * row["handed_on_bytes"] / KNOWN[row["gpu"]].l2
            more += f"{row['handed_on_bytes'] / 1e6:.2f} MB of partial sums from the L2, {part:.1f} % of it; "
        more += f"loads ask for {row['issued_bytes'] / 1e6:.2f} MB"
    more += "".join(f" PROBLEM: {problem}" for problem in row["problems"])
    return (
        f"{row['gpu']:5} {row['op']:14} {row['case']:58} {len(row['launches']):2} launches {most('registers'):3} registers "
        f"{most('spilled'):4} B spilled {most('shared') / 1024:6.1f} KiB shared {warps:3.0f} % "
        f"warps {most('widest_load'):2} B loads {tensor:44} floor {row['floor_us']:9.2f} us{more}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default=",".join(GPUS), help="names, separated by commas")
    parser.add_argument("--op", help="only this operation")
    parser.add_argument("--measure", action="store_true", help="time the cases on the GPU that is here")
    parser.add_argument("--no-peers", action="store_true", help="time nothing beside the kernels")
    parser.add_argument(
        "--limit", type=float, default=math.inf, metavar="SECONDS", help="of measuring, after which the rest is left out"
    )
    parser.add_argument("--dry-run", action="store_true", help="with --measure: small cases, interpreted, on any device")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write kernels.txt and kernels.json there")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    args = parser.parse_args(arguments)
    leave_out_absent_gpus()
    chosen = [case for case in cases() if args.op in (None, case.op)]
    if unknown := [name for name in args.gpus.split(",") if name not in KNOWN]:
        parser.error(f"--gpus {','.join(unknown)}: there are {', '.join(KNOWN)}")
    if not chosen:
        parser.error(f"--op {args.op}: there are {', '.join(sorted({case.op for case in cases()}))}")
    rows, failed = [], 0
    if args.measure:
        device = jax.devices()[0]
        if device.platform != "gpu" and not args.dry_run:
            parser.error(f"--measure: the device here is a {device.platform}, not a GPU")
        repeats = tuner.REPEATS
        if args.dry_run:
            chosen, repeats = [case for case in chosen if size(case.args) < SMALLEST], 1
        with interpreting() if args.dry_run else contextlib.nullcontext():
            rows = measure(
                chosen,
                repeats=repeats,
                peers=not args.no_peers,
                torch_device="cpu" if args.dry_run else "cuda",
                limit=args.limit,
                show=functools.partial(print, file=sys.stderr if args.json else sys.stdout, flush=True),
            )
    else:
        for case in chosen:
            for name in args.gpus.split(","):
                if KNOWN[name].capability < case.since:
                    continue
                named = [None] + ["mosaic"] * (KNOWN[name].capability == HOPPER and takes(case, "mosaic", name))
                for implementation in named:
                    row = compiled(case, name, implementation)
                    rows.append(row)
                    failed += bool(row["problems"])
                    print(in_words(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps(rows))
    if args.output and not args.measure:
        write(rows, args.output)
    if failed:
        print(f"{failed} of {len(rows)} have problems", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
