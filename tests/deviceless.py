"""GPU topologies for compiling without a GPU: needs the packages jax-cuda13-plugin and jax-cuda13-pjrt, and ptxas.

The figures are those of NVIDIA's data sheets and of cudaGetDeviceProperties.
"""

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

_H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    """A mesh of H100s in one host, to lower and compile for; nothing can be put on it."""
    count = int(np.prod(shape))
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=_H100, topology=f"1x1x{count}")
    return Mesh(np.array(topology.devices).reshape(shape), names)
