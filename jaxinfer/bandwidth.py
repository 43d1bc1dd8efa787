"""What this process can read from memory, in GB/s. numpy alone, so that any environment can measure it beside its own speed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def read_bandwidth(threads: int, megabytes: int = 256, repetitions: int = 10) -> float:
    """GB/s of the fastest of `repetitions` reads of an array far larger than the caches, one slice for each thread."""
    array = np.ones(megabytes * 2**20 // 4, np.float32)
    slices = np.array_split(array, threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repetitions):
            start = time.perf_counter()
            list(pool.map(np.max, slices))
            seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds) / 1e9
