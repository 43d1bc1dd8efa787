"""Host memory in large pages, for arrays that CPUs read over and over."""

import contextlib
import mmap

import jax
import numpy as np

PAGE = 2 << 20  # of x86-64 and, with pages of 4 KB, of aarch64
CHUNK = 8 << 20  # what arrays share; it goes when the last one of them does
ALIGN = 64  # bytes; jax takes memory of this alignment as it is


class LargePages:
    """Puts arrays one after another into memory that Linux is asked to back with pages of 2 MB; elsewhere it is memory as any other.

    A core that reads in order needs the place of a new page every 4 KB, and where that is not in its table any more, as with weights, it
    waits for memory to learn it; in a virtual machine twice. Pages that are large from their first touch cost nothing later.
    """

    def __init__(self) -> None:
        self._chunk: np.ndarray | None = None
        self._used = 0

    def put(self, array: np.ndarray | jax.Array, device: jax.Device) -> jax.Array:
        """A copy of the array, as an array of a CPU device."""
        array = np.asarray(array)
        start = -(-self._used // ALIGN) * ALIGN
        if self._chunk is None or start + array.nbytes > self._chunk.size:
            self._chunk, start = _mapped(max(CHUNK, -(-array.nbytes // PAGE) * PAGE)), 0
        self._used = start + array.nbytes
        own = self._chunk[start : self._used].view(array.dtype).reshape(array.shape)
        np.copyto(own, array)
        return jax.device_put(own, device)


def _mapped(size: int) -> np.ndarray:
    """Bytes that begin with a page, all zeros; nothing of them is there before it is written to."""
    flags = {} if not hasattr(mmap, "MAP_PRIVATE") else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, size + PAGE, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a Linux that was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    everything = np.frombuffer(memory, np.uint8)
    skip = -everything.ctypes.data % PAGE
    return everything[skip : skip + size]
