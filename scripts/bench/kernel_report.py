#!/usr/bin/env python
"""What the GPU kernels take, per GPU generation, compiled without a GPU; with --measure, what they reach on the one that is here.

    python scripts/bench/kernel_report.py [--gpus a100,h100,b200] [--op attention] [--json]
    python scripts/bench/kernel_report.py --measure

Needs jax-cuda13-plugin, jax-cuda13-pjrt and CUDA's ptxas. Per case: the launches of the program; of its kernels the most registers a
thread, the bytes spilled and of shared memory, the least part of a processor's warps that fit at once, the widest global load of a thread,
the tensor-core instruction; and the floor: the time that its bytes or operations take at the data sheet's peak. Nothing is run: speed,
races and numbers do not show. --measure times it, and gives bytes and operations per second as percent of that peak; arrays that fit the
second-level cache are read from there after the first time.
"""

import argparse
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import Case, cases

from pallas_kernels.deviceless import Kernel, compile_for
from pallas_kernels.gpus import GPUS, Gpu

WARPS = 64  # that a processor holds
REGISTERS = 65536  # of a processor
REPEATS = 50
KERNELS_OF_XLA = ("fusion", "wrapped_", "input_", "loop_")


def floor(case: Case, gpu: Gpu) -> float:
    """Seconds that bytes or operations take at the peak of the data sheet, whichever is longer."""
    return max(case.moved / gpu.bandwidth, case.operations / (gpu.matrix if case.matrix else gpu.float32))


def occupancy(kernel: Kernel, gpu: Gpu) -> float:
    """The part of a processor's warps that fit at once, by registers, shared memory and threads. Registers come in eights a thread."""
    warps = max(1, kernel.threads // 32)
    by_registers = REGISTERS // (warps * 32 * max(1, math.ceil(kernel.registers / 8) * 8))
    by_shared = (gpu.shared + 1024) // (kernel.shared + 1024)
    return min(by_registers, by_shared, WARPS // warps, 32) * warps / WARPS


def compiled(case: Case, name: str) -> dict:
    """A row of the report."""
    gpu = GPUS[name]
    row = {"gpu": name, "op": case.op, "case": case.name, "moved_bytes": case.moved, "operations": case.operations}
    row["floor_us"] = floor(case, gpu) * 1e6
    found = compile_for(name, case.run, *case.args)
    own = [k for k in found.kernels if not any(part in k.name for part in KERNELS_OF_XLA)]
    return row | {
        "launches": [launch for launch in found.launches if launch != "kCopy"],
        "kernels": [vars(k) | {"occupancy": occupancy(k, gpu)} for k in own],
    }


def measured(case: Case) -> dict:
    """Seconds a call on the device that is here, the median of five runs of `REPEATS` calls in one program."""
    rng = np.random.default_rng(0)

    def random(a):
        if jnp.issubdtype(a.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(a.shape, np.float32), a.dtype)
        return jnp.zeros(a.shape, a.dtype)

    args = jax.tree.map(random, case.args)

    @jax.jit
    def repeated(args):
        def body(_, args):
            # without the barrier every call would be the same, and made once
            return jax.lax.optimization_barrier((args, case.run(*args)))[0]

        return jax.lax.fori_loop(0, REPEATS, body, args)

    jax.block_until_ready(repeated(args))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(repeated(args))
        times.append((time.perf_counter() - start) / REPEATS)
    seconds = sorted(times)[2]
    return {"op": case.op, "case": case.name, "seconds": seconds, "moved_bytes": case.moved, "operations": case.operations}


def in_words(row: dict) -> str:
    kernels = row["kernels"]
    most = lambda key: max((k[key] for k in kernels), default=0)
    warps = 100 * min((k["occupancy"] for k in kernels), default=0)
    tensor = next((k["tensor_cores"] for k in kernels if k["tensor_cores"]), "-")
    return (
        f"{row['gpu']:5} {row['op']:14} {row['case']:58} {len(row['launches']):2} launches {most('registers'):3} registers "
        f"{most('spilled'):4} B spilled {most('shared') / 1024:6.1f} KiB shared {warps:3.0f} % "
        f"warps {most('widest_load'):2} B loads {tensor:16} floor {row['floor_us']:9.2f} us"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default=",".join(GPUS), help="names, separated by commas")
    parser.add_argument("--op", help="only this operation")
    parser.add_argument("--measure", action="store_true", help="time the cases on the GPU that is here")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    args = parser.parse_args(arguments)
    chosen = [case for case in cases() if args.op in (None, case.op)]
    if unknown := [name for name in args.gpus.split(",") if name not in GPUS]:
        parser.error(f"--gpus {','.join(unknown)}: there are {', '.join(GPUS)}")
    if not chosen:
        parser.error(f"--op {args.op}: there are {', '.join(sorted({case.op for case in cases()}))}")
    rows, failed = [], 0
    if args.measure:
        device = jax.devices()[0]
        gpu = next((g for g in GPUS.values() if g.device_kind == device.device_kind), None)
        if device.platform != "gpu":
            parser.error(f"--measure: the device here is a {device.platform}, not a GPU")
        for case in chosen:
            row = measured(case) | {"device": device.device_kind}
            line = (
                f"{row['op']:14} {row['case']:58} {row['seconds'] * 1e6:9.2f} us {case.moved / row['seconds'] / 1e9:7.0f} GB/s"
            )
            if gpu is not None:
                row["percent_of_peak"] = 100 * floor(case, gpu) / row["seconds"]
                line += f" {row['percent_of_peak']:5.1f} % of peak"
            rows.append(row)
            print(line, file=sys.stderr if args.json else sys.stdout, flush=True)
    else:
        for case in chosen:
            for name in args.gpus.split(","):
                row = compiled(case, name)
                rows.append(row)
                failed += any(k["spilled"] or k["shared"] > GPUS[name].shared for k in row["kernels"]) or not row["kernels"]
                print(in_words(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps(rows))
    if failed:
        print(f"{failed} of {len(rows)} spill, exceed the shared memory, or have no kernel", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
