"""Configurations as people write them: names of dtypes, keys that are misspelt, two sources for one thing."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxinfer.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = (*DTYPES, "int8", "fp8", "int4")
ALIASES = {
    "fp32": "float32",
    "float": "float32",
    "single": "float32",
    "bf16": "bfloat16",
    "bfloat": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}


def dtype_name(value: Any) -> Any:
    """The name of a dtype that is given as text, as a numpy or jax dtype, or as an object that prints like torch's; None stays None.

    What names no dtype comes back as it is, for the caller to refuse.
    """
    if value is None:
        return None
    text = value if isinstance(value, str) else str(value)
    if not isinstance(value, str) and not text.startswith("torch."):
        try:
            text = np.dtype(value).name
        except (TypeError, ValueError):
            return value
    text = text.lower().removeprefix("torch.")
    return ALIASES.get(text, text)


def check_keys(
    values: Iterable[str], known: Iterable[str], where: str, also: Iterable[str] = (), *, error: type[Exception] = ConfigError
) -> None:
    """Raise an error for the first key that is not known, naming the nearest one; `also`: names that a hint may give besides."""
    known = list(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), [*known, *also], 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise error(f"{where} has no key {key!r}{hint}")


def merge(first: Mapping[str, Any], second: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Both dicts in one, those within too; None is no value. Raises ConfigError where they give one key different values."""
    out = dict(first)
    for key, value in second.items():
        other = out.get(key)
        if other is None:
            out[key] = value
        elif isinstance(other, Mapping) and isinstance(value, Mapping):
            out[key] = merge(other, value, f"{path}{key}.")
        elif value is not None and (type(other) is not type(value) or other != value):
            raise ConfigError(
                f"{path}{key} is {other!r} in the configuration and {value!r} in the keyword arguments; leave one of them"
            )
    return out
