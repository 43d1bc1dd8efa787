"""What kernels for Hopper through Mosaic GPU share: two warpgroups compute while a third fetches; how tiles lie in shared memory."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import gpu_refusal
from pallas_kernels.target import Target

WARPGROUPS = 2  # that compute
ROWS = 64  # of a warpgroup's product
SHARED = 227 * 1024 - 1024  # bytes that a block may have, less those of barriers
STORED = 64  # columns that a warpgroup writes at a time
PRODUCER_REGISTERS = 40


def hopper_refusal(target: Target) -> str | None:
    """Why these kernels do not run on a target, or None."""
    if reason := gpu_refusal(target):
        return reason
    if target.capability is None or target.capability[0] != 9:
        return f"its instructions are those of Hopper, compute capability 9.0, not of {target.device_kind}"
    return None


def transforms(columns: int, dtype) -> tuple:
    """How a tile lies in shared memory: as the tensor cores read it, without bank conflicts."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * bits)
    return (
        plgpu.TilingTransform((8, swizzle * 8 // bits)),  # type: ignore[abstract]
        plgpu.SwizzleTransform(swizzle),  # type: ignore[abstract]
    )
