"""How every GPU kernel is checked: its numbers in the interpreter, or compiled where there is a GPU; its resources without one."""

import contextlib

import jax
import numpy as np

from pallas_kernels.deviceless import Compiled, compile_for
from pallas_kernels.gpus import GPUS
from pallas_kernels.target import interpreting

GPU_NAMES = tuple(GPUS)
ON_GPU = jax.default_backend() == "gpu"


def kernels() -> contextlib.AbstractContextManager[None]:
    """While inside, GPU kernels are chosen: compiled on a GPU, else interpreted."""
    return contextlib.nullcontext() if ON_GPU else interpreting()


def compiled(gpu: str, function, *args, launches: tuple[str, ...], registers: int = 255) -> Compiled:
    """`function` compiled for a GPU: it launches these kernels in this order and nothing else, which do not spill and fit its limits."""
    found = compile_for(gpu, function, *args)
    assert found.launches == launches
    assert found.kernels
    for kernel in found.kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.registers <= registers, kernel
        assert kernel.registers * kernel.threads <= 65536, kernel
        assert kernel.shared <= GPUS[gpu].shared, kernel
    return found


def close(found, wanted, tolerance: float) -> None:
    """Whether arrays agree up to a part of the largest value of the wanted one."""
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        f, w = np.asarray(f, np.float64), np.asarray(w, np.float64)
        assert f.shape == w.shape
        np.testing.assert_allclose(f, w, rtol=0, atol=tolerance * max(1e-30, np.abs(w).max(initial=0)))
