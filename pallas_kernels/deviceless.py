"""Compiling for a GPU that is not here: what Pallas, Triton, XLA and ptxas make of a function, without a driver.

Needs the packages jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, and CUDA's ptxas and libdevice. Speed, races and numerics it
cannot tell. Without a GPU, jax must not have looked for one before: call `platforms.leave_out_absent_gpus` first where arrays are made.
"""

import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels.errors import BackendError
from pallas_kernels.gpus import KNOWN, Gpu
from pallas_kernels.platforms import leave_out_absent_gpus
from pallas_kernels.uncached import without_compilation_cache

_DESCRIPTION = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_per_core} shared_memory_per_block_optin: {gpu.shared}
  threads_per_core_limit: 2048 core_count: {gpu.processors} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} l2_cache_size: {gpu.l2} clock_rate_ghz: 1.8 device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A kernel as its PTX describes it. shared: bytes that it is given when it is launched. widest_load: bytes of global memory that one
    thread reads in its widest instruction. tensor_cores: the first instruction of theirs that it uses, or ""."""

    name: str
    shared: int
    threads: int
    widest_load: int
    tensor_cores: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel(Entry):
    """One kernel of a compiled program, as ptxas leaves it. spilled: bytes of registers kept in local memory."""

    registers: int
    spilled: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program for a GPU. text: optimised HLO. kernels: each once. launches: what its thunks start in order, loop bodies once; a kernel by
    its name, other thunks by their kind. executable: to be run where there is that GPU."""

    text: str
    kernels: tuple[Kernel, ...]
    launches: tuple[str, ...]
    executable: jax.stages.Compiled


_OF_XLA = ("fusion", "wrapped_", "input_", "loop_")


def is_ours(kernel: Entry) -> bool:
    """Whether a kernel was written here, and is none that XLA made of what stands around it."""
    return not any(part in kernel.name for part in _OF_XLA)


def topology_mesh(name: str, shape: tuple[int, ...], names: tuple[str, ...], *, hosts: int = 1) -> Mesh:
    """A mesh of GPUs of one host or several alike, to lower and compile for; nothing can be put on it. name: one of `gpus.KNOWN`.

    Raises BackendError where jax has no plugin that compiles for them.
    """
    gpu = _gpu(name)
    count = int(np.prod(shape))
    major, minor = gpu.capability
    description = _DESCRIPTION.format(
        gpu=gpu,
        kind=gpu.lowered_as or gpu.device_kind,
        bandwidth=int(gpu.bandwidth),
        shared_per_core=gpu.shared + 1024,
        fpus=128 if major >= 9 else 64,
        major=major,
        minor=minor,
        features="feature_extension: ACCELERATED_FEATURES" if major >= 9 else "",
    )
    leave_out_absent_gpus()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=description, topology=f"1x{hosts}x{count // hosts}"
        )
    except NotImplementedError as error:
        raise BackendError(
            f"jax has no plugin that compiles for CUDA: install jax-cuda13-plugin=={jax.__version__} and jax-cuda13-pjrt of that version; "
            "where they are installed and there is no GPU, set JAX_PLATFORMS=cpu, since jax drops them when it looks for one"
        ) from error
    return Mesh(np.array(topology.devices).reshape(shape), names)


def lower_for(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """`function` lowered for one GPU. args: trees of jax.ShapeDtypeStruct."""
    return trace_for(name, function, *args, then=lambda traced: traced.lower())


def trace_for(name: str, function: Callable[..., Any], *args: Any, then: Callable[[Any], Any] = lambda traced: traced) -> Any:
    """`then` of `function` traced for one GPU. args: as of `lower_for`."""
    gpu = _gpu(name)
    (device,) = topology_mesh(name, (1,), ("x",)).devices
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(device))
    abstract = AbstractDevice(device_kind=gpu.lowered_as or gpu.device_kind, num_cores=gpu.processors, platform="gpu")
    # a function of its own, since jax's cache of traces does not know the abstract device
    fresh = jax.jit(lambda *a: function(*a))
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        return then(fresh.trace(*jax.tree.map(place, args)))


def compile_for(name: str, function: Callable[..., Any], *args: Any) -> Compiled:
    """`function` compiled for one GPU, with what its kernels take. args: trees of jax.ShapeDtypeStruct."""
    return inspect(lower_for(name, function, *args))


def inspect(lowered: Any) -> Compiled:
    """Compile what was lowered for a GPU, and read what came out."""
    compiled, ptx, thunks = _dumped(lowered)
    kernels = tuple(kernel for part in ptx for kernel in kernels_of(part, _shared(thunks)))
    started = re.findall(r"^\s*\d+: (k\w+) *(?:\[[^\]]*\])? *(?:(\S+) grid:)?", thunks, re.M)
    return Compiled(
        text=compiled.as_text(), kernels=kernels, launches=tuple(name or kind for kind, name in started), executable=compiled
    )


def entries(lowered: Any) -> tuple[Entry, ...]:
    """Compile what was lowered for a GPU, and read its PTX: half of what `inspect` takes. Raises BackendError where registers spill."""
    try:
        _, ptx, thunks = _dumped(lowered, xla_gpu_fail_ptx_compilation_on_register_spilling=True)
    except jax.errors.JaxRuntimeError as error:
        raise BackendError(f"XLA refuses a kernel: {str(error)[:2000]}") from error
    return tuple(_entry(name, body, _shared(thunks)) for part in ptx for name, body in _bodies(part).items())


def _dumped(lowered: Any, **options: Any) -> tuple[Any, list[str], str]:
    """A program compiled, its modules of PTX, and what its thunks are."""
    with tempfile.TemporaryDirectory() as folder, without_compilation_cache():
        dump = {"xla_dump_to": folder, "xla_dump_emitter_re": ".*ptx.*"}
        compiled = lowered.compile(compiler_options=dump | options)
        ptx = [text for path in sorted(Path(folder).glob("*.ptx")) if (text := path.read_text()).strip()]
        thunks = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*thunk_sequence.txt")))
    return compiled, ptx, thunks


def _shared(thunks: str) -> dict[str, int]:
    return {name: int(size) for name, size in re.findall(r"(\S+) grid: .*shared_memory: (\d+) bytes", thunks)}


def _bodies(ptx: str) -> dict[str, str]:
    return dict(re.findall(r"\.entry ([\w$]+)\((.*?)(?=\.entry |\Z)", ptx, re.S))


def _entry(name: str, body: str, shared: Mapping[str, int]) -> Entry:
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", body)
    return Entry(
        name=name,
        shared=shared.get(name, 0),
        threads=int(threads[1]) if threads else 0,
        widest_load=_widest_load(body),
        tensor_cores=next(iter(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*", body)), ""),
    )


def _gpu(name: str) -> Gpu:
    if name not in KNOWN:
        raise BackendError(f"GPU {name!r} is not one of {', '.join(KNOWN)}")
    return KNOWN[name]


@functools.cache
def ptxas() -> str:
    """The ptxas of the CUDA toolkit, or of NVIDIA's Python packages. Raises BackendError where there is none."""
    places = ["ptxas", "/usr/local/cuda/bin/ptxas"]
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages.submodule_search_locations or ()) if packages else ():
        places += [str(path) for path in sorted(Path(folder).glob("*/bin/ptxas"))]
    found = next((path for place in places if (path := shutil.which(place))), None)
    if found is None:
        raise BackendError(
            "ptxas is neither on the PATH, nor in /usr/local/cuda/bin, nor in a package nvidia; install nvidia-cuda-nvcc"
        )
    return found


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def kernels_of(ptx: str, shared: Mapping[str, int] = MappingProxyType({})) -> list[Kernel]:
    """What ptxas says of the kernels in a text of PTX. shared: bytes by name that they are given when they are launched."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    if target is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas(), "-v", f"--gpu-name={target[1]}", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"ptxas refuses a kernel: {done.stderr[-2000:]}")
    found, bodies = [], _bodies(ptx)
    for entry in _ENTRY.finditer(done.stderr + done.stdout):
        static = re.search(r"(\d+) bytes smem", entry["rest"])
        as_written = dataclasses.asdict(_entry(entry["name"], bodies.get(entry["name"], ""), shared))
        as_written["shared"] += int(static[1]) if static else 0
        spilled = int(entry["stores"]) + int(entry["loads"])
        found.append(Kernel(**as_written, registers=int(entry["registers"]), spilled=spilled))
    return found


def _widest_load(body: str) -> int:
    """Bytes of the widest ld.global or cp.async of a thread."""
    plain = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+) ", body)
    copied = re.findall(r"cp\.async\.c[ag]\.shared\.global\S* \[[^\]]*\],? *\[[^\]]*\],? *(?:0x)?([0-9a-f]+)", body)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in plain] + [int(n, 16) for n in copied]
    return max(widths, default=0)
