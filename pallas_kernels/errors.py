"""Errors of the kernel rooms. Each message gives the value, the limit and what to do."""


class KernelError(ValueError):
    """Base of everything that pallas_kernels refuses."""


class ShapeError(KernelError):
    """Arguments of an operation whose shapes or dtypes do not fit together."""


class QuantizationError(KernelError):
    """A tensor or a format that cannot be quantised as asked."""


class BackendError(KernelError):
    """An implementation was named that does not exist or cannot run for this target."""
