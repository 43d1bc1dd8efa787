"""Every kernel at every size of a real model, in every element type, compiled for GPUs that are not here; none may spill a register.

Every size is compiled for every GPU, and every program for one of them; the full product is marked so.

The other tests of a room compile a choice of these, and look closer. What is not compiled is the same program again: two weights that
are cut into the same tiles, and whose sizes are divisible by the same powers of two, differ in numbers that are compared with and
multiplied by; and numbers of rows that are a grid's are no part of a kernel.
"""

import zlib
from collections.abc import Iterator

import jax
import pytest
from kernel_checks import GPU_NAMES
from kernel_products import PRODUCTS, Program

from pallas_kernels import tuning
from pallas_kernels.deviceless import entries, is_ours, trace_for
from pallas_kernels.errors import BackendError
from pallas_kernels.gpus import GPUS
from pallas_kernels.registry import implementations, operations, using

ALIGNED = 32  # elements of the widest access: no program depends on more of the divisibility of an axis
PARTS = 1024  # but that of the last axis, which is cut into parts and steps

# in files of their own, where they look at what XLA does not show
ELSEWHERE = {
    ("attention", "cudnn"),  # a library's
    ("attention", "mosaic"),
    ("fused_matmul", "xla"),  # the kernel of its norm, and XLA's products
    ("fused_norm", "jax_triton"),
    ("layer_norm", "jax_triton"),
    ("quant_matmul", "jax_triton"),
    ("quant_matmul", "mosaic"),
    ("quant_matmul", "xla"),  # as those of `fused_matmul`
    ("rms_norm", "jax_triton"),
}


def test_none_is_left_out():
    """Each implementation that is neither the meaning of its operation nor made for CPUs has its programs."""
    found = {(op, one.name) for op in operations() for one in implementations(op)}
    found = {(op, name) for op, name in found if name not in ("reference", "native")}
    assert found == {(op, "pallas") for op in PRODUCTS} | ELSEWHERE


class Tiles:
    """Keeps which tiles a trace asks for."""

    def __init__(self):
        self.found = []

    def tile(self, op, key, tile):
        self.found.append((op, tile, *(value for value in key.values() if not isinstance(value, int))))


def divisor(size: int, widest: int) -> int:
    """All of a size below 16, else the largest power of two up to `widest` that divides it."""
    return size if size <= 16 else min(size & -size, widest)


_WRONG: dict[tuple, list[str]] = {}


def wrong(gpu: str, program: Program) -> list[str]:
    """What is wrong with a program, in words; of those that differ in sizes alone one is compiled."""
    tiles, shapes = Tiles(), [(a.dtype, *a.shape) for a in jax.tree.leaves(program.args)]
    if program.tiled:
        cut = lambda shape: (*(divisor(n, ALIGNED) for n in shape[:-1]), *(divisor(n, PARTS) for n in shape[-1:]))
        shapes = [(a.dtype, *cut(a.shape)) for a in jax.tree.leaves(program.args)]

    def judged(traced):
        key = (gpu, program.name, program.kernels, *tiles.found, *shapes)
        if key not in _WRONG:
            _WRONG[key] = list(problems(gpu, program, traced.lower()))
        return _WRONG[key]

    with tuning.watching(tiles):
        return trace_for(gpu, program.run, *program.args, then=judged)


def problems(gpu: str, program: Program, lowered) -> Iterator[str]:
    try:
        kernels = [kernel for kernel in entries(lowered) if is_ours(kernel)]
    except BackendError as error:
        yield str(error)
        return
    names = {kernel.name.partition("__")[0] for kernel in kernels}
    if names != set(program.kernels):
        yield f"it launches {sorted(names)}"
    for kernel in kernels:
        if kernel.shared > GPUS[gpu].shared:
            yield f"{kernel.name} takes {kernel.shared} bytes of shared memory"
        if kernel.name.partition("__")[0] == program.kernels[0]:
            if program.matrix and not kernel.tensor_cores:
                yield f"{kernel.name} has no tensor-core instruction"
            if kernel.widest_load < program.loads:
                yield f"{kernel.name} reads {kernel.widest_load} bytes at once"


def programs_of(op: str, name: str, gpu: str, turns: bool) -> list[Program]:
    """Of an operation at a size: those that a GPU can run; with `turns` a share of them, so that each program has its turn on one GPU, the
    neighbours of one on different ones, and every GPU one at least."""
    found, able = [], []
    for number, program in enumerate(PRODUCTS[op][1](name), zlib.crc32(name.encode())):
        gpus = [other for other in GPU_NAMES if program.since <= GPUS[other].capability]
        if gpu in gpus:
            able.append(program)
        if gpu == gpus[number % len(gpus)]:
            found.append(program)
    return found or able[:1] if turns else able


@pytest.mark.aot
@pytest.mark.parametrize("turns", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("op", "name", "gpu"), [(op, n, gpu) for op, (names, _) in PRODUCTS.items() for n in names for gpu in GPU_NAMES]
)
def test_compiles(op, name, gpu, turns):
    found = {}
    with using({op: "pallas"}):
        for program in programs_of(op, name, gpu, turns):
            if said := wrong(gpu, program):
                found[program.name] = said
    assert not found
