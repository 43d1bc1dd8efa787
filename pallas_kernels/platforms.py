"""Which platforms jax looks for, settled before it makes its first array."""

import contextlib
import ctypes
import importlib.util
import os
import pkgutil
import sys


def leave_out_absent_gpus() -> None:
    """Where jax has CUDA plugins alone and NVIDIA's driver is not installed, let it look for the CPU only.

    Otherwise it asks each plugin for a device: the plugin prints a traceback, and where CUDA's libraries are missing it is dropped, so that
    nothing can be compiled for a GPU either. A choice that the user made stays; child processes inherit this one.
    """
    if not _only_cuda_plugins() or _has_nvidia_driver():
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "jax" in sys.modules:  # which has read its environment
        import jax

        if not jax.config.jax_platforms:
            jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def _only_cuda_plugins() -> bool:
    """Whether jax has CUDA plugins and no others that could find a device here."""
    spec = importlib.util.find_spec("jax_plugins")
    names = [m.name for m in pkgutil.iter_modules(spec.submodule_search_locations)] if spec else []
    return bool(names) and all(n.startswith("xla_cuda") for n in names) and importlib.util.find_spec("libtpu") is None


def _has_nvidia_driver() -> bool:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")  # the driver's own library, which WSL and containers have as well
        return True
    return False
