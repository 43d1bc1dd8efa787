#!/usr/bin/env python
"""Which tiles the matmul kernel takes by default on each generation of GPUs, and the figures that they follow from. Nothing is run.

    python scripts/bench/tile_report.py [--gpus a100,a10,l40s,h100,b200] [--output benchmarks]

For matmuls of few rows, which reading the weight bounds. From the compiler: registers a thread, bytes of shared memory, and how many
programs of these fit a processor. From the tile: bytes of the weight that a processor has under way, beside latency times bandwidth, which
it needs so that memory is never idle (the latency is an assumption, `tiles.LATENCY`); and the bytes that all loads ask for as times of the
weight's own.
--output writes tiles.txt. Needs what kernel_report.py needs.
"""

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from kernel_report import occupancy, versions

from pallas_kernels import tuning
from pallas_kernels.cases import weight
from pallas_kernels.deviceless import compile_for
from pallas_kernels.gpus import KNOWN, Gpu
from pallas_kernels.platforms import leave_out_absent_gpus
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul.specs import SPECS
from pallas_kernels.quant_matmul.tiles import LATENCY, Problem, Tile, blocks, needed, under_way

CASES = (
    ("llama_3_1_8b.q", "bfloat16", 1),
    ("llama_3_1_8b.q", "int8", 1),
    ("llama_3_1_8b.q", "int4 g128", 1),
    ("llama_3_1_8b.q", "mxfp4", 1),
    ("llama_3_1_8b.gate", "int4 g128", 1),
    ("llama_3_1_8b.down", "int4 g128", 16),
    ("llama_3_1_8b.down", "int8", 16),
)


class _Watcher:
    """Keeps the tile that a trace asks for."""

    found: tuple[dict[str, Any], Tile]

    def tile(self, op: str, key, tile) -> None:
        if op == "quant_matmul":
            self.found = dict(key), tile


def row(name: str, form: str, rows: int, gpu: Gpu, card: str) -> str:
    """A line of the report."""
    spec, watcher = SPECS[name], _Watcher()
    x, w = jax.ShapeDtypeStruct((rows, spec.inputs), jnp.float32), weight((spec.outputs, spec.inputs), form)
    with tuning.watching(watcher):
        (kernel,) = compile_for(card, quant_matmul, x, w).kernels
    key, tile = watcher.found
    problem = Problem(**{field: value for field, value in key.items() if field != "format"})
    fit = round(occupancy(kernel, gpu) * 64 * 32 / kernel.threads)
    asked = 1 + blocks(tile, problem) * tile.rows * spec.inputs * 4 / (spec.outputs * spec.inputs * problem.bits / 8)
    return (
        f"{card:5} {name:18} {form:10} {rows:2} rows: {tile.outputs:3} outputs x {tile.splits} splits, {tile.inputs:3} inputs, "
        f"{tile.warps} warps, {tile.stages} stages; {kernel.registers:3} registers, {kernel.shared / 1024:5.1f} KiB shared, {fit:2} fit, "
        f"{blocks(tile, problem):4} programs; {under_way(tile, problem, gpu) / 1024:5.1f} KiB under way of "
        f"{needed(tile, problem, gpu) / 1024:4.1f} needed; loads ask for {asked:.2f} weights"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="a100,a10,l40s,h100,b200", help="names, separated by commas")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write tiles.txt there")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.gpus.split(",") if name not in KNOWN]:
        parser.error(f"--gpus {','.join(unknown)}: there are {', '.join(KNOWN)}")
    leave_out_absent_gpus()
    facts = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [
        f"tiles by default, not measured on a GPU; latency {LATENCY * 1e9:.0f} ns; {datetime.date.today().isoformat()}, {facts}"
    ]
    for card in args.gpus.split(","):
        for case in CASES:
            lines.append(row(*case, KNOWN[card], card))
            print(lines[-1], flush=True)
    if args.output:
        (args.output / "tiles.txt").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
