"""Worker: OpenVINO GenAI, reading a GGUF file through its continuous-batching pipeline.

    python scripts/bench/peer_openvino.py MODEL.gguf --precision Q4_1

The file is read as it is: --precision only names the row. Prefix caching, which its simpler pipeline has switched on, is off: with it a
repeated prompt is not read at all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
import worker

CACHES = ("u8", "bf16", "f16", "f32")


class Clock(openvino_genai.StreamerBase):
    """Notes when each token arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: object) -> openvino_genai.StreamingStatus:
        self.times.append(time.perf_counter())
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class OpenVino:
    compiles = True  # code for matrices of a new size is generated when they first appear

    def __init__(self, path: Path, threads: int, cache: str | None):
        self.cache = cache or "u8"
        self.system = f"OpenVINO GenAI {openvino_genai.__version__.split('-')[0]}"
        self.kernels = f"inference in {openvino.Core().get_property('CPU', 'INFERENCE_PRECISION_HINT').get_type_name()}"
        self._path = path
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 2**16  # a whole prompt at once, as its simpler pipeline does
        scheduler.max_num_seqs = 64
        properties = {"INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": self.cache}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", properties)

    def bytes_per_token(self) -> int:
        return worker.gguf_bytes_per_token(self._path)

    def generate(self, prompts: Sequence[list[int]], new: int) -> worker.Generated:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample, config.apply_chat_template = new, True, False, False
        tensors = [openvino.Tensor(np.array([prompt])) for prompt in prompts]
        # a streamer is for one sequence; with several, only the time of all is known
        clock = Clock() if len(prompts) == 1 else None
        start = time.perf_counter()
        results = self._pipeline.generate(tensors, [config] * len(prompts), clock)
        seconds = time.perf_counter() - start
        first = clock.times[0] - start if clock else seconds
        return worker.Generated(ids=[r.m_generation_ids[0] for r in results], first_seconds=first, seconds=seconds)


def load(args: argparse.Namespace) -> OpenVino:
    return OpenVino(args.model, args.threads, args.cache)


if __name__ == "__main__":
    worker.main(load, worker.parser(__doc__, ("Q4_1", "Q4_0", "Q8_0"), CACHES).parse_args())
