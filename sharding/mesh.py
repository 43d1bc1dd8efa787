"""Meshes with the four axes that every program here is written for: data, stage, tensor_hosts, tensor."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from sharding.errors import MeshError
from sharding.rules import MESH_AXES


def make_mesh(
    *, data: int = 1, stage: int = 1, tensor_hosts: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh over the first data * stage * tensor_hosts * tensor devices, `tensor` innermost (the fastest links).

    Raises MeshError for a size below 1 or more devices than there are, before anything is placed.
    """
    shape = {"data": data, "stage": stage, "tensor_hosts": tensor_hosts, "tensor": tensor}
    for name, size in shape.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise MeshError(f"mesh axis {name} is {size!r}; give a whole number of at least 1")
    available = list(jax.devices() if devices is None else devices)
    wanted = math.prod(shape.values())
    if wanted > len(available):
        sizes = " x ".join(f"{name} {size}" for name, size in shape.items() if size > 1)
        on_cpu = all(device.platform == "cpu" for device in available)
        hint = "on CPU set jax_num_cpu_devices before the first use of jax" if on_cpu else "use fewer"
        raise MeshError(f"a mesh of {sizes} needs {wanted} devices, there are {len(available)}; {hint}")
    return Mesh(np.array(available[:wanted]).reshape(tuple(shape.values())), MESH_AXES)


def check_mesh(mesh: Mesh) -> None:
    """Raise MeshError unless `mesh` has the four axes in their order."""
    if tuple(mesh.axis_names) != MESH_AXES:
        raise MeshError(
            f"the mesh has axes {tuple(mesh.axis_names)}, needed are {MESH_AXES}; build it with sharding.mesh.make_mesh"
        )
