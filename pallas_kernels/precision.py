"""How exactly float32 matrices are multiplied: as float32, unless jax's own setting says otherwise."""

import jax
from jax import lax

from pallas_kernels.target import current_target

type Precision = lax.Precision | lax.DotAlgorithmPreset | None


def dot_precision(dtype, rows: int) -> Precision:
    """The `precision` of a dot whose operands have this dtype; rows: of its left side.

    float32: HIGHEST, because a GPU's default rounds the operands to TF32; where `jax_default_matmul_precision` is set
    (jax.default_matmul_precision), what it says. "high" is three TF32 products on a GPU, where jax's HIGH is a single one; but for one
    row, where the weight is read once in float32 and three products would write parts of it first. Other dtypes: DEFAULT, since
    their products are exact in float32 anyway.
    """
    if dtype != "float32":
        return lax.Precision.DEFAULT
    chosen = jax.config.jax_default_matmul_precision
    if chosen is None:
        return lax.Precision.HIGHEST
    if chosen == "high" and current_target().platform == "gpu":
        return lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if rows > 1 else lax.Precision.HIGHEST
    return None
