"""Kernels in the Triton language as implementations of operations, through jax-triton, which is optional.

    @triton.jit
    def kernel(x, y, n, BLOCK: tl.constexpr): ...

    def double(x):
        constants = {"n": x.size, "BLOCK": 1024}
        return triton_call(kernel, x, out=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(-(-x.size // 1024),), constants=constants)

    register_triton("double", "triton", double, kernels=(kernel,))

Where TRITON_INTERPRET=1 was set before Triton was imported, such kernels run inside `interpreting()` on numpy arrays, without torch.
"""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.errors import BackendError
from pallas_kernels.launch import gpu_refusal
from pallas_kernels.registry import Implementation, Supports, register
from pallas_kernels.target import Target, current_target, interpreted


def triton_refusal(target: Target, kernels: Sequence[Any]) -> str | None:
    """Why kernels in the Triton language do not run on a target, or None."""
    if reason := gpu_refusal(target):
        return reason
    if interpreted():
        compiled = [k for k in kernels if not _is_interpreted(k)]
        return "Triton interprets where TRITON_INTERPRET=1 is set before it is imported" if compiled else None
    if importlib.util.find_spec("jax_triton") is None:
        return "the package jax_triton is not installed"
    return None if target.capability is not None else f"the compute capability of {target.device_kind} is not known"


def register_triton(
    op: str,
    name: str,
    function: Callable[..., Any],
    *,
    kernels: Sequence[Any],
    supports: Supports = lambda target, facts: True,
    priority: int = 20,
    replace: bool = False,
) -> Implementation:
    """Add an implementation of an operation, new or known, that calls kernels in the Triton language.

    function: calls `triton_call`; its arguments are the operation's. kernels: the `@triton.jit` functions that it calls. supports: what it
    judges beside GPU, jax-triton and interpreter, see `registry.register`, which also says of priority, replace and errors.
    """

    def judged(target: Target, facts: Mapping[str, Any]) -> bool | str:
        if target.platform != "gpu":
            return f"it is made for gpu, not for {target.platform}"
        return triton_refusal(target, kernels) or supports(target, facts)

    return register(op, name, function, supports=judged, priority=priority, replace=replace)


def triton_call(
    kernel: Any,
    *inputs: jax.Array,
    out: Any,
    grid: Sequence[int],
    constants: Mapping[str, Any],
    name: str | None = None,
    warps: int = 4,
    stages: int = 3,
    aliases: Mapping[int, int] | None = None,
) -> Any:
    """One launch of a `@triton.jit` function: outputs as the tree `out` of jax.ShapeDtypeStruct.

    kernel: takes a pointer per input, then one per leaf of out, then constants by name. aliases: output by the input that it overwrites.
    name: of the launch in profiles, the kernel's own by default. Not differentiable by itself. Raises BackendError where it cannot run.
    """
    target = current_target()
    if reason := triton_refusal(target, (kernel,)):
        raise BackendError(f"{kernel.__name__}: {reason}")
    shapes, tree = jax.tree.flatten(out)
    if interpreted():
        run = functools.partial(_interpreted, kernel, shapes, tuple(grid), dict(constants), dict(aliases or {}))
        found = jax.pure_callback(run, shapes, *inputs)
    else:
        import jax_triton

        major, minor = target.capability or (8, 0)
        # of CUDA 12.8, the first that knows Blackwell, and of 12.9 for what came later; Triton takes its own, which an older ptxas refuses
        version = 86 if (major, minor) <= (10, 0) else 88
        found = jax_triton.triton_call(
            *inputs,
            kernel=kernel,
            out_type=shapes,
            name=name or kernel.__name__,
            grid=tuple(grid),
            num_warps=warps,
            num_stages=stages,
            compute_capability=10 * major + minor,
            backend_options={"ptx_version": version},
            input_output_aliases=dict(aliases or {}),
            **constants,
        )
    return jax.tree.unflatten(tree, found)


def _is_interpreted(kernel: Any) -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel, InterpretedFunction)


def _interpreted(kernel, shapes, grid, constants, aliases, *inputs):
    copies = [np.array(a, order="C") for a in inputs]
    outputs = [np.zeros(s.shape, s.dtype) for s in shapes]
    for given, taken in aliases.items():
        outputs[taken] = copies[given]
    if math.prod(grid):
        kernel[grid](*map(_Tensor, (*copies, *outputs)), **constants)
    return outputs


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What Triton's interpreter asks of a torch tensor, around a numpy array whose memory it reads and writes."""

    array: np.ndarray
    device: str = "cpu"

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Tensor":
        return self

    def cpu(self) -> "_Tensor":
        return self

    def copy_(self, other) -> None:
        """The memory is the same."""

    def new_empty(self, *_, **__) -> "_Tensor":
        return _Tensor(self.array)

    def set_(self, *_) -> "_Tensor":
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize

    def numel(self) -> int:
        return self.array.size
