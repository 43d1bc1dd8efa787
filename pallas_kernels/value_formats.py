"""How the values of a QTensor are stored: what a byte or a nibble stands for before its scale.

int8          int8 -128..127
uint8         0..255 with a zero point per scale
int4          nibble 0..15: minus 8, or minus the zero point, or times the scale plus a minimum
int4_ordered  int4 whose groups are no runs of inputs: QTensor.order names the group of each input (GPTQ with act-order)
fp8           float8 e4m3fn, largest value 448
nf4           nibble: an entry of the normal-float table (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)
mxfp4         nibble: sign and e2m1; the scale is an exponent, 2^(byte - 127) per 32 inputs (OCP Microscaling Formats 1.0)
"""

import dataclasses

import ml_dtypes
import numpy as np

INT4_OFFSET = 8  # a symmetric nibble 0..15 stands for -8..7
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = 448.0
FP8_NAN = 0x7F  # the bits of a NaN without its sign; there is no infinity
MX_GROUP = 32  # inputs that share an exponent
MX_BIAS = 127
MX_NAN = 255
E2M1_EXPONENT = 2  # of the largest e2m1 value, 6 = 1.5 * 2^2

_POSITIVE_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*_POSITIVE_E2M1, *(-v for v in _POSITIVE_E2M1)], np.float32)
# quantiles of a normal distribution, scaled to -1..1, with an exact zero
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


_SINGLE, _HALF, _BYTE = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ValueFormat:
    """dtype: of the stored values. nibbles: two to a byte. offset: subtracted where there are no zeros. table: values by nibble.
    top: what the largest weight of a group becomes when rounding to the nearest, 0 where nothing is rounded to the format.
    scale: default dtype of scales."""

    dtype: np.dtype
    nibbles: bool = False
    offset: int = 0
    table: np.ndarray | None = None
    top: float = 0
    scale: np.dtype = _SINGLE

    @property
    def bits(self) -> int:
        return 4 if self.nibbles else 8


VALUE_FORMATS = {
    "int8": ValueFormat(dtype=np.dtype(np.int8), top=127),
    "int4": ValueFormat(dtype=_BYTE, nibbles=True, offset=INT4_OFFSET, top=7, scale=_HALF),
    "fp8": ValueFormat(dtype=FP8, top=FP8_MAX),
    "nf4": ValueFormat(dtype=_BYTE, nibbles=True, table=NF4, top=1),
    "mxfp4": ValueFormat(dtype=_BYTE, nibbles=True, table=E2M1, top=6, scale=_BYTE),
    "uint8": ValueFormat(dtype=_BYTE, scale=_HALF),
    "int4_ordered": ValueFormat(dtype=_BYTE, nibbles=True, offset=INT4_OFFSET, scale=_HALF),
}
