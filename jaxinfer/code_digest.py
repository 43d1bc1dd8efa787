"""What tells a function apart from another one of the same name: its code, what it has bound, and the files that it comes from."""

import contextlib
import functools
import hashlib
import importlib.util
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

DEEPEST = 8  # of what is bound by what is bound


def code_digest(*functions: Callable) -> str:
    """Of functions, partial ones, wrapped ones or objects that can be called: the same in another process for the same code and the same
    bound values. Of what a function reaches by a global name only what stands in its own file is seen."""
    digest = hashlib.sha256()
    for function in functions:
        _add(function, digest, 0)
    return digest.hexdigest()


def is_plain(function: Any, packages: Mapping[str, Path]) -> bool:
    """Whether a function is one of some packages as it stands there: nothing is bound to it, and nothing of others is behind it.
    packages: folders by name."""
    if not isinstance(function, types.FunctionType):
        return False
    name = function.__module__.partition(".")[0]
    return name in packages and Path(function.__code__.co_filename).is_relative_to(packages[name])


def _add(value: Any, digest, depth: int) -> None:
    if depth > DEEPEST:
        return
    parts: list[Any] = []
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, dict(value.keywords)]
    elif isinstance(value, types.MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, types.FunctionType):
        digest.update(_file_of(value.__module__))
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__, *cells]
    elif isinstance(value, types.CodeType):
        digest.update(value.co_code)
        parts = [value.co_names, value.co_consts]
    elif isinstance(value, Mapping):
        parts = [part for pair in value.items() for part in pair]
    elif isinstance(value, list | tuple):
        parts = [type(value).__name__, *value]
    elif isinstance(value, set | frozenset):
        parts = sorted(map(repr, value))
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | type(...)):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, type):
        digest.update(_file_of(value.__module__) + value.__qualname__.encode())
    elif (wrapped := getattr(value, "__wrapped__", None)) is not None:  # of jax.jit and its like
        parts = [wrapped]
    else:
        parts = [type(value), vars(value) if hasattr(value, "__dict__") else None]
    for part in parts:
        _add(part, digest, depth + 1)


def _is_filled(cell) -> bool:
    with contextlib.suppress(ValueError):
        return cell.cell_contents is not cell
    return False


@functools.cache
def _file_of(module: str) -> bytes:
    """The digest of a module's file; its name where it has none."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        found = importlib.util.find_spec(module)
        if found is not None and found.origin:
            return hashlib.sha256(Path(found.origin).read_bytes()).digest()
    return module.encode()
