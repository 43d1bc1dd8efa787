"""How the GPU kernel cuts a matmul into programs, and what it takes where nothing was measured.

A program multiplies a tile of the weight [outputs * splits, inputs] with columns made of the rows of x, on tensor cores. At least eight
columns are paid for in any case, so a few rows of x leave columns free; they are used for what a matmul of one row lacks:

    terms     a float32 x as the sum of two bfloat16, 2^-17 exact
    groups    inputs of different scales kept apart, so that one product covers several groups
    splits    further parts of the inputs, so that a weight of few outputs still makes enough programs and warps

Rows of the tile count (split, output), columns (split, term, group, row); what does not belong together is zero or left out of the
last sum.

Bytes: every byte of the weight is read once per tile of rows of x, 16 at a time, along its inputs (the canonical layout: no repacking).
Instructions per weight, small M: bfloat16 none beside the tensor core's; int8 1.5 (convert and pack); int4 1.6 (a byte permute, a three-way
logic operation that makes 128 + nibble in bfloat16, and a subtraction, each for two weights; a shift for four).
"""

import dataclasses

from pallas_kernels.errors import BackendError
from pallas_kernels.gpus import Gpu
from pallas_kernels.kernel_math import power_of_two

SMALL = 16  # rows of x up to which a matmul is bound by reading the weight
WARPGROUPS = (9, 0)  # Hopper: the first whose tensor cores are given work by four warps together
LATENCY = 7e-7  # seconds of a load while memory is busy, twice those of an idle one (270 to 330 ns: Luo et al. 2024, arXiv:2402.13499)
MOST_STAGES = 8
BUSY = 0.4  # of the processors, which can draw all of the bandwidth if each has enough under way
COLUMNS = 8  # of a tensor core's product, at least
_COLUMNS = {16: 64, 8: 32, 4: 16}  # by bits: beyond, tensor cores and not memory would set the pace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """rows of x and outputs of a program; inputs of one step; splits of the inputs side by side; all powers of two. warps, stages: of
    Triton."""

    rows: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """rows of x, outputs and inputs of the weight, all of one expert; bits of its values; group: inputs that share all scales, or None;
    terms: bfloat16 per element of x; parts: weights that are multiplied at once; quantised: x is made of levels; normed: x is normed;
    shifted: groups have zeros; experts: that have rows, at most."""

    rows: int
    outputs: int
    inputs: int
    bits: int
    group: int | None
    terms: int
    parts: int
    quantised: bool
    normed: bool = False
    shifted: bool = False
    experts: int = 1


def rows_of_expert(rows: int, experts: int) -> int:
    """Rows that a program has of one expert: one where so few rows seldom meet, else, up to those of a small matmul, twice the mean,
    so that few experts have more and are read by several programs."""
    if 4 * rows <= experts:
        return 1
    mean = -(-rows // experts)
    return mean if mean > SMALL else min(2 * mean, SMALL)


def heuristic(p: Problem, gpu: Gpu) -> Tile:
    """A tile for the problem on a GPU, with as many stages as its memory's latency asks for and its shared memory holds."""
    tile = _fed(_small(p, gpu.processors), p, gpu) if p.rows <= SMALL else _large(p, gpu)
    while tile.stages > 2 and not _fits(tile, p, gpu):
        tile = dataclasses.replace(tile, stages=tile.stages - 1)
    return tile


def _fed(tile: Tile, p: Problem, gpu: Gpu) -> Tile:
    """The tile with stages added until enough of the weight is under way, or nothing more fits."""
    more = dataclasses.replace(tile, stages=tile.stages + 1)
    while more.stages <= MOST_STAGES and under_way(tile, p, gpu) < needed(tile, p, gpu):
        if resident(more, p, gpu) < resident(tile, p, gpu) or not _fits(more, p, gpu):
            break
        tile, more = more, dataclasses.replace(more, stages=more.stages + 1)
    return tile


def blocks(tile: Tile, p: Problem) -> int:
    """Programs of a launch."""
    return p.experts * -(-p.rows // tile.rows) * -(-p.outputs // tile.outputs)


def resident(tile: Tile, p: Problem, gpu: Gpu) -> int:
    """Programs that a processor has at once: as many as there are for it, and as fit its shared memory and its 64 warps."""
    return max(1, min(blocks(tile, p) // gpu.processors, (gpu.shared + 1024) // (_shared(tile, p) + 1024), 64 // tile.warps))


def under_way(tile: Tile, p: Problem, gpu: Gpu) -> int:
    """Bytes of the weight that a processor has asked for and not yet seen."""
    return resident(tile, p, gpu) * (tile.stages - 1) * _step(tile, p)


def needed(tile: Tile, p: Problem, gpu: Gpu) -> float:
    """Bytes that must be under way on each processor that has work, so that memory is never idle: Little's law."""
    return LATENCY * gpu.bandwidth / min(blocks(tile, p), gpu.processors)


def _step(tile: Tile, p: Problem) -> int:
    """Bytes of the weight in a step of a program."""
    return p.parts * tile.outputs * tile.splits * tile.inputs * p.bits // 8


def _shared(tile: Tile, p: Problem) -> int:
    """About the bytes of shared memory that Triton's pipeline takes: what is loaded in stages, and the columns once more in bfloat16."""
    groups = 1 if p.group is None else max(1, tile.inputs // p.group)
    columns = max(8, tile.splits * p.terms * groups * tile.rows)
    loaded = _step(tile, p) + tile.inputs * columns * (1 if p.quantised else 4) * (2 if p.normed else 1)
    return (tile.stages - 1) * loaded + tile.inputs * columns * 2


def _fits(tile: Tile, p: Problem, gpu: Gpu) -> bool:
    """Whether a program finds its shared memory. Blackwell multiplies from there, and has weights of 16 bits once more in the order of
    their parts."""
    again = _step(tile, p) if gpu.capability >= (10, 0) and p.bits == 16 and tile.splits > 1 else 0
    return _shared(tile, p) + again <= gpu.shared


def _small(p: Problem, processors: int) -> Tile:
    rows = power_of_two(p.rows)
    columns = rows * p.terms
    few = p.experts * -(-p.outputs // 64) < 4 * processors
    if p.bits < 16 and columns * _groups(p) <= COLUMNS:
        return _spread(p, rows, few, processors)
    free = max(1, _COLUMNS[p.bits] // columns)
    row_bytes = 1024 // p.bits  # inputs in 128 bytes of an output
    most = 4096 // columns  # so that a step's columns of x take no more than 16 KiB
    if p.group is None:
        inputs = min(max(32, power_of_two(p.inputs)), 2 * row_bytes, most)
    else:
        if p.shifted:
            row_bytes //= 2  # sums of x and shifts of as many groups would take the registers, and narrow the loads on Hopper
        unit = min(p.group, row_bytes)
        inputs = unit * max(1, min(free, row_bytes // unit))
        free = max(1, free // (inputs // unit))
    splits = 2 if few and free >= 2 and p.inputs >= 4 * inputs else 1
    outputs = 32 if few else 64
    # every program reads all of x, from the second-level cache: of many rows and few bits as much as a narrow program's weights or more
    x_bits = 8 * (1 if p.quantised else 4 if p.terms == 2 else 2)
    if p.normed and splits * columns > 16:
        splits = 1  # parts have a scale each for every element of x, which a norm goes through
    heavy = outputs < rows * x_bits // p.bits or (p.normed and 2 * columns > 16)
    if outputs < 64 and heavy and p.experts * -(-p.outputs // (2 * outputs)) >= BUSY * processors:
        outputs, splits = 2 * outputs, 1
    return Tile(rows=rows, outputs=outputs, inputs=inputs, splits=splits, warps=2 if outputs * splits == 32 else 4, stages=4)


def _groups(p: Problem) -> int:
    """Groups in a sector of 32 bytes of an output, one at least."""
    return 1 if p.group is None else max(1, 256 // p.bits // p.group)


def _spread(p: Problem, rows: int, few: bool, processors: int) -> Tile:
    """Of few rows and few bits, where what unpacks levels and prepares x is more than what multiplies. The columns that a product has in
    any case go to parts of the inputs, each of which meets levels of its own, and to groups, all but one of whose columns are zeros, only
    as far as a step has a sector of 32 bytes of an output. Four warps have a tile of the tensor core each; a processor that has one
    program takes it by eight, if its step is long enough, so that of two that share a scheduler one unpacks while the other waits."""
    spare, outputs = COLUMNS // (rows * p.terms), 32 if few else 64
    least, splits = 64 // outputs, 128 // outputs
    if p.group is None:
        splits = max(least, min(splits, spare))
        inputs = (1 << 17) // p.bits // (outputs * splits)
    else:
        unit, groups = min(p.group, 128), _groups(p)
        # shifts of as many groups take more than parts save
        splits = least if p.shifted and groups > 1 else max(least, min(splits, spare // groups))
        most = (512 if p.shifted else 1024) // p.bits // unit
        inputs = unit * max(groups, min(spare // splits, most))
    inputs = min(inputs, max(32, power_of_two(p.inputs)))
    while splits > 1 and p.inputs < 2 * splits * inputs:
        splits //= 2
    alone = p.experts * -(-p.outputs // outputs) < 2 * processors
    long = outputs * splits * inputs * p.bits >= 1 << 16
    warps = 8 if alone and long and outputs * splits == 128 else min(4, outputs * splits // 16)
    return Tile(rows=rows, outputs=outputs, inputs=inputs, splits=splits, warps=warps, stages=4)


def _large(p: Problem, gpu: Gpu) -> Tile:
    # sums of two weights and two terms of x are more than Blackwell's copies from its tensor memory leave registers for
    heavy = gpu.capability >= (10, 0) and p.parts * p.terms > 2
    rows = 64 if p.rows > 32 and not heavy else 32
    inputs = 64 if p.group is None else min(p.group, 64)
    # a scale after each step needs the sums and the step's product in registers at once; where warps multiply by themselves, nibbles
    # that are being unpacked leave no place for as many sums
    crowded = (p.quantised and p.group) or (p.bits == 4 and gpu.capability < WARPGROUPS)
    # a warpgroup of Hopper takes 64 outputs: two would hand each other what they unpack, through shared memory
    paired = p.parts == 2 and WARPGROUPS <= gpu.capability < (10, 0)
    wide = p.terms == 1 and p.rows > 64 and (p.parts == 1 or paired) and not crowded
    rows, outputs = 128 if wide else rows, 128 if p.parts == 1 else 64
    return Tile(rows=rows, outputs=outputs, inputs=inputs, splits=1, warps=4 if paired else 8, stages=3)


def check(tile: Tile, p: Problem) -> None:
    """Raise BackendError for a tile that the kernel cannot run with."""
    for field in ("rows", "outputs", "inputs", "splits", "warps"):
        value = getattr(tile, field)
        if value < 1 or value & (value - 1):
            raise BackendError(f"quant_matmul: tile {field}={value} must be a power of two")
    if tile.outputs * tile.splits < 16 or tile.inputs < 32:
        raise BackendError(f"quant_matmul: a tile has at least 16 outputs times splits and 32 inputs, not {tile}")
    if p.group is not None and p.rows > SMALL and not p.quantised and tile.inputs > p.group:
        raise BackendError(
            f"quant_matmul: with more than {SMALL} rows a step has one group of {p.group} inputs at most, not {tile.inputs}"
        )
