"""Worker: jaxinfer.

    python scripts/bench/worker_jaxinfer.py MODEL --precision float32
    python scripts/bench/worker_jaxinfer.py MODEL --precision int8 --cache bfloat16 --kernels xla

--precision is a dtype, "stored" (packed weights as the checkpoint holds them), or a short form of quantisation (see
jaxinfer.QuantizationConfig.parse). --kernels is that of EngineConfig. Compiled programs are kept in --folder; what `jaxinfer compile` wrote
beside a checkpoint is not taken. Its threads are the cores that the process may use, whatever --threads says.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import worker

from jaxinfer import SamplingParams, init_inference
from pallas_kernels import registry
from pallas_kernels.cpu import library

DTYPES = ("float32", "bfloat16", "float16")
CACHES = ("float32", "bfloat16", "int8", "fp8", "int4")
LAYER_OPERATIONS = ("attention_block", "mlp_block")


class Jaxinfer:
    compiles = True

    def __init__(self, args: argparse.Namespace):
        # beside quantised weights 16 bits, as llama.cpp has them; OpenVINO takes 8
        self.cache = args.cache or (args.precision if args.precision in DTYPES else "bfloat16")
        workloads = [worker.WORKLOADS[name] for name in ("decode", *args.workloads)]
        config: dict[str, Any] = {
            "inference_max_tokens": max(w.prompt + w.new for w in workloads),
            "micro_batch_size": max(w.batch for w in workloads),
            "kv_cache": {"dtype": self.cache},
            "kernels": args.kernels,
            "compilation_cache": args.folder,
            "executables": False,
        }
        if args.precision in DTYPES:
            config["dtype"] = args.precision
        elif args.precision != "stored":
            config |= {"dtype": "float32", "quantization": args.precision}
        self._taken = watch(LAYER_OPERATIONS)
        self._engine = init_inference(args.model, config)
        self.system = f"jaxinfer, jax {jax.__version__}"

    @property
    def kernels(self) -> str:
        """What the programs that were traced so far took for each half layer."""
        written = [f"{op} {' and '.join(sorted(names))}" for op, names in self._taken.items()]
        native = any("native" in names for names in self._taken.values())
        found = library.load()
        if native and not isinstance(found, str):
            written.append(f"native kernels on {library.instruction_set()} with {library.threads()} threads")
        return ", ".join(written)

    def bytes_per_token(self) -> int:
        return self._engine.params.step_bytes(1)

    def generate(self, prompts: Sequence[list[int]], new: int) -> worker.Generated:
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        results = self._engine.generate(list(prompts), sampling)
        seconds = time.perf_counter() - start
        decoding = max(result.timings.decode_seconds for result in results)
        return worker.Generated(ids=[r.token_ids for r in results], first_seconds=seconds - decoding, seconds=seconds)


def watch(operations: Sequence[str]) -> dict[str, set[str]]:
    """{operation: names of its implementations that are traced from now on}; it grows, and costs nothing when programs run."""
    taken: dict[str, set[str]] = {op: set() for op in operations}

    def watched(one: registry.Implementation) -> Callable[..., Any]:
        @functools.wraps(one.function)
        def function(*args: Any, **options: Any) -> Any:
            taken[one.op].add(one.name)
            return one.function(*args, **options)

        return function

    for op in operations:
        for one in registry.implementations(op):
            registry.register(op, one.name, watched(one), supports=one.supports, priority=one.priority, replace=True)
    return taken


def command() -> argparse.ArgumentParser:
    out = worker.parser(__doc__, (), CACHES)
    out.set_defaults(precision="float32")
    out.add_argument("--kernels", choices=("auto", "native", "xla"), default="auto")
    return out


if __name__ == "__main__":
    worker.main(Jaxinfer, command().parse_args())
