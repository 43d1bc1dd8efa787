"""The few PTX instructions that kernels are given as text, run on numpy arrays: what the compiled half of them computes, without a GPU."""

import re

import ml_dtypes
import numpy as np


def run(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """`text` with registers $0, $1, .. for uint32 results and, after these, inputs. Raises ValueError for others."""
    registers = {f"${outputs + i}": np.asarray(a, np.uint32) for i, a in enumerate(inputs)}
    body = text.strip().removeprefix("{").removesuffix("}")
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, rest = line.split(None, 1)
        if name == ".reg":
            continue
        target, *given = (part.strip() for part in rest.split(","))
        if name not in _INSTRUCTIONS:
            raise ValueError(f"there is no {name} here")
        values = [registers[g] if re.match(r"[$a-z]", g) else np.uint32(int(g, 0)) for g in given]
        registers[target] = _INSTRUCTIONS[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def _shift(a, by, left=False):
    return (a << by if left else a >> by).astype(np.uint32)


def _prmt(a, b, selector):
    pool = [(word >> np.uint32(8 * i)) & np.uint32(255) for word in (a, b) for i in range(4)]
    shape = np.broadcast_shapes(*(np.shape(x) for x in (a, b, selector)))
    pool = np.stack([np.broadcast_to(byte, shape) for byte in pool])
    out = np.zeros(shape, np.uint32)
    for i in range(4):
        nibble = np.broadcast_to((selector >> np.uint32(4 * i)) & np.uint32(15), shape)
        byte = np.take_along_axis(pool, (nibble & 7)[None].astype(np.int64), 0)[0]
        replicated = np.where(byte & 128, np.uint32(255), np.uint32(0))
        out |= np.where(nibble & 8, replicated, byte).astype(np.uint32) << np.uint32(8 * i)
    return out


def _lop3(a, b, c, table):
    out = np.uint32(0)
    for i in range(8):
        if int(table) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def halves(a) -> tuple[np.ndarray, np.ndarray]:
    """The two bfloat16 of a register as float32, the lower one first."""
    low, high = np.asarray(a & np.uint32(0xFFFF), np.uint16), np.asarray(a >> np.uint32(16), np.uint16)
    return tuple(part.view(ml_dtypes.bfloat16).astype(np.float32) for part in (low, high))  # type: ignore[return-value]


def _fma(a, b, c):
    made = (x.astype(np.float64) * y + z for x, y, z in zip(halves(a), halves(b), halves(c), strict=True))
    low, high = (m.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for m in made)
    return low | high << np.uint32(16)


_INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "shr.u32": _shift,
    "shl.b32": lambda a, by: _shift(a, by, left=True),
    "and.b32": lambda a, b: a & b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "fma.rn.bf16x2": _fma,
}
