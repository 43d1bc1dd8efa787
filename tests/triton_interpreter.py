"""Run by tests in a process of its own: a kernel in the Triton language on numpy arrays, by Triton's interpreter and without torch.

Triton either interprets or compiles, whichever the environment said when it was first imported.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl

from pallas_kernels.qtensor import dequantize, round_to_nearest
from pallas_kernels.quant_matmul import jax_triton


class Tensor:
    """What the interpreter asks of a tensor, around a numpy array whose memory it reads and writes."""

    device = "cpu"

    def __init__(self, array: np.ndarray):
        assert array.flags.c_contiguous
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Tensor":
        return self

    def cpu(self) -> "Tensor":
        return self

    def copy_(self, other) -> None:
        pass  # the memory is the same

    def new_empty(self, *_, **__) -> "Tensor":
        return Tensor(self.array)

    def set_(self, *_) -> "Tensor":
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize

    def numel(self) -> int:
        return self.array.size


def main() -> None:
    rng = np.random.default_rng(int(sys.argv[1]))
    for group, symmetric, point, rows, outputs in (
        (32, True, False, 1, 40),
        (64, False, False, 3, 33),
        (128, True, True, 8, 16),
    ):
        w = round_to_nearest(
            rng.standard_normal((outputs, 256)).astype(np.float32), format="int4", group=group, symmetric=symmetric
        )
        if point:
            w = w.replace(zeros=rng.integers(0, 16, w.scales.shape).astype(np.uint8))
        x, y = rng.standard_normal((rows, 256)).astype(np.float32), np.full((rows, outputs), np.nan, np.float32)
        arrays = [Tensor(np.ascontiguousarray(a)) for a in (x, w.values, w.scales, w.scales if w.zeros is None else w.zeros)]
        # its bfloat16 are bit patterns without arithmetic
        options = jax_triton.constants(w, rows) | {"BLOCK": 32, "DTYPE": tl.float32}
        jax_triton.kernel[(-(-outputs // 32),)](*arrays, Tensor(y), **options)
        wanted = x.astype(np.float64) @ dequantize(w).astype(np.float64).T
        error = np.abs(y - wanted).max() / np.abs(wanted).max()
        assert error < 1e-5, (group, symmetric, point, error)


main()
