"""Worker: jaxinfer.

    python scripts/bench/worker_jaxinfer.py MODEL --precision float32
    python scripts/bench/worker_jaxinfer.py MODEL --precision int8 --cache bfloat16

--precision is a dtype, "stored" (packed weights as the checkpoint holds them), or a short form of quantisation (see
jaxinfer.QuantizationConfig.parse). Compiled programs are kept in --folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import jax
import worker

from jaxinfer import SamplingParams, init_inference
from pallas_kernels import registry

DTYPES = ("float32", "bfloat16", "float16")
CACHES = ("float32", "bfloat16", "int8")
LAYER_OPERATIONS = ("attention_block", "mlp_block")


class Jaxinfer:
    compiles = True

    def __init__(self, args: argparse.Namespace):
        self.cache = args.cache or (args.precision if args.precision in DTYPES else "float32")
        workloads = [worker.WORKLOADS[name] for name in ("decode", *args.workloads)]
        config: dict[str, Any] = {
            "inference_max_tokens": max(w.prompt + w.new for w in workloads),
            "micro_batch_size": max(w.batch for w in workloads),
            "kv_cache": {"dtype": self.cache},
            "compilation_cache": args.folder,
        }
        if args.precision in DTYPES:
            config["dtype"] = args.precision
        elif args.precision != "stored":
            config |= {"dtype": "float32", "quantization": args.precision}
        self._engine = init_inference(args.model, config)
        self.system = f"jaxinfer, jax {jax.__version__}"
        self.kernels = ", ".join(f"{op}: {preferred(op)}" for op in LAYER_OPERATIONS)

    def bytes_per_token(self) -> int:
        params = self._engine.params
        unread = 0 if params.head is None else sum(leaf.nbytes for leaf in jax.tree.leaves(params.embedding))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - unread

    def generate(self, prompts: Sequence[list[int]], new: int) -> worker.Generated:
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        results = self._engine.generate(list(prompts), sampling)
        seconds = time.perf_counter() - start
        decoding = max(result.timings.decode_seconds for result in results)
        return worker.Generated(ids=[r.token_ids for r in results], first_seconds=seconds - decoding, seconds=seconds)


def preferred(operation: str) -> str:
    """The implementation that an operation takes on this platform, unless facts of its arguments speak against it."""
    return registry.implementations(operation)[0].name


def command() -> argparse.ArgumentParser:
    out = worker.parser(__doc__, (), CACHES)
    out.set_defaults(precision="float32")
    return out


if __name__ == "__main__":
    worker.main(Jaxinfer, command().parse_args())
