"""What every worker of cpu_peers.py does: load one system in this process, run the workloads, print one JSON line.

A worker is a script that calls `main` with a function that loads its system. It runs in the environment of that system, so this module
takes the standard library, numpy and Python 3.11. Linux only: start time and memory are read from /proc.

The JSON object of a worker:

    system                     name and versions
    precision                  as asked for
    cache                      format of keys and values, as the system names it
    kernels                    the path that its hot operations take, as far as the system tells
    threads
    bytes_per_token            of weights, read for each token at batch 1
    import_seconds             from the start of the process until its libraries are imported
    load_seconds               from then until the model is loaded
    first_token_seconds        from the start of the process until the first token of a prompt of 5
    peak_memory_bytes          high-water mark after the first token, and the decode workload where it was asked for, above the mark
                               after importing
    bandwidth_gb_per_second    what this process can read from memory
    workloads                  {name: {tokens_per_second, repetitions [tokens a second, one each], ids (the first 16 of the first
                               sequence)}}
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from bandwidth import read_bandwidth

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is" in SmolLM2's vocabulary
IDS_SHOWN = 16
REPETITIONS, SECONDS = 3, 2.0  # of a workload: as many repetitions, fewer where they take longer than this together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A request to time. batch sequences of `prompt` tokens, `new` tokens each.

    rate: tokens a second of what: "decode", from the first new token to the last; "prefill", of the prompt until the first new token;
    "total", new tokens of all sequences over the whole call.
    """

    name: str
    title: str
    rate: str
    prompt: int
    new: int
    batch: int = 1


WORKLOADS = {
    w.name: w
    for w in (
        Workload(name="decode", title="decode", rate="decode", prompt=len(PROMPT), new=128),
        Workload(name="decode_1k", title="decode at 1k", rate="decode", prompt=1024 - 33, new=33),
        Workload(name="decode_4k", title="decode at 4k", rate="decode", prompt=4096 - 33, new=33),
        Workload(name="batch_8", title="batch 8", rate="total", prompt=len(PROMPT), new=64, batch=8),
        Workload(name="batch_32", title="batch 32", rate="total", prompt=len(PROMPT), new=64, batch=32),
        Workload(name="prefill_128", title="prefill 128", rate="prefill", prompt=128, new=1),
        Workload(name="prefill_512", title="prefill 512", rate="prefill", prompt=512, new=1),
        Workload(name="prefill_2048", title="prefill 2048", rate="prefill", prompt=2048, new=1),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """New tokens of each sequence; seconds from the call to the first new token, and to the last one."""

    ids: list[list[int]]
    first_seconds: float
    seconds: float


class Peer(Protocol):
    """A loaded system. compiles: whether the first call of a shape takes longer than later ones. For the rest see the JSON object."""

    system: str
    kernels: str
    cache: str
    compiles: bool

    def bytes_per_token(self) -> int:
        """Of weights, read for each token at batch 1: all but the embedding, of which one row is; a tied one is read as the head."""
        ...

    def generate(self, prompts: Sequence[list[int]], new: int) -> Generated:
        """Greedy tokens, exactly `new` for each prompt whatever they are: no token ends a text."""
        ...


class WorkerError(RuntimeError):
    """The system did not do what was asked of it."""


def prompts_of(workload: Workload, seed: int) -> list[list[int]]:
    """Token ids without meaning, other ones for each seed, so that no system finds its prompt in a cache; short ones start with PROMPT."""
    if workload.prompt == len(PROMPT):
        return [PROMPT, *([*PROMPT[:-1], 1000 + 7 * row] for row in range(1, workload.batch))]
    return [[(i * 37 + row * 101 + seed * 211) % 1000 + 100 for i in range(workload.prompt)] for row in range(workload.batch)]


def run(peer: Peer, workload: Workload, seed: int, new: int) -> Generated:
    """Raises WorkerError unless every sequence got its tokens."""
    out = peer.generate(prompts_of(workload, seed), new)
    counts = [len(ids) for ids in out.ids]
    if counts != [new] * workload.batch:
        raise WorkerError(f"{workload.name}: got {counts} tokens instead of {new} for each of {workload.batch} sequences")
    return out


def tokens_per_second(workload: Workload, out: Generated, new: int) -> float:
    if workload.rate == "decode":
        return (new - 1) / (out.seconds - out.first_seconds)
    return workload.prompt / out.first_seconds if workload.rate == "prefill" else workload.batch * new / out.seconds


def measure(peer: Peer, workload: Workload, most_new: int) -> dict:
    """Median of some repetitions, after one that warms up; a long prompt warms up only what compiles its shapes."""
    new = min(workload.new, most_new)
    long_prompt = workload.rate == "decode" and workload.prompt > len(PROMPT)
    if peer.compiles or not long_prompt:
        run(peer, workload, 0, 2 if long_prompt else new)
    rates: list[float] = []
    ids: list[int] = []
    start = time.perf_counter()
    while not rates or (len(rates) < REPETITIONS and time.perf_counter() - start < SECONDS):
        out = run(peer, workload, 1 + len(rates), new)
        ids = [int(token) for token in out.ids[0][:IDS_SHOWN]]
        rates.append(tokens_per_second(workload, out, new))
    return {"tokens_per_second": statistics.median(rates), "repetitions": rates, "ids": ids}


def seconds_since_start() -> float:
    """Since this process was started, interpreter included, to a hundredth."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_memory() -> int:
    """High-water mark of this process's resident memory, in bytes; unlike ru_maxrss it does not start with its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def gguf_bytes_per_token(path: Path) -> int:
    """`Peer.bytes_per_token` of a system that runs a GGUF file's tensors as they are."""
    import gguf

    tensors = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    return sum(tensors.values()) - (tensors["token_embd.weight"] if "output.weight" in tensors else 0)


def parser(description: str | None, precisions: Sequence[str], caches: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of a worker. precisions: its choices, the first is the default; none: anything. caches: choices, if any."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("model", type=Path)
    out.add_argument("--precision", choices=precisions or None, default=precisions[0] if precisions else None)
    if caches:
        out.add_argument("--cache", choices=caches, help="of keys and values; by default what the system takes by itself")
    out.add_argument("--threads", type=int, default=2)
    out.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["decode", "prefill_512"], metavar="NAME")
    out.add_argument("--tokens", type=int, default=128, help="new tokens, at most (default 128, fewer in some workloads)")
    out.add_argument("--folder", type=Path, help="for what a system keeps between its starts, such as compiled programs")
    return out


def main(load: Callable[[argparse.Namespace], Peer], args: argparse.Namespace) -> None:
    """Load, measure, print."""
    import_seconds, imported = seconds_since_start(), peak_memory()
    peer = load(args)
    load_seconds = seconds_since_start() - import_seconds
    run(peer, WORKLOADS["decode"], 0, 1)
    first_token_seconds = seconds_since_start()
    # decode first: memory is looked at after it, before longer and wider workloads take theirs
    names = sorted(args.workloads, key=lambda name: name != "decode")
    peak, workloads = peak_memory(), {}
    for name in names:
        workloads[name] = measure(peer, WORKLOADS[name], args.tokens)
        if name == "decode":
            peak = peak_memory()
    result = {
        "system": peer.system,
        "precision": args.precision,
        "cache": peer.cache,
        "kernels": peer.kernels,
        "threads": args.threads,
        "bytes_per_token": peer.bytes_per_token(),
        "import_seconds": import_seconds,
        "load_seconds": load_seconds,
        "first_token_seconds": first_token_seconds,
        "peak_memory_bytes": peak - imported,
        "bandwidth_gb_per_second": read_bandwidth(args.threads),
        "workloads": workloads,
    }
    print(json.dumps(result), flush=True)
