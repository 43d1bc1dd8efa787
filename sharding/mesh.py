"""Meshes with the five axes that every program here is written for: data, stage, expert, tensor_hosts, tensor."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sharding.distributed import hosts_of
from sharding.errors import MeshError
from sharding.rules import MESH_AXES, ROW_AXES


def make_mesh(
    *,
    data: int = 1,
    stage: int = 1,
    expert: int = 1,
    tensor_hosts: int | None = None,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh over data * stage * expert * tensor_hosts * tensor devices in their order, `tensor` innermost (the fastest links).

    tensor_hosts: None keeps each run of `tensor` devices on a host, past devices that a host has left over, where there are enough; and
    divides `tensor` over hosts where it is larger than one: tensor=16 on hosts of 8 devices is tensor_hosts=2, tensor=8.
    Raises MeshError for a size below 1 or more devices than there are, before anything is placed.
    """
    available = list(jax.devices() if devices is None else devices)
    across = 1 if tensor_hosts is None else tensor_hosts
    shape = {"data": data, "stage": stage, "expert": expert, "tensor_hosts": across, "tensor": tensor}
    for name, size in shape.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise MeshError(f"mesh axis {name} is {size!r}; give a whole number of at least 1")
    wanted = math.prod(shape.values())
    if wanted > len(available):
        sizes = " x ".join(f"{name} {size}" for name, size in shape.items() if size > 1)
        on_cpu = all(device.platform == "cpu" for device in available)
        hint = "on CPU set jax_num_cpu_devices before the first use of jax" if on_cpu else "use fewer"
        raise MeshError(f"a mesh of {sizes} needs {wanted} devices, there are {len(available)}; {hint}")
    processes = {device.process_index for device in available}
    chosen = available[:wanted]
    if tensor_hosts is None:
        hosts = hosts_of([device.process_index for device in available])
        inside = runs_inside_hosts(hosts, tensor)[:wanted]
        if len(inside) == wanted and {available[i].process_index for i in inside} == processes:
            chosen = [available[i] for i in inside]
        else:
            shape["tensor_hosts"] = hosts_spanned(hosts, tensor)
            shape["tensor"] = tensor // shape["tensor_hosts"]
    used = {device.process_index for device in chosen}
    if idle := sorted(processes - used):
        raise MeshError(
            f"the mesh takes {wanted} of {len(available)} devices, and process {idle[0]} would have none of them; "
            f"start {len(used)} processes, or make the mesh larger"
        )
    return Mesh(np.array(chosen).reshape(tuple(shape.values())), MESH_AXES)


def row_shards(mesh: Mesh) -> int:
    """Over how many shards sequences are spread."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def runs_inside_hosts(hosts: Sequence[int], tensor: int) -> list[int]:
    """Places of the devices that are in runs of `tensor` neighbours of one host, given the host of every device; those that a host has left
    over, at its end, are not among them."""
    places: list[int] = []
    for _, group in itertools.groupby(range(len(hosts)), key=hosts.__getitem__):
        own = list(group)
        places += own[: len(own) // tensor * tensor]
    return places


def hosts_spanned(hosts: Sequence[int], tensor: Any) -> int:
    """Over how many hosts each run of `tensor` neighbours among devices lies, given the host of every device; 1 where the runs are not
    all divided alike, one host after the other."""
    if not isinstance(tensor, int) or tensor < 2:
        return 1
    runs = [tuple(hosts[i : i + tensor]) for i in range(0, len(hosts) - tensor + 1, tensor)]
    counts = {tuple(len(list(group)) for _, group in itertools.groupby(run)) for run in runs}
    if len(counts) != 1:
        return 1
    [sizes] = counts
    return len(sizes) if len(set(sizes)) == 1 and all(len(set(run)) == len(sizes) for run in runs) else 1


def check_mesh(mesh: Mesh) -> None:
    """Raise MeshError unless `mesh` has the five axes in their order."""
    if tuple(mesh.axis_names) != MESH_AXES:
        raise MeshError(
            f"the mesh has axes {tuple(mesh.axis_names)}, needed are {MESH_AXES}; build it with sharding.mesh.make_mesh"
        )
