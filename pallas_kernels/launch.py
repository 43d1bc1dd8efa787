"""What every Pallas kernel file needs: the call, compiled by Triton or interpreted, and which GPUs there is code for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.precision import float32_precision
from pallas_kernels.target import Target, interpreted

OLDEST = (8, 0)  # Ampere: bfloat16 on tensor cores
NARROWEST_FP8 = (8, 9)  # Ada: the first that converts from and to e4m3


def gpu_refusal(target: Target) -> str | None:
    """Why Triton's kernels do not run on a target, or None."""
    if not target.device_kind.startswith("NVIDIA"):
        return f"its kernels are made for NVIDIA GPUs, not for {target.device_kind}"
    if target.capability is not None and target.capability < OLDEST:
        return f"its kernels need compute capability 8.0, {target.device_kind} has {'.'.join(map(str, target.capability))}"
    return None


def kernel_precision(dtype) -> lax.Precision | lax.DotAlgorithmPreset:
    """The `precision` of a dot inside a kernel whose operands have this dtype: as `precision.dot_precision` outside of kernels.

    The interpreter multiplies float32 as float32 in any case.
    """
    if dtype != "float32":
        return lax.Precision.DEFAULT
    return lax.Precision.HIGHEST if interpreted() else float32_precision()


def launch(
    kernel: Callable[..., None],
    *operands: jax.Array,
    name: str,
    out: Any,
    grid: Sequence[int],
    warps: int,
    stages: int = 2,
    in_specs: Sequence[pl.BlockSpec] | None = None,
    out_specs: Any = None,
    aliases: Mapping[int, int] | None = None,
) -> Any:
    """One kernel launch over whole arrays, or over the blocks that in_specs and out_specs cut.

    kernel: takes a reference per operand and one per output. out: a tree of jax.ShapeDtypeStruct. aliases: output by operand that it
    overwrites. In the interpreter programs of the grid run one after the other.
    """
    extra = {} if in_specs is None else {"in_specs": in_specs, "out_specs": out_specs}
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=tuple(grid),
        input_output_aliases=dict(aliases or {}),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpreted(),
        name=name,
        **extra,
    )(*operands)
