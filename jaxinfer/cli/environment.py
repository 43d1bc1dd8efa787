"""What is settled before jax is imported: how much it says, and which platforms it looks for."""

import contextlib
import ctypes
import importlib.util
import os
import pkgutil


def start_jax(cpu_devices: int | None = None) -> None:
    """Import jax as a command needs it. cpu_devices: run on so many CPU devices, whatever else the machine has.

    A choice that the user made in the environment stays.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's errors, not its remarks
    if cpu_devices is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif _only_cuda_plugins() and not _has_nvidia_driver():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else each plugin prints a traceback before jax takes the CPU
    import jax

    if cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)


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
