"""What is settled before jax is imported: how much it says, and which platforms it looks for."""

import os

from pallas_kernels.platforms import leave_out_absent_gpus


def start_jax(cpu_devices: int | None = None) -> None:
    """Import jax as a command needs it. cpu_devices: run on so many CPU devices, whatever else the machine has.

    A choice that the user made in the environment stays.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's errors, not its remarks
    if cpu_devices is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
    leave_out_absent_gpus()
    import jax

    if cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
