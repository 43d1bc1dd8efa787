"""Builds the shared library of native kernels. Imports nothing but the standard library: setup.py runs this file by itself.

    python -m pallas_kernels.cpu.build          builds into the package's folder, as a development install does

The compiler is $CXX, or c++, g++ or clang++ from the PATH. The FFI headers are jaxlib's: build against the oldest jaxlib that is
supported, since a library built with newer headers than the running jaxlib's cannot be registered.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "src"
LIBRARY = "jaxinfer.native.so"  # the dot: nothing that looks for modules takes it for one
FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
MACHINES = ("x86_64", "AMD64", "aarch64", "arm64")


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says what is missing."""


def sources_digest() -> str:
    """What identifies the sources; a library built from others is out of date."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str]:
    """The C++ compiler's command. Raises BuildError where there is none."""
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler: install g++ or clang++, or name one in CXX")


def include_folder() -> str:
    """Where jaxlib keeps the FFI headers. Raises BuildError without jaxlib."""
    spec = importlib.util.find_spec("jaxlib")
    folder = Path(spec.origin).parent / "include" if spec and spec.origin else None
    if folder is None or not (folder / "xla/ffi/api/ffi.h").is_file():
        raise BuildError("jaxlib, whose FFI headers the kernels need, is not installed in this environment")
    return str(folder)


def build(target: Path, *, jobs: int | None = None, verbose: bool = False) -> Path:
    """Compile and link the library into `target`. Raises BuildError with the compiler's message."""
    if platform.machine() not in MACHINES:
        raise BuildError(f"no native kernels for {platform.machine()}; there are some for {', '.join(MACHINES)}")
    command, include = compiler(), include_folder()
    with tempfile.TemporaryDirectory() as scratch:
        units = sorted(SOURCES.glob("*.cc"))
        objects = [Path(scratch) / f"{unit.stem}.o" for unit in units]
        tail = ["-isystem", include, f'-DJAXINFER_SOURCES="{sources_digest()}"']

        def compile_unit(unit: Path, out: Path) -> None:
            _run([*command, *FLAGS, *tail, "-c", str(unit), "-o", str(out)], verbose)

        with concurrent.futures.ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
            list(pool.map(compile_unit, units, objects))
        # under another name first: a running process keeps the library that it has loaded
        made = Path(scratch) / LIBRARY
        _run([*command, "-shared", "-pthread", "-Wl,-z,defs", *map(str, objects), "-o", str(made)], verbose)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}.new")
        shutil.copy(made, fresh)
        fresh.replace(target)
    return target


def _run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(shlex.join(command), file=sys.stderr)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()[-4000:]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.cpu.build", description="Build the native CPU kernels.")
    parser.add_argument("--output", type=Path, default=FOLDER / LIBRARY, help="the library to write (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="print the compiler's commands")
    options = parser.parse_args(arguments)
    try:
        print(build(options.output, verbose=options.verbose))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
