"""The JSON schema (draft 2020-12) of a configuration file, made from the dataclasses of jaxinfer.config and their docstrings.

jaxinfer/config.schema.json is what `schema` gives, for editors: "$schema" in a configuration is no key, so name it in the editor's
settings. DeepSpeed's names, which EngineConfig.load takes too, are in jaxinfer.deepspeed.
"""

import dataclasses
import re
import types
import typing
from typing import Any

from jaxinfer.config import SHORT_FORM, CacheConfig, EngineConfig, ParallelConfig, QuantizationConfig
from jaxinfer.values import ALIASES, CACHE_DTYPES, DTYPES

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PARTS = (QuantizationConfig, ParallelConfig, CacheConfig)
_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null"}
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "multipleOf")


def schema() -> dict[str, Any]:
    """The schema of EngineConfig as a JSON value."""
    defs = {part.__name__: _object(part) for part in PARTS}
    return {"$schema": DIALECT, "title": "EngineConfig", **_object(EngineConfig), "$defs": defs}


def descriptions(cls: type) -> dict[str, str]:
    """What the docstring of a dataclass says about each of its fields, by `name: text` in it."""
    text = " ".join((cls.__doc__ or "").split())
    names = [field.name for field in dataclasses.fields(cls)]
    found = sorted((m.start(), m.end(), name) for name in names if (m := re.search(rf"(?<!\S){name}: ", text)))
    ends = [start for start, _, _ in found[1:]] + [len(text)]
    return {name: text[begin:end].strip() for (_, begin, name), end in zip(found, ends, strict=True)}


def _object(cls: type) -> dict[str, Any]:
    about = descriptions(cls)
    first = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    properties = {f.name: {"description": about[f.name], **_value(cls, f)} for f in dataclasses.fields(cls)}
    return {"description": first, "type": "object", "properties": properties, "additionalProperties": False}


def _value(cls: type, field: dataclasses.Field) -> dict[str, Any]:
    """The values of one field, and its default."""
    kinds = typing.get_args(field.type) or (field.type,)
    default = field.default
    if "json" in field.metadata:
        return {**field.metadata["json"], "default": list(default) if isinstance(default, tuple) else default}
    if parts := [kind for kind in kinds if kind in PARTS]:
        reference: dict[str, Any] = {"$ref": f"#/$defs/{parts[0].__name__}"}
        if types.NoneType not in kinds:
            return reference | {"default": {}}
        return {"anyOf": [{"type": "null"}, {"type": "string", "pattern": f"^{SHORT_FORM}$"}, reference], "default": default}
    if "enum" in field.metadata:
        return {"enum": _choices(cls, field), "default": default}
    limits = {name: field.metadata[name] for name in _LIMITS if name in field.metadata}
    names = [_TYPES[kind] for kind in kinds if kind in _TYPES]
    if words := [word for word in field.metadata.get("also", ()) if word is not None]:
        return {"anyOf": [{"type": names[0], **limits}, {"enum": words}], "default": default}
    return {"type": names if len(names) > 1 else names[0], **limits, "default": default}


def _choices(cls: type, field: dataclasses.Field) -> list[Any]:
    choices = list(field.metadata["enum"])
    if field.metadata["enum"] in (DTYPES, CACHE_DTYPES):
        choices += [alias for alias, name in ALIASES.items() if name in choices]
        choices += ["int8"] if cls is EngineConfig else []  # INT8 quantisation
    return choices + ([None] if field.default is None and None not in choices else [])
