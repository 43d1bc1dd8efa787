"""Arrays in large pages: what is put there is what comes out, without a second copy, and Linux gives large pages where it has them."""

import gc
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cpu.pages import ALIGN, CHUNK, PAGE, LargePages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mapping_of(array) -> dict[str, int]:
    """Bytes of each kind in the mapping that an array lies in, as /proc/self/smaps has them."""
    at, inside, found = array.unsafe_buffer_pointer(), False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= at < int(span[2], 16)
        elif inside and line.endswith(" kB"):
            name, size = line.removesuffix(" kB").split(":")
            found[name] = int(size) << 10
    return found


def test_arrays(rng):
    device, pages = jax.devices("cpu")[0], LargePages()
    shapes = [(3,), (0, 4), (), (17, 5), (1 << 20,), (CHUNK // 4 + 1,), (7, 1)]
    dtypes = (np.float32, jnp.bfloat16, np.int8, np.float16, np.bool_)
    given = [(rng.standard_normal(shape) * 9).astype(dtype) for shape in shapes for dtype in dtypes]
    given += [np.arange(24).reshape(4, 6).T, jnp.arange(5)]  # neither in order nor of numpy
    arrays = [pages.put(a, device) for a in given]
    spans = []
    for a, got in zip(given, arrays, strict=True):
        assert (got.shape, got.dtype) == (a.shape, jnp.asarray(a).dtype) or a.dtype == np.int64
        np.testing.assert_array_equal(np.asarray(got), np.asarray(a))
        assert got.devices() == {device} and got.unsafe_buffer_pointer() % ALIGN == 0
        spans += [(got.unsafe_buffer_pointer(), got.unsafe_buffer_pointer() + got.nbytes)] if got.nbytes else []
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_memory_is_large_pages_and_goes_with_its_arrays():
    if not SETTING.is_file() or "[never]" in SETTING.read_text():
        pytest.skip("this Linux gives no large pages")
    device, pages = jax.devices("cpu")[0], LargePages()
    arrays = [pages.put(np.ones(PAGE // 4, np.float32), device) for _ in range(3 * CHUNK // PAGE)]
    held = mapping_of(arrays[0])
    if held.get("AnonHugePages", 0) == 0:
        pytest.skip("this Linux has no large page free")
    assert arrays[0].unsafe_buffer_pointer() % PAGE == 0
    size = lambda: int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    before = size()
    del arrays[: 2 * CHUNK // PAGE]
    gc.collect()
    assert before - size() > 2 * CHUNK * 0.9
    np.testing.assert_array_equal(np.asarray(arrays[-1]), 1)
