"""What `generate --stats` tells: seconds, tokens and bytes a second, memory."""

import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import psutil

from jaxinfer.cli.info import cache_bytes
from jaxinfer.cli.output import format_bytes, print_fields
from jaxinfer.memory import MemoryPlan, cache_bytes_per_token, free_bytes
from pallas_kernels.layer_cache import cache_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """tokens processed in seconds; for decode also the bytes of weights and used cache that were read."""

    tokens: int
    seconds: float
    bytes_read: float | None = None

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        gb = {} if self.bytes_read is None else {"gb_per_second": self.bytes_read / self.seconds / 1e9}
        return {"tokens": self.tokens, "seconds": self.seconds, "tokens_per_second": self.rate, **gb}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """Seconds of wall time. first_token_seconds: from the call of an engine that has compiled; process_first_token_seconds: from
    the start of the process. prefill and decode are None where there were none, or where more prompts than slots mixed them."""

    load_seconds: float
    compile_seconds: float
    first_token_seconds: float
    process_first_token_seconds: float
    total: Phase
    prefill: Phase | None
    decode: Phase | None
    weight_bytes_per_step: int
    memory: MemoryPlan

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("total", "prefill", "decode"):
            values[name] = values[name] and values[name].to_dict()
        return values | {"memory": self.memory.to_dict()}

    def print(self) -> None:
        fields = {
            "load": f"{self.load_seconds:.2f} s",
            "compile": f"{self.compile_seconds:.2f} s",
            "first token": f"{self.first_token_seconds * 1e3:.0f} ms, "
            f"{self.process_first_token_seconds:.2f} s after the process started",
        }
        for name in ("prefill", "decode", "total"):
            phase: Phase | None = getattr(self, name)
            if phase:
                fields[name] = f"{phase.rate:.1f} tokens/s ({phase.tokens} in {phase.seconds:.3g} s)"
                if phase.bytes_read:
                    rate = phase.bytes_read / phase.seconds
                    fields[name] += f", {format_bytes(rate)}/s ({format_bytes(self.weight_bytes_per_step)} of weights a step)"
        fields["memory"] = f"{self.memory.summary()} per device"
        print_fields(fields, sys.stderr)


def measure(
    engine, results: list, params, *, load_seconds: float, compile_seconds: float, start: float, seconds: float
) -> Stats:
    """Stats of a finished call of generate or stream. start: perf_counter() when it began; seconds: how long it took."""
    results = [sample for result in results for sample in (result, *result.alternatives)]
    first = min(r.timings.prefill_seconds for r in results)
    echo = lambda r: len(r.prompt_token_ids) if params.echo else 0
    lengths = [(len(r.prompt_token_ids), len(r.token_ids) - echo(r)) for r in results]
    greedy = params.temperature == 0 and params.logprobs is None
    weights = engine.params.step_bytes(-(-len(results) // engine.stages), greedy=greedy)
    prefill = decode = None
    # all at once: phases do not overlap; and all are here: of best_of some are not
    if len(results) <= engine.config.micro_batch_size * engine.stages and params.best_of is None:
        prefill = Phase(tokens=sum(p for p, _ in lengths), seconds=max(r.timings.prefill_seconds for r in results))
        decode_seconds, decoded = max(r.timings.decode_seconds for r in results), sum(n - 1 for _, n in lengths)
        if decoded:
            dtype = engine.config.kv_cache.dtype or engine.config.dtype or "float32"
            # a step reads the weights once for all sequences, and each one's cache, which grows from p to p + n
            steps, cached = max(n - 1 for _, n in lengths), sum((n - 1) * (p + n / 2) for p, n in lengths)
            read = steps * weights + cached * cache_bytes(engine.plan.config, dtype)
            decode = Phase(tokens=decoded, seconds=decode_seconds, bytes_read=read)
    return Stats(
        load_seconds=load_seconds,
        compile_seconds=compile_seconds,
        first_token_seconds=first,
        process_first_token_seconds=process_age() - (time.perf_counter() - start) + first,
        total=Phase(tokens=sum(n for _, n in lengths), seconds=seconds),
        prefill=prefill,
        decode=decode,
        weight_bytes_per_step=weights,
        memory=_memory(engine),
    )


def _memory(engine) -> MemoryPlan:
    """The engine's plan, from what it holds: the weights are placed, a cache for all slots is what it may come to take."""
    config = engine.config
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params)) // engine.mesh.devices.size
    per_token = cache_bytes_per_token(engine.plan, cache_dtype(config.kv_cache.dtype or config.dtype or "float32"))
    tokens = config.inference_max_tokens * config.micro_batch_size * engine.stages
    return MemoryPlan(weights=weights, cache=tokens * per_token, free=free_bytes(engine.mesh) + weights)


def process_age() -> float:
    """Seconds since this process started."""
    with contextlib.suppress(OSError, AttributeError):  # Linux keeps it in hundredths, psutil's answer may be off by a second
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()
