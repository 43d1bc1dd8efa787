"""Native calls as tests make them: with every instruction set, and with one thread and two."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import library
from pallas_kernels.qtensor import QTensor


def jittable(function, **options):
    """A function compiled with these options."""
    jitted = jax.jit(function)

    def run(*args):
        with library.options(**options):
            return jitted(*args)

    return run


def in_each_way(native, function, *args, sets=None):
    """Results by instruction set, of two threads; with the first one those of one thread are the same bits."""
    sets = sets or native.instruction_sets
    out = {name: jittable(function, threads=2, instruction_set=name)(*args) for name in sets}
    one = jittable(function, threads=1, instruction_set=sets[0])(*args)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(out[sets[0]]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=f"{sets[0]}: threads change the result")
    return out


def in_tiles(name, w, rows):
    """Whether an instruction set multiplies levels with so many inputs as bfloat16 (uses_tiles in prepare.inc)."""
    return name == "amx" and isinstance(w, QTensor) and rows >= (12 if w.activation is None else 24)


def as_bfloat16(x):
    """float32 with the bits that bfloat16 keeps, halves up."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32) + np.uint32(0x8000)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def close(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
    assert error < tolerance, error  # also for NaN


def same_levels(got, want, operands):
    """Two caches of 4 bits after a call: what is in them of its rows, up to levels whose rounding is in doubt."""
    positions, rows = np.asarray(operands["positions"]), operands["rows"]
    new = positions.shape[1] if operands["write"] is None else np.asarray(operands["write"]).sum(1)
    ends = np.broadcast_to(positions[:, 0] + new, positions.shape[:1])
    caches = got.take(rows), want.take(rows)
    for a, b in zip(*(jax.tree.leaves(cache.floats(jnp.asarray(ends - 1))) for cache in caches), strict=True):
        for row, end in enumerate(ends):
            difference = np.abs(np.asarray(a - b))[row, :, :end]
            assert difference.max() < 0.6 and (difference > 1e-5).mean() < 2e-3  # less than two levels
