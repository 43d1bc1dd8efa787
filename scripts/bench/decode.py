"""Decode speed at batch 1 of jaxinfer and of transformers, beside each other and beside what the memory gives.

Every figure comes from a fresh process; the systems take turns, since a machine's speed may change between processes.
Ratios are taken within a round. Decoding reads all weights once a token: GB/s is bytes a token times tokens a second,
and its share is of the bandwidth that the same process measured.

    python scripts/bench/decode.py MODEL.gguf --oracle-python ORACLE/bin/python
    python scripts/bench/decode.py MODEL.gguf --systems jaxinfer:float32 jaxinfer:int8 --rounds 5 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEFAULT_SYSTEMS = (
    "transformers:float32",
    "jaxinfer:float32",
    "transformers:bfloat16",
    "jaxinfer:bfloat16",
    "jaxinfer:int8",
)
FLOATS = ("float32", "bfloat16", "float16")


class BenchmarkError(RuntimeError):
    """A worker process failed, or printed no result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """One row of the table: whose engine, at which precision."""

    engine: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.engine}:{self.precision}"

    @property
    def peer(self) -> str:
        """The row that its ratio is taken to; a quantised model is compared with its peer's fastest precision."""
        return f"transformers:{self.precision if self.precision in FLOATS else 'bfloat16'}"

    def command(self, args: argparse.Namespace) -> list[str]:
        shared = [args.model, "--threads", str(args.threads), "--tokens", str(args.tokens), "--prefill", str(args.prefill)]
        if self.engine == "transformers":
            return [args.oracle_python, str(HERE / "peer_transformers.py"), *shared, "--dtype", self.precision]
        precision = ["--dtype", self.precision]
        if self.precision not in FLOATS:
            precision = ["--dtype", args.quantized_dtype, "--quantize", self.precision]
        return [sys.executable, str(HERE / "worker_jaxinfer.py"), *shared, *precision]


def parse_system(text: str) -> System:
    engine, _, precision = text.partition(":")
    if engine not in ("jaxinfer", "transformers") or not precision:
        raise argparse.ArgumentTypeError(f"{text!r} is not jaxinfer:PRECISION or transformers:PRECISION")
    if engine == "transformers" and precision not in FLOATS:
        raise argparse.ArgumentTypeError(f"transformers runs at {', '.join(FLOATS)} here, not at {precision!r}")
    return System(engine=engine, precision=precision)


def run_worker(system: System, args: argparse.Namespace) -> dict:
    """The JSON line of one fresh process."""
    command = system.command(args)
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    if system.engine == "jaxinfer":
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise BenchmarkError(f"{system.name} ended with code {done.returncode}: {' '.join(command)}\n{tail}")
    return json.loads(lines[-1])


def limit_cores(threads: int) -> None:
    """Keeps this process and its children on `threads` cores, so that no system takes more than its peers."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < threads:
            raise BenchmarkError(f"--threads {threads} but this process may use {len(cores)} cores")
        os.sched_setaffinity(0, cores[:threads])


def measure(systems: list[System], args: argparse.Namespace) -> dict[str, list[dict]]:
    """One result a system and round; each round starts with another system."""
    results: dict[str, list[dict]] = {system.name: [] for system in systems}
    for turn in range(args.rounds):
        start = turn % len(systems)
        for system in systems[start:] + systems[:start]:
            result = run_worker(system, args)
            results[system.name].append(result)
            rate = result["decode_tokens_per_second"]
            print(f"round {turn + 1}/{args.rounds} {system.name}: {rate:.1f} tok/s", file=sys.stderr, flush=True)
    return results


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(systems: list[System], results: dict[str, list[dict]]) -> list[dict]:
    """A row for each system: medians with their range over the rounds, and the ratio to its peer round by round."""
    rows = []
    for system in systems:
        runs = results[system.name]
        peers = results.get(system.peer, [])
        reached = [run["bytes_per_token"] * run["decode_tokens_per_second"] / 1e9 for run in runs]
        row = {
            "name": system.name,
            "system": runs[0]["system"],
            "megabytes_per_token": runs[0]["bytes_per_token"] / 1e6,
            "gb_per_second": spread(reached),
            "bandwidth_gb_per_second": spread([run["bandwidth_gb_per_second"] for run in runs]),
            "bandwidth_share": spread([r / run["bandwidth_gb_per_second"] for r, run in zip(reached, runs, strict=True)]),
            "peer": system.peer,
        }
        for key in ("decode_tokens_per_second", "prefill_tokens_per_second", "load_seconds", "first_token_seconds"):
            row[key] = spread([run[key] for run in runs])
        for kind in ("decode", "prefill") if peers else ():
            key = f"{kind}_tokens_per_second"
            row[f"{kind}_ratio"] = spread([run[key] / peer[key] for run, peer in zip(runs, peers, strict=True)])
        rows.append(row)
    return rows


def _cell(values: dict[str, float] | None, digits: int = 1) -> str:
    if values is None:
        return "-"
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}-{values['max']:.{digits}f})"


def table(rows: list[dict]) -> str:
    """The rows as text: median (smallest-largest)."""
    heads = ["system", "decode tok/s", "x peer", "prefill tok/s", "x peer", "MB/token", "GB/s", "of", "share", "load s", "peer"]
    cells = [
        [
            row["name"],
            _cell(row["decode_tokens_per_second"]),
            _cell(row.get("decode_ratio"), 2),
            _cell(row["prefill_tokens_per_second"], 0),
            _cell(row.get("prefill_ratio"), 2),
            f"{row['megabytes_per_token']:.1f}",
            f"{row['gb_per_second']['median']:.1f}",
            f"{row['bandwidth_gb_per_second']['median']:.1f}",
            f"{row['bandwidth_share']['median']:.0%}",
            f"{row['load_seconds']['median']:.1f}",
            row["peer"],
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in [heads, *cells]
    )


def processor() -> str:
    """The processor's name, for the heading."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .gguf file or a Hugging Face folder that both systems read")
    parser.add_argument("--oracle-python", metavar="PYTHON", help="Python of the oracle environment; without it no peer is run")
    parser.add_argument("--systems", nargs="+", type=parse_system, metavar="NAME", help=f"default: {' '.join(DEFAULT_SYSTEMS)}")
    parser.add_argument("--quantized-dtype", default="float32", help="activations of the quantised rows (default float32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="print everything measured as one JSON object")
    args = parser.parse_args()
    systems = args.systems or [parse_system(text) for text in DEFAULT_SYSTEMS]
    if not args.oracle_python:
        if skipped := [system.name for system in systems if system.engine == "transformers"]:
            print(f"without --oracle-python these are left out: {', '.join(skipped)}", file=sys.stderr)
        systems = [system for system in systems if system.engine != "transformers"]
    if not systems:
        parser.error("nothing to run")
    try:
        limit_cores(args.threads)
        results = measure(systems, args)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    rows = summarise(systems, results)
    machine = f"{processor()}, {args.threads} threads, batch 1, {args.tokens} greedy tokens"
    machine += f", prefill {args.prefill}, {args.rounds} rounds"
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows, "runs": results}))
    else:
        print(machine, table(rows), "median (smallest-largest) over the rounds; 'of' is the bandwidth measured", sep="\n")


if __name__ == "__main__":
    main()
