"""A process of its own that loads a model, measures itself and prints one line of JSON; test_smollm2.py starts it.

python loading_child.py '{"source": PATH, "config": {...}, "processes": N, "process": I, "port": P, "prompts": {name: ids}}'

"tokens": of each text, 64 by default. "cores": so many of those that there are. "alone": every prompt also by itself.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import jaxinfer
from jaxinfer import api, placement
from jaxinfer.sampling_params import SamplingParams


def resident(name: str) -> int:
    """VmRSS or VmHWM (the most since the process began, or since `forget_peak`), in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Counted:
    """A tensor that counts the bytes that are read of it."""

    def __init__(self, tensor: placement.Readable, reads: list[int]):
        self.tensor, self.reads, self.shape = tensor, reads, tensor.shape

    def read(self, units=None):
        out = self.tensor.read(units)
        self.reads.append(sum(leaf.nbytes for leaf in jax.tree.leaves(out)))
        return out


def count_reads() -> list[int]:
    """Bytes of every read that placing does from now on."""
    reads: list[int] = []
    place = api.place

    def counting(source: Mapping[str, placement.Readable], mesh, **keywords: Any) -> placement.Placed:
        return place({path: Counted(tensor, reads) for path, tensor in source.items()}, mesh, **keywords)

    api.place = counting
    return reads


def main(job: dict[str, Any]) -> dict[str, Any]:
    if "cores" in job:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["cores"]])
    if job.get("processes", 1) > 1:
        address = f"127.0.0.1:{job['port']}"
        jax.distributed.initialize(address, job["processes"], job["process"], initialization_timeout=90)
    jax.devices()
    reads = count_reads()
    forget_peak()
    before = resident("VmRSS")
    engine = jaxinfer.init_inference(job["source"], job["config"])
    jax.block_until_ready(engine.params)
    peak = resident("VmHWM") - before
    leaves = jax.tree.leaves(engine.params)
    kept = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    sampling = SamplingParams(max_tokens=job.get("tokens", 64), ignore_eos=True)
    prompts = job.get("prompts", {})
    results = engine.generate(list(prompts.values()), sampling) if prompts else []
    single = {name: engine.generate(prompt, sampling).token_ids for name, prompt in prompts.items()} if job.get("alone") else {}
    return {
        "peak": peak,
        "kept": kept,
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "largest": max(leaf.nbytes for leaf in leaves),
        "read": sum(reads),
        "devices": [len(jax.local_devices()), len(jax.devices())],
        "ids": {name: result.token_ids for name, result in zip(prompts, results, strict=True)},
        "alone": single,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
