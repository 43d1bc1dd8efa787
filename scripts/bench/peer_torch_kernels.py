#!/usr/bin/env python
"""Peer of the kernels: torch's own. Reads a JSON list of {op, name, arrays [[shape, dtype]]} and prints one of {op, name, seconds}.

    python scripts/bench/peer_torch_kernels.py --device cuda < cases.json

For operations that torch has one kernel for: norms, softmax, attention of queries at the end of a cache, products of floats. Each is the
median of several runs of many calls; on a GPU by its own clock. Needs no jax.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch.nn import functional

CALLS, RUNS = 20, 5


def attend(q, k, v):
    """q [B, T, N, H], k and v [B, K, S, H]: causal where every key has its query, else all keys are seen."""
    q = q.transpose(1, 2).to(k.dtype)
    return functional.scaled_dot_product_attention(
        q, k, v, is_causal=q.shape[2] == k.shape[2], enable_gqa=q.shape[1] != k.shape[1]
    )


OPERATIONS = {
    "rms_norm": lambda x, scale: functional.rms_norm(x, x.shape[-1:], scale.to(x.dtype), 1e-5),
    "softmax": lambda x: torch.softmax(x, -1),
    "attention": attend,
    "quant_matmul": lambda x, w: functional.linear(x.to(w.dtype), w),
}
ARRAYS = {"rms_norm": 2, "softmax": 1, "attention": 3, "quant_matmul": 2}


def clock(call, device: str) -> float:
    """Seconds a call."""
    call()
    times = []
    for _ in range(RUNS):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(CALLS):
                call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.append(time.perf_counter() - begun)
    return statistics.median(times) / CALLS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    found = []
    for case in json.load(sys.stdin):
        run, shapes = OPERATIONS.get(case["op"]), case["arrays"]
        if run is None or len(shapes) != ARRAYS[case["op"]]:
            continue
        with torch.no_grad():
            arrays = [torch.randn(shape, dtype=getattr(torch, dtype), device=args.device) for shape, dtype in shapes]
            seconds = clock(lambda run=run, arrays=arrays: run(*arrays), args.device)
        found.append({"op": case["op"], "name": case["name"], "seconds": seconds})
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
