"""The instructions by which stored weights become bfloat16, run on every byte, against the formats' own tables."""

import ml_dtypes
import numpy as np
import ptx
import pytest

from pallas_kernels.quant_matmul.decoding import assembly
from pallas_kernels.value_formats import FP8, INT4_OFFSET, VALUE_FORMATS

BYTES = (np.arange(256)[:, None] + np.array([0, 37, 101, 214])) % 256  # four to a register, each value at each place
WORDS = (BYTES << np.array([0, 8, 16, 24])).sum(1).astype(np.uint32)


def spread(registers):
    """Two registers as the four numbers of four bytes, float32 [256, 4]."""
    return np.stack([half for register in registers for half in ptx.halves(register)], 1)


@pytest.mark.parametrize("format", ["int4", "mxfp4", "nf4"])
def test_nibbles(format):
    table = VALUE_FORMATS[format].table
    levels = np.arange(16.0) - INT4_OFFSET if table is None else table.astype(ml_dtypes.bfloat16).astype(np.float32)
    low, high = (spread(ptx.run(text, [WORDS], 2)) for text in assembly(format))
    np.testing.assert_array_equal(low, levels[BYTES & 15])
    np.testing.assert_array_equal(high, levels[BYTES >> 4])


def test_e4m3():
    found = spread(ptx.run(assembly("fp8")[0], [WORDS], 2))
    wanted = BYTES.astype(np.uint8).view(FP8).astype(np.float32)
    kept = ~np.isnan(wanted)
    np.testing.assert_array_equal(found[kept], wanted[kept])
    assert set(np.abs(found[~kept])) == {480.0}
    np.testing.assert_array_equal(np.signbit(found), BYTES >= 128)
