"""The shared library of native kernels: finding it, what it can run here, and how many threads a call takes."""

import contextlib
import ctypes
import dataclasses
import functools
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib
import numpy as np

from pallas_kernels.cpu import build
from pallas_kernels.errors import BackendError

CALLS = tuple(
    f"jaxinfer_{name}"
    for name in ("attention_block", "attention", "mlp_block", "quant_matmul", "argmax", "sample", "head_argmax")
)
PATH = build.FOLDER / build.LIBRARY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """The loaded library. instruction_sets: names of those that this CPU has and the library was built for, the fastest first."""

    path: Path
    instruction_sets: tuple[str, ...]
    handle: ctypes.CDLL


@functools.cache
def _load() -> Library | str:
    """The library with its calls registered with XLA, or a sentence that says why there is none."""
    rebuild = "build it with: python -m pallas_kernels.cpu.build"
    if not PATH.is_file():
        return f"the native kernels were not built; {rebuild}"
    try:
        handle = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"the native kernels cannot be loaded ({error}); {rebuild}"
    handle.jaxinfer_sources.restype = ctypes.c_char_p
    handle.jaxinfer_instruction_set.restype = ctypes.c_char_p
    handle.jaxinfer_read.restype = ctypes.c_int64
    handle.jaxinfer_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    number, size, place = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    handle.jaxinfer_sketch.restype = None
    handle.jaxinfer_sketch.argtypes = (
        number,
        number,
        number,
        ctypes.c_bool,
        size,
        size,
        place,
        place,
        number,
        size,
        place,
        place,
    )
    if build.SOURCES.is_dir() and handle.jaxinfer_sources().decode() != build.sources_digest():
        return f"the native kernels are older than their sources; {rebuild}"
    # a library of newer headers than the running jaxlib's makes the whole CPU backend fail to start
    minor, running = handle.jaxinfer_ffi_minor(), _running_ffi_minor()
    if minor > running:
        return f"the native kernels need version 0.{minor} of XLA's FFI, and jaxlib {jaxlib.__version__} has 0.{running}; {rebuild}"
    for name in CALLS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(handle, name)), platform="cpu")
    names: list[str] = []
    while name := handle.jaxinfer_instruction_set(len(names)):
        names.append(name.decode())
    return Library(path=PATH, instruction_sets=tuple(names), handle=handle)


def _running_ffi_minor() -> int:
    header = Path(jaxlib.__file__).parent / "include/xla/ffi/api/c_api.h"
    found = re.search(r"#define XLA_FFI_API_MINOR (\d+)", header.read_text())
    return int(found[1]) if found else 0


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger(__name__).warning("running on XLA: %s", reason)


def load() -> Library | str:
    """The library, or why there is none, which is logged once.

    Raises BackendError instead where JAXINFER_REQUIRE_NATIVE is set to anything but 0.
    """
    found = _load()
    if isinstance(found, str):
        if os.environ.get("JAXINFER_REQUIRE_NATIVE", "0") != "0":
            raise BackendError(f"JAXINFER_REQUIRE_NATIVE is set, but {found}")
        _say_once(found)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How native calls are made. threads: of a call; None shares the cores out over the devices. instruction_set: one of
    `Library.instruction_sets`; None takes what JAXINFER_INSTRUCTION_SET named at import, or else the fastest. Both are fixed when a program
    is traced. No result depends on threads."""

    threads: int | None = None
    instruction_set: str | None = None


# read once: programs are kept by their options, and a change of it later would not be seen
_NAMED = os.environ.get("JAXINFER_INSTRUCTION_SET")
_OPTIONS = jax.make_user_context(Options())  # part of the key of jax's caches of traces


@contextlib.contextmanager
def options(*, threads: int | None = None, instruction_set: str | None = None) -> Iterator[None]:
    """Trace with other options, in this thread. Raises BackendError for an instruction set that is not there, or threads below 1."""
    if threads is not None and threads < 1:
        raise BackendError(f"{threads} threads: give at least 1, or None to share the cores out")
    if instruction_set is not None:
        _level(instruction_set)
    with _OPTIONS(Options(threads=threads, instruction_set=instruction_set)):
        yield


def _level(instruction_set: str) -> int:
    found = load()
    known = () if isinstance(found, str) else found.instruction_sets
    if instruction_set not in known:
        raise BackendError(f"instruction set {instruction_set!r} is not one of this CPU's: {', '.join(known) or found}")
    return known.index(instruction_set)


def _named() -> str | None:
    return _OPTIONS.value.instruction_set or _NAMED


def instruction_set() -> str:
    """What a call traced now runs with. Raises BackendError without the library, and for a name that this CPU does not have."""
    name, found = _named(), load()
    if isinstance(found, str):
        raise BackendError(found)
    return found.instruction_sets[_level(name) if name else 0]


def threads() -> int:
    """Threads of a call traced now: the cores that this process may use, shared out over its devices."""
    given = _OPTIONS.value.threads
    return given or max(1, cores() // len(jax.local_devices(backend="cpu")))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def call_integers() -> tuple[int, int]:
    """What every call begins with: the place of its instruction set in `Library.instruction_sets`, and its threads.

    Raises BackendError without the library.
    """
    return _level(instruction_set()), threads()


def refusal(platform: str) -> str | None:
    """Why no native call can run on a platform, or None."""
    if platform != "cpu":
        return f"native kernels are for CPUs, not for {platform}"
    found = load()
    if isinstance(found, str):
        return found
    if found.instruction_sets[0] == "plain" and not _named():
        return "this CPU has none of the vector instructions that the native kernels are written for; XLA is faster"
    return None


def read_bandwidth(*, size: int = 1 << 28, threads: int | None = None, rounds: int = 5) -> float:
    """Bytes a second that a call's threads read from memory: the median over rounds of reading `size` bytes.

    Raises BackendError without the library.
    """
    found = load()
    if isinstance(found, str):
        raise BackendError(found)
    data = np.ones(size, np.uint8)
    used = threads or cores()
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        found.handle.jaxinfer_read(data.ctypes.data, size, used)
        times.append(time.perf_counter() - start)
    return size / float(np.median(times[1:]))
