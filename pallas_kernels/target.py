"""The device that the current trace is for, known before any code is generated for it."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device.

    platform: "cpu", "gpu" or "tpu". device_kind: the name its driver gives, such as "NVIDIA H100 80GB HBM3".
    """

    platform: str
    device_kind: str


def current_target() -> Target:
    """The target of the code being traced: the mesh's device in `jax.shard_map`, deviceless too, else the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        # local_devices and not devices: a process of a multi-host job compiles for what it holds
        device = jax.local_devices()[0]
    return Target(platform=device.platform, device_kind=device.device_kind)
