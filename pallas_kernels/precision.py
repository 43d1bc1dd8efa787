"""How exactly float32 matrices are multiplied: as float32, unless jax's own setting says otherwise."""

import jax
from jax import lax

from pallas_kernels.target import current_target, interpreted

type Precision = lax.Precision | lax.DotAlgorithmPreset | None

# the setting of jax (jax.default_matmul_precision) that stands for a name
JAX_NAMES = {"float32": "float32", "tf32_x3": "high", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}

# What a setting means on a GPU. jax's own meaning knows two: there its HIGH and its DEFAULT are one TF32 product each.
_MEANINGS: dict[str | None, lax.Precision | lax.DotAlgorithmPreset] = {
    None: lax.Precision.HIGHEST,
    "highest": lax.Precision.HIGHEST,
    "float32": lax.Precision.HIGHEST,
    "high": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    "tensorfloat32": lax.DotAlgorithmPreset.TF32_TF32_F32,
    "default": lax.DotAlgorithmPreset.TF32_TF32_F32,
    "bfloat16": lax.DotAlgorithmPreset.BF16_BF16_F32,
}


def float32_precision() -> lax.Precision | lax.DotAlgorithmPreset:
    """How a GPU multiplies float32 while this is traced: HIGHEST as float32, else the algorithm that jax's setting means or names."""
    chosen = jax.config.jax_default_matmul_precision
    if chosen not in _MEANINGS:
        algorithm: lax.DotAlgorithmPreset = lax.DotAlgorithmPreset[chosen]
        return algorithm
    return _MEANINGS[chosen]


def in_bfloat16() -> bool:
    """Whether float32 may be rounded to bfloat16 before it is multiplied on a GPU."""
    return float32_precision() in (lax.DotAlgorithmPreset.BF16_BF16_F32, lax.DotAlgorithmPreset.BF16_BF16_BF16)


def dot_precision(dtype, rows: int, *, ragged: bool = False) -> Precision:
    """The `precision` of a dot whose operands have this dtype; rows: of its left side.

    float32 on a GPU: `float32_precision`, but HIGHEST instead of three TF32 products for one row, where the weight is read once in
    float32 and three products would write parts of it first, and for a ragged dot, which takes no algorithm of several products. On
    other devices HIGHEST where nothing is set, else None, which is what jax makes of its setting. Other dtypes: DEFAULT, since their
    products are exact in float32 anyway.
    """
    if dtype != "float32":
        return lax.Precision.DEFAULT
    precision = float32_precision()
    if interpreted() or current_target().platform != "gpu":
        return lax.Precision.HIGHEST if precision == lax.Precision.HIGHEST else None
    if precision == lax.DotAlgorithmPreset.TF32_TF32_F32_X3 and (rows == 1 or ragged):
        return lax.Precision.HIGHEST
    return precision
