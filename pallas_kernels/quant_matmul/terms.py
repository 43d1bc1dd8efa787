"""What the GPU's matmul kernel makes of its inputs: one bfloat16, or two that add up to 16 bits of a float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.precision import in_bfloat16
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quant_matmul.decoding import BYTES, NIBBLES
from pallas_kernels.quant_matmul.tiles import SMALL, WARPGROUPS
from pallas_kernels.target import current_target


def terms(dtype, w, rows: int) -> int:
    """How many bfloat16 an input becomes: two where more is wanted of float32 than bfloat16 and the levels of the weight are exact."""
    rounded = not isinstance(w, QTensor) or (w.group is not None and rows > SMALL) or w.format == "nf4"
    return 2 if dtype == jnp.float32 and not in_bfloat16() and not rounded else 1


def inputs_dtype(w: jax.Array | QTensor, rows: int) -> jnp.dtype:
    """What float32 inputs are best made as: of many rows the dtype of a float weight, whose operands XLA's product takes in it, and
    bfloat16 where they become one of it anyway and warpgroups read them as they come."""
    if not isinstance(w, QTensor):
        return jnp.dtype(jnp.float32) if rows <= SMALL else w.dtype
    capability = current_target().capability
    narrow = capability is not None and capability >= WARPGROUPS and rows > SMALL
    narrow = narrow and w.activation is None and w.format in NIBBLES + BYTES and terms(jnp.float32, w, rows) == 1
    return jnp.dtype(jnp.bfloat16 if narrow else jnp.float32)
