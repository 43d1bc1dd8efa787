"""The device that the current trace is for, known before any code is generated for it."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from pallas_kernels import gpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device.

    platform: "cpu", "gpu" or "tpu". device_kind: the name its driver gives, such as "NVIDIA H100 80GB HBM3".
    """

    platform: str
    device_kind: str

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of an NVIDIA GPU; None for other devices, and for one that is not listed in `gpus`."""
        return gpus.capability(self.device_kind) if self.platform == "gpu" else None


# part of the key of jax's caches of traces
_INTERPRETED = jax.make_user_context(None)


@contextlib.contextmanager
def interpreting(device_kind: str = gpus.GPUS["h100"].device_kind) -> Iterator[None]:
    """While inside, traces are for this GPU and its Pallas kernels run in Pallas's interpreter, on whatever device there is.

    Slow, and exact where the kernel is: what tests and anyone without a GPU can check kernels with.
    """
    with _INTERPRETED(Target(platform="gpu", device_kind=device_kind)):
        yield


def interpreted() -> bool:
    """Whether `interpreting` is in force."""
    return _INTERPRETED.value is not None


def current_target() -> Target:
    """The target of the code being traced: the mesh's device in `jax.shard_map`, deviceless too, else the default backend's."""
    if interpreted():
        return _INTERPRETED.value
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        # local_devices and not devices: a process of a multi-host job compiles for what it holds
        device = jax.local_devices()[0]
    return Target(platform=device.platform, device_kind=device.device_kind)
