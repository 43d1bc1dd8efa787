"""Tile sizes of kernels: an explicit wish, else what was measured on this GPU, else the kernel's own heuristic.

    tile = tile_for("rms_norm", Tile(rows=1, warps=4), width=4096, dtype="float32")

Measured ones are data: tuned/<device>/<op>.json, {"entries": [{"key": {...}, "tile": {...}, "seconds": ...}]}.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.errors import BackendError
from pallas_kernels.target import current_target

TUNED = Path(__file__).parent / "tuned"
_LOG = logging.getLogger(__name__)

# part of the key of jax's caches of traces; ((op, ((field, value), ...)), ...)
_EXPLICIT = jax.make_user_context(())


@contextlib.contextmanager
def tiles(wishes: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """While inside, kernels of these operations take these fields of their tiles; fields that are not named stay as they are found."""
    merged = dict(_EXPLICIT.value) | {op: tuple(sorted(wish.items())) for op, wish in wishes.items()}
    with _EXPLICIT(tuple(sorted(merged.items()))):
        yield


def tile_for[T](op: str, default: T, **key: Any) -> T:
    """The tile with which to run an operation's kernel here.

    default: a frozen dataclass, what the heuristic takes; the answer is of its type. key: what the tuner tells apart (sizes, dtypes), JSON
    values. A device that has a table without this key is logged once per key. Raises BackendError for a field that the tile does not
    have.
    """
    tile, written = default, tuple(sorted(key.items()))
    table = _table(device_folder(current_target().device_kind), op)
    if table is not None:
        if written in table:
            tile = _replaced(op, tile, table[written])
        else:
            _log_miss(op, written)
    return _replaced(op, tile, dict(dict(_EXPLICIT.value).get(op, ())))


def device_folder(device_kind: str) -> str:
    """The name of the folder of `tuned` that a device's tables lie in."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


@functools.cache
def _table(device: str, op: str) -> dict[tuple, Mapping[str, int]] | None:
    path = TUNED / device / f"{op}.json"
    if not path.is_file():
        return None
    entries = json.loads(path.read_text())["entries"]
    return {tuple(sorted(entry["key"].items())): entry["tile"] for entry in entries}


@functools.cache
def _log_miss(op: str, key: tuple) -> None:
    _LOG.info("no tuned tile of %s for %s on this device: its heuristic is used", op, ", ".join(f"{k}={v}" for k, v in key))


def _replaced[T](op: str, tile: T, fields: Mapping[str, int]) -> T:
    known = {f.name for f in dataclasses.fields(tile)}  # type: ignore[arg-type]
    if unknown := sorted(fields.keys() - known):
        raise BackendError(f"{op}: its tile has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return dataclasses.replace(tile, **fields)  # type: ignore[type-var]
