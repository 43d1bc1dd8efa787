"""Tile sizes of kernels: an explicit wish, else what was measured on this GPU, else the kernel's own heuristic.

    tile = tile_for("rms_norm", Tile(rows=1, warps=4), width=4096, dtype="float32")

Measured ones are data, <folder>/v1/<device>/<op>.json: {"op", "device", "jax", "made", "entries": [{"key": {...}, "tile": {...}, "seconds":
..., "default_seconds": ...}]}. Those in the user's cache folder, where `jaxinfer tune` writes them, come before those of this package.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from pallas_kernels.errors import BackendError
from pallas_kernels.target import current_target

SHIPPED = Path(__file__).parent / "tuned"
VERSION = "v1"  # of the files; those of another version are not looked at
_LOG = logging.getLogger(__name__)

type Key = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What was measured for a key. seconds: a call with `tile`; default_seconds: with what the heuristic takes."""

    key: Mapping[str, Any]
    tile: Mapping[str, int]
    seconds: float
    default_seconds: float


class Watcher(Protocol):
    """Is told which tiles a trace asks for."""

    def tile(self, op: str, key: Mapping[str, Any], tile: Any) -> None: ...


# parts of the key of jax's caches of traces; ((op, key or None, ((field, value), ...)), ...)
_EXPLICIT = jax.make_user_context(())
_WATCHER = jax.make_user_context(None)


@contextlib.contextmanager
def tiles(wishes: Mapping[str, Mapping[str, int]], *, key: Mapping[str, Any] | None = None) -> Iterator[None]:
    """While inside, kernels of these operations take these fields of their tiles; fields that are not named stay as they are found.

    key: only where the kernel asks for this one.
    """
    written = None if key is None else _written(key)
    merged = {(op, k): fields for op, k, fields in _EXPLICIT.value}
    merged |= {(op, written): tuple(sorted(wish.items())) for op, wish in wishes.items()}
    with _EXPLICIT(tuple((op, k, fields) for (op, k), fields in sorted(merged.items(), key=repr))):
        yield


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """While inside, the watcher is told of the tiles that kernels ask for."""
    with _WATCHER(watcher):
        yield


def tile_for[T](op: str, default: T, **key: Any) -> T:
    """The tile with which to run an operation's kernel here.

    default: a frozen dataclass, what the heuristic takes; the answer is of its type. key: what the tuner tells apart (sizes, dtypes), JSON
    values. A device that has a table without this key is logged once per key. Raises BackendError for a field that the tile does not
    have.
    """
    if _WATCHER.value is not None:
        _WATCHER.value.tile(op, key, default)
    tile, written = default, _written(key)
    tables = _tables(device_folder(current_target().device_kind), op)
    for path, entries in tables:
        if written in entries:
            tile = _replaced(op, tile, entries[written], f" ({path})")
            break
    else:
        if tables:
            _log_miss(op, written)
    explicit = {k: dict(fields) for of, k, fields in _EXPLICIT.value if of == op}
    return _replaced(op, tile, explicit.get(None, {}) | explicit.get(written, {}))


def device_folder(device_kind: str) -> str:
    """The name of the folder that a device's tables lie in."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


def user_folder() -> Path:
    """Where `jaxinfer tune` writes: $XDG_CACHE_HOME/jaxinfer/tuned, by default ~/.cache/jaxinfer/tuned."""
    base = os.environ.get("XDG_CACHE_HOME")  # the standard's own name for where a user wants caches
    return (Path(base) if base else Path.home() / ".cache") / "jaxinfer" / "tuned"


def table_path(folder: Path, device_kind: str, op: str) -> Path:
    return folder / VERSION / device_folder(device_kind) / f"{op}.json"


def save(folder: Path, device_kind: str, op: str, entries: Sequence[Entry]) -> Path:
    """Add entries to a table, in place of those with the same keys. Traces that were made before keep their tiles. Raises BackendError for
    a table that is there and cannot be read."""
    path = table_path(folder, device_kind, op)
    kept = {_written(entry["key"]): entry for entry in _read(path)} if path.is_file() else {}
    kept |= {_written(entry.key): dataclasses.asdict(entry) for entry in entries}
    table = {
        "op": op,
        "device": device_kind,
        "jax": jax.__version__,
        "made": datetime.date.today().isoformat(),
        "entries": [kept[key] for key in sorted(kept, key=repr)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    os.replace(unfinished, path)
    forget()
    return path


def forget() -> None:
    """Read the tables again when the next kernel is traced."""
    _tables.cache_clear()


@functools.cache
def _tables(device: str, op: str) -> tuple[tuple[Path, dict[Key, Mapping[str, int]]], ...]:
    """The tables that there are, the preferred first."""
    paths = [folder / VERSION / device / f"{op}.json" for folder in (user_folder(), SHIPPED)]
    return tuple((path, {_written(entry["key"]): entry["tile"] for entry in _read(path)}) for path in paths if path.is_file())


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text("utf-8"))["entries"]
        if all(isinstance(entry["key"], dict) and isinstance(entry["tile"], dict) for entry in entries):
            return entries
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BackendError(f"the tuned tiles in {path} cannot be read ({error!r}); remove the file, and tune again") from error
    raise BackendError(f"the tuned tiles in {path} have no keys and tiles; remove the file, and tune again")


def _written(key: Mapping[str, Any]) -> Key:
    return tuple(sorted(key.items()))


@functools.cache
def _log_miss(op: str, key: Key) -> None:
    _LOG.info("no tuned tile of %s for %s on this device: its heuristic is used", op, ", ".join(f"{k}={v}" for k, v in key))


def _replaced[T](op: str, tile: T, fields: Mapping[str, int], where: str = "") -> T:
    known = {f.name for f in dataclasses.fields(tile)}  # type: ignore[arg-type]
    if unknown := sorted(fields.keys() - known):
        raise BackendError(f"{op}{where}: its tile has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return dataclasses.replace(tile, **fields)  # type: ignore[type-var]
