"""Writing a folder or file so that it appears when it is complete: made beside its place under a temporary name, then renamed."""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

type Check = Callable[[Path], None]  # raises DestinationExistsError for a place that must not be written to


def publish(made: Path, dst: Path, check: Check) -> None:
    """Move the complete folder or file into place; what was there goes when the new one is there."""
    check(dst)  # hours may have passed
    old = _sibling(dst, "replaced")
    if dst.exists():
        os.rename(dst, old)
    try:
        os.rename(made, dst)
    except BaseException:
        if old.exists() and not dst.exists():
            os.rename(old, dst)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sibling(dst: Path, role: str) -> Path:
    return dst.with_name(f".{dst.name}.{role}-{secrets.token_hex(6)}")


@contextlib.contextmanager
def temporary(dst: Path) -> Iterator[Path]:
    """A folder beside `dst` that is removed unless it was moved away. A lock on it tells others that its writer lives."""
    folder = _sibling(dst, "partial")
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody else will take it for stale either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _remove(folder: Path) -> None:
    for _ in range(20):  # after an error of Orbax, as of a full disk, some of its writes may still be under way
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def remove_stale(dst: Path) -> None:
    """Remove what killed conversions to `dst` left behind, and put back a checkpoint that one of them had moved aside."""
    name = glob.escape(dst.name)
    for partial in dst.parent.glob(f".{name}.partial-*"):
        with contextlib.suppress(OSError):  # held by a living conversion, or gone by now
            lock = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(partial)
            finally:
                os.close(lock)
    for old in dst.parent.glob(f".{name}.replaced-*"):
        if dst.exists():
            _remove(old)
        else:
            os.rename(old, dst)


class _Terminated(SystemExit):
    """SIGTERM, as an exception that no `except Exception` swallows."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise inside the block, so that clean-up runs; afterwards it takes the effect that it would have had."""
    previous = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or previous in (None, signal.SIG_IGN):
        yield  # only the main thread may set handlers; a SIGTERM then works like a SIGKILL
        return

    def stop(number, frame):
        signal.signal(number, signal.SIG_IGN)  # a second one must not cut the clean-up short
        raise _Terminated(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, previous)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
