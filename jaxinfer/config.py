"""What a user sets about an engine: EngineConfig and its parts; frozen, checked once, from Python, a dict or a JSON file."""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.errors import ConfigError
from pallas_kernels.qtensor import ActivationQuant

DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = (*DTYPES, "int8")
MAX_TOP_LOGPROBS = 20  # alternatives that a request may ask for, at most


def _fields(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _checked_keys(cls, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values as keywords of `cls`. Raises ConfigError naming the nearest known key."""
    for key in values:
        if key not in _fields(cls):
            near = difflib.get_close_matches(key, _fields(cls), 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(_fields(cls))}"
            raise ConfigError(f"{where} has no key {key!r}{hint}")
    return dict(values)


def is_number(value: Any) -> bool:
    """A finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(owner: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"{owner}.{name} is {value!r}; give a whole number {limit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Round-to-nearest quantisation of every matrix while it is loaded.

    weight_bits: 8 or 4. activation_bits: 8 (dynamic) or 16 (left as they are); by default 8 with INT8 weights, 16 with INT4.
    group_size: inputs per weight scale, 0 for one scale per output channel; by default 0 for INT8, 64 for INT4. symmetric: False
    stores a minimum per group (INT4). activation_group_size: inputs per activation scale, 0 for one a token. head_bits: of embedding
    and head: 8, or 16 to leave them as they are.
    """

    enabled: bool = True
    weight_bits: int = 8
    activation_bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    activation_group_size: int = 64
    head_bits: int = 8

    def __post_init__(self):
        if self.weight_bits not in (8, 4):
            raise ConfigError(f"quantization.weight_bits is {self.weight_bits!r}; choose 8 or 4, or set dtype for 16 and 32")
        if self.activation_bits not in (None, 8, 16):
            raise ConfigError(f"quantization.activation_bits is {self.activation_bits!r}; choose 8 or 16")
        if self.head_bits not in (8, 16):
            raise ConfigError(f"quantization.head_bits is {self.head_bits!r}; choose 8 or 16")
        if self.weight_bits == 8 and not self.symmetric:
            raise ConfigError(
                "quantization.symmetric is False: INT8 weights are symmetric; asymmetric exists for weight_bits 4"
            )
        if self.weight_bits == 4 and self.group_size not in (None, 32, 64, 128):
            raise ConfigError(f"quantization.group_size is {self.group_size!r}; INT4 needs groups of 32, 64 or 128")
        if self.group_size is not None:
            _whole("quantization", "group_size", self.group_size, 0)
            if self.group_size % 2:
                raise ConfigError(
                    f"quantization.group_size is {self.group_size}; give an even number, or 0 for one scale a channel"
                )
        _whole("quantization", "activation_group_size", self.activation_group_size, 0)

    @property
    def group(self) -> int | None:
        size = self.group_size if self.group_size is not None else (64 if self.weight_bits == 4 else 0)
        return size or None

    @property
    def activation(self) -> ActivationQuant | None:
        bits = self.activation_bits or (8 if self.weight_bits == 8 else 16)
        return ActivationQuant(group=self.activation_group_size or None) if bits == 8 else None

    @classmethod
    def parse(cls, spec: str) -> "QuantizationConfig":
        """From a short form: int8, int4, w8a8, w8a16, w4a16 or w4a8; then -g64 (group of weights), -asym, -token (activation scales)."""
        m = re.fullmatch(r"(int8|int4|w([48])a(8|16))((?:-g\d+|-asym|-token)*)", spec)
        options = m[4].split("-")[1:] if m else []
        groups = [int(o[1:]) for o in options if o[0] == "g"]
        if not m or len(groups) > 1:
            raise ConfigError(
                f"quantisation {spec!r} is not understood; examples: int8, int4, w8a16, w4a16-g32, w4a16-g64-asym, w8a8-token"
            )
        out = cls(
            weight_bits=int(m[2] or m[1][3:]),
            activation_bits=int(m[3]) if m[3] else None,
            group_size=groups[-1] if groups else None,
            symmetric="asym" not in options,
            activation_group_size=0 if "token" in options else 64,
        )
        if "token" in options and out.activation is None:
            raise ConfigError(f"quantisation {spec!r} keeps activations of 16 bits, so -token means nothing; leave it out")
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh. tensor_parallel_size shards every layer, pipeline_parallel_size spreads the layers."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self):
        for name in _fields(type(self)):
            _whole("engine", name, getattr(self, name), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The key/value cache. dtype: float32, bfloat16, float16 or int8 (a scale per head and token); by default that of the weights."""

    dtype: str | None = None

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in CACHE_DTYPES:
            raise ConfigError(f"kv_cache.dtype is {self.dtype!r}; choose one of {', '.join(CACHE_DTYPES)}")


_PARTS = {"quantization": QuantizationConfig, "engine": ParallelConfig, "kv_cache": CacheConfig}  # of EngineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is loaded and run.

    inference_max_tokens: prompt and new tokens of a sequence together. micro_batch_size: sequences decoded in one tick, at most; with
    a pipeline every stage holds as many. dtype: of the matrices; None keeps what the checkpoint stores, packed weights included.
    quantization: None leaves weights as they are. engine: the mesh. max_logprobs: alternatives that a request may ask for.
    memory_fraction: of the device's free memory that weights and cache may take. batch_invariant: a sequence's arithmetic has the same
    shapes whoever shares the batch, so that its result is the same bit for bit; every step costs what a full batch costs.
    compilation_cache: folder of XLA's persistent cache; None is the user's cache folder, False turns it off.
    """

    inference_max_tokens: int = 1024
    micro_batch_size: int = 8
    dtype: str | None = None
    quantization: QuantizationConfig | None = None
    engine: ParallelConfig = ParallelConfig()
    kv_cache: CacheConfig = CacheConfig()
    max_logprobs: int = 5
    memory_fraction: float = 0.9
    batch_invariant: bool = False
    compilation_cache: str | Path | bool | None = None

    def __post_init__(self):
        for name, part in _PARTS.items():
            value = getattr(self, name)
            if not isinstance(value, part) and not (name == "quantization" and value is None):
                raise ConfigError(f"{name} is {value!r}; give a {part.__name__}, or a dict through EngineConfig.load")
        if self.quantization is not None and not self.quantization.enabled:
            object.__setattr__(self, "quantization", None)
        _whole("config", "inference_max_tokens", self.inference_max_tokens, 2)
        _whole("config", "micro_batch_size", self.micro_batch_size, 1)
        _whole("config", "max_logprobs", self.max_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}, or quantization for fewer bits")
        if not is_number(self.memory_fraction) or not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction is {self.memory_fraction!r}; give a number above 0, at most 1")
        if not isinstance(self.compilation_cache, str | Path | bool | None):
            raise ConfigError(f"compilation_cache is {self.compilation_cache!r}; give a folder, None for the user's, or False")

    @classmethod
    def load(cls, source: "EngineConfig | Mapping[str, Any] | str | Path | None") -> "EngineConfig":
        """From an EngineConfig, a dict, the path of a JSON file, or None for the defaults. Raises ConfigError."""
        if source is None:
            return cls()
        if isinstance(source, cls):
            return source
        if isinstance(source, str | Path):
            try:
                source = json.loads(Path(source).read_text())
            except OSError as e:
                raise ConfigError(f"the configuration {source} cannot be read: {e.strerror}") from e
            except json.JSONDecodeError as e:
                raise ConfigError(f"the configuration {source} is not JSON: {e}") from e
        if not isinstance(source, Mapping):
            raise ConfigError(f"a configuration is a dict or a JSON object, got {type(source).__name__}")
        values = _checked_keys(cls, source, "the configuration")
        for key, part in _PARTS.items():
            if isinstance(values.get(key), Mapping):
                values[key] = part(**_checked_keys(part, values[key], key))
            elif key == "quantization" and isinstance(values.get(key), str):
                values[key] = QuantizationConfig.parse(values[key])
        return cls(**values)
