"""What a user sets about an engine: EngineConfig and its parts; frozen, checked once, from Python, a dict or a JSON file."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer import deepspeed
from jaxinfer.errors import ConfigError
from jaxinfer.values import CACHE_DTYPES, DTYPES, check_keys, dtype_name, merge
from pallas_kernels.qtensor import ActivationQuant

AUTO = "auto"
MATMUL_PRECISIONS = ("float32", "tf32_x3", "tf32", "bfloat16")
KERNELS = ("auto", "native", "xla")
SHORT_FORM = r"(int8|int4|w([48])a(8|16)|(fp8|nf4|mxfp4|stored))((?:-g\d+|-asym|-token|-a8|-a16|-attn8)*)"  # of a quantisation
RULE_FORM = f"{SHORT_FORM}|{'|'.join(DTYPES)}"
FLOATS = {16: "bfloat16", 32: "float32"}  # weights that are no levels, by their bits
WEIGHT_FORMATS = {"int": (8, 4), "fp8": (8,), "nf4": (4,), "mxfp4": (4,), "stored": (8,)}  # and the bits that they exist in
MAX_TOP_LOGPROBS = 20  # alternatives that a request may ask for, at most


def _fields(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _option(default: Any, **limits: Any) -> Any:
    """A field with what a JSON schema says about its values; whole numbers are checked by it."""
    return dataclasses.field(default=default, metadata=limits)


def is_number(value: Any) -> bool:
    """A finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(owner: str, config: Any) -> None:
    """Hold whole numbers, booleans and choices against the limits of their fields. Raises ConfigError."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        if type(value) is type(field.default) and value == field.default:
            continue
        if "enum" in limits and not any(type(value) is type(choice) and value == choice for choice in limits["enum"]):
            choices = [str(choice) for choice in limits["enum"] if choice is not None]
            which = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
            raise ConfigError(f"{owner}{field.name} is {value!r}; choose {which}{limits.get('advice', '')}")
        if field.type is bool and not isinstance(value, bool):
            raise ConfigError(f"{owner}{field.name} is {value!r}; give True or False")
        if "minimum" in limits and value not in limits.get("also", ()):
            low, high = limits["minimum"], limits.get("maximum")
            if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
                limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
                words = "".join(f", or {word!r}" for word in limits.get("also", ()) if word is not None)
                raise ConfigError(f"{owner}{field.name} is {value!r}; give a whole number {limit}{words}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Round-to-nearest quantisation of every matrix while it is loaded.

    enabled: False leaves weights as they are, whatever else is given. weight_bits: 8 or 4; 16 and 32 are bfloat16 (float16 where dtype is
    that) and float32, for all matrices without a rule. activation_bits: 8 (dynamic) or 16 (left as they are); by default 8 with weights of
    8 bits, else 16. group_size: inputs per weight scale, 0 for one scale per output channel; by default 0 for 8 bits, 64 for 4, which take
    32, 64 or 128 (mxfp4 has 32). symmetric: False stores a minimum per group (INT4).
    activation_group_size: inputs per activation scale, 0 for one a token. head_bits: of embedding and head: 8, 4 (in the weights' groups,
    or 64), or 16 to leave them as they are; by default 8 with weights of 8 and 4 bits. attention_bits: 8 rounds queries, keys, values and
    the weights of their sum with dynamic ranges, so that attention multiplies integers; 16 leaves them as they are. weight_format: int,
    fp8 (e4m3, 8 bits), nf4 or mxfp4 (4 bits), or stored: INT8 and INT4 weights as the checkpoint holds them, and activation_bits alone
    decides about their inputs. skip: patterns of module paths, such as "blocks.0.*" or "*.mlp.down", of matrices that stay as they are.
    rules: patterns, and for each the short form or the dtype of the matrices that it matches, "embedding" and "head" among them; the first
    pattern that matches decides, and skip comes before. A pattern that matches nothing is refused.
    """

    enabled: bool = True
    weight_bits: int = _option(8, enum=(8, 4, 16, 32))
    activation_bits: int | None = _option(None, enum=(None, 8, 16))
    group_size: int | None = _option(None, minimum=0, multipleOf=2, also=(None,))
    symmetric: bool = True
    activation_group_size: int = _option(64, minimum=0)
    head_bits: int | None = _option(None, enum=(None, 8, 4, 16))
    attention_bits: int = _option(16, enum=(16, 8))
    weight_format: str = _option("int", enum=tuple(WEIGHT_FORMATS))
    skip: tuple[str, ...] = _option((), json={"type": "array", "items": {"type": "string", "minLength": 1}})
    rules: Mapping[str, str] | None = _option(
        None, json={"type": ["object", "null"], "additionalProperties": {"type": "string", "pattern": f"^({RULE_FORM})$"}}
    )

    def __post_init__(self):
        _check("quantization.", self)
        bits, form = self.weight_bits, self.weight_format
        if form == "stored":
            for name, usual in (("weight_bits", 8), ("group_size", None), ("symmetric", True), ("head_bits", None)):
                if (value := getattr(self, name)) != usual:
                    raise ConfigError(f"quantization.{name} is {value!r}: weights stay as they are stored; leave it out")
            if self.activation_bits is None:
                raise ConfigError(
                    "quantization.weight_format is 'stored': say in activation_bits, 8 or 16, how inputs are read"
                )
        if bits in FLOATS:
            for name, default in (("weight_format", "int"), ("group_size", None), ("symmetric", True), ("activation_bits", 16)):
                if (value := getattr(self, name)) not in (default, None):
                    raise ConfigError(f"quantization.{name} is {value!r}: weights of {bits} bits are floats; leave it out")
        elif bits not in WEIGHT_FORMATS[form]:
            raise ConfigError(
                f"quantization.weight_format is {form!r}, which has {WEIGHT_FORMATS[form][0]} bits; weight_bits is {bits}"
            )
        if not self.symmetric and (bits, form) != (4, "int"):
            what = "INT8 weights are" if form == "int" else f"{form} weights are"
            raise ConfigError(f"quantization.symmetric is False: {what} symmetric; asymmetric exists for weight_bits 4")
        if form == "mxfp4" and self.group_size not in (None, 32):
            raise ConfigError(f"quantization.group_size is {self.group_size!r}; mxfp4 has groups of 32")
        if bits == 4 and self.group_size not in (None, 32, 64, 128):
            raise ConfigError(f"quantization.group_size is {self.group_size!r}; INT4 and NF4 need groups of 32, 64 or 128")
        if self.group_size is not None and self.group_size % 2:
            raise ConfigError(
                f"quantization.group_size is {self.group_size}; give an even number, or 0 for one scale a channel"
            )
        object.__setattr__(self, "skip", self._patterns())
        object.__setattr__(self, "rules", self._checked_rules())

    def _patterns(self) -> tuple[str, ...]:
        given = self.skip
        if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(p, str) and p for p in given):
            raise ConfigError(f'quantization.skip is {given!r}; give a list of patterns such as "blocks.0.*"')
        return tuple(given)

    def _checked_rules(self) -> dict[str, str] | None:
        if self.rules is None:
            return None
        if not isinstance(self.rules, Mapping):
            raise ConfigError(f"quantization.rules is {self.rules!r}; give a dict of patterns and short forms")
        for pattern, form in self.rules.items():
            if not isinstance(pattern, str) or not pattern or not isinstance(form, str):
                raise ConfigError(f"quantization.rules has {pattern!r}: {form!r}; give a pattern and a short form or a dtype")
            if form not in DTYPES and type(self).parse(form).attention_bits != 16:
                raise ConfigError(
                    f"quantization.rules has {pattern!r}: {form!r}; attention_bits is for all layers, not of a rule"
                )
        return dict(self.rules) or None

    @property
    def format(self) -> str:
        """The format of the weights as `pallas_kernels.qtensor` calls it."""
        return f"int{self.weight_bits}" if self.weight_format == "int" else self.weight_format

    @property
    def group(self) -> int | None:
        default = 32 if self.weight_format == "mxfp4" else 64 if self.weight_bits == 4 else 0
        return (self.group_size if self.group_size is not None else default) or None

    @property
    def activation(self) -> ActivationQuant | None:
        bits = self.activation_bits or (8 if self.weight_bits == 8 else 16)
        if bits == 16:
            return None
        return ActivationQuant(
            group=self.activation_group_size or None, format="fp8" if self.weight_format == "fp8" else "int8"
        )

    @classmethod
    def parse(cls, spec: str) -> "QuantizationConfig":
        """From a short form: int8, int4, fp8, nf4, mxfp4, stored, w8a8, w8a16, w4a16 or w4a8; then -g64 (group of weights), -asym, -token
        (activation scales), -a8 or -a16 (bits of inputs, where the form does not say them), -attn8 (integer attention)."""
        m = re.fullmatch(SHORT_FORM, spec)
        options = m[5].split("-")[1:] if m else []
        groups = [int(o[1:]) for o in options if o[0] == "g"]
        inputs = [int(o[1:]) for o in options if o in ("a8", "a16")] + ([int(m[3])] if m and m[3] else [])
        if not m or len(groups) > 1 or len(inputs) > 1:
            raise ConfigError(
                f"quantisation {spec!r} is not understood; examples: int8, int4, w8a16, w4a16-g32, w4a16-g64-asym, w8a8-token, "
                "fp8, fp8-a16, nf4, mxfp4, stored-a8"
            )
        name = m[4] or "int"
        out = cls(
            weight_format=name,
            weight_bits=WEIGHT_FORMATS[name][0] if m[4] else int(m[2] or m[1][3:]),
            activation_bits=inputs[0] if inputs else None,
            group_size=groups[-1] if groups else None,
            symmetric="asym" not in options,
            activation_group_size=0 if "token" in options else 64,
            attention_bits=8 if "attn8" in options else 16,
        )
        if "token" in options and out.activation is None:
            raise ConfigError(f"quantisation {spec!r} keeps activations of 16 bits, so -token means nothing; leave it out")
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh, which takes their product of devices.

    tensor_parallel_size: devices that share every layer. pipeline_parallel_size: stages that share the layers. data_parallel_size: copies
    of the model, which share the sequences. expert_parallel_size: devices that share the experts of every layer that has some, and the
    sequences: each reads and decodes its own, and sends tokens to the experts that they chose. int8_across_hosts: sums over tensor shards
    cross hosts as INT8, which rounds them; needs tensor shards on several hosts. sequence_parallel: prompts have their tokens split over
    tensor shards between half layers, so that each norms and keeps its part of them; needs tensor shards, excludes int8_across_hosts.
    """

    tensor_parallel_size: int = _option(1, minimum=1)
    pipeline_parallel_size: int = _option(1, minimum=1)
    data_parallel_size: int = _option(1, minimum=1)
    expert_parallel_size: int = _option(1, minimum=1)
    int8_across_hosts: bool = False
    sequence_parallel: bool = False

    def __post_init__(self):
        _check("engine.", self)
        if self.sequence_parallel and self.int8_across_hosts:
            raise ConfigError(
                "engine.sequence_parallel and engine.int8_across_hosts are both True; split tokens are summed as floats: leave one of them"
            )

    @property
    def devices(self) -> int:
        """That the mesh takes."""
        sequences = self.pipeline_parallel_size * self.data_parallel_size * self.expert_parallel_size
        return self.tensor_parallel_size * sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The key/value cache.

    dtype: float32, bfloat16 or float16; int8 or fp8 (a scale per head and token); int4 (keys with scales per channel of 32 tokens,
    of which the newest stay bfloat16, values with scales per head and token). By default that of the weights.
    """

    dtype: str | None = _option(None, enum=CACHE_DTYPES)

    def __post_init__(self):
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        _check("kv_cache.", self)


_PARTS = {"quantization": QuantizationConfig, "engine": ParallelConfig, "kv_cache": CacheConfig}  # of EngineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is loaded and run.

    checkpoint: the model, for init_inference without one. inference_max_tokens: prompt and new tokens of a sequence together.
    prefill_chunk: tokens of a prompt that are read at once, over the cache of those before them; None reads whole prompts.
    micro_batch_size: sequences decoded in one tick, at most; with a pipeline every stage holds as many, with data parallelism every
    copy. "auto" takes the largest power of two that fits in memory. dtype: of the matrices; None keeps what the checkpoint stores,
    packed weights included. quantization: None leaves weights as they are. engine: the mesh. kv_cache: how keys and values are kept.
    matmul_precision: how float32 matrices are multiplied on a GPU: float32 as they are, tf32_x3 as three products of TF32, tf32 as one of
    10 bits of mantissa, bfloat16 as one of 7. kernels: auto takes the fastest implementation of every operation, native requires those for
    CPUs, xla does without them. head_sketch: keep 5 bits of each weight of a small model's head beside it, from which native kernels find
    the most likely token of one or two sequences without reading the head; the token is the same.
    batch_invariant: a sequence's arithmetic has the same shapes whoever shares the batch, so that its result is the same bit
    for bit; every step costs what a full batch costs. max_logprobs: alternatives that a request may ask for. memory_fraction: of the
    device's free memory that weights, cache and temporary arrays may take. compilation_cache: folder of XLA's persistent cache; None is
    the user's cache folder, False turns it off. executables: folder of what `jaxinfer compile` wrote, which must have some for this model,
    its weights and mesh; None takes those beside the checkpoint where there are some for these, True requires them, False takes none.
    """

    checkpoint: str | None = None
    inference_max_tokens: int = _option(1024, minimum=2)
    prefill_chunk: int | None = _option(None, minimum=1, also=(None,))
    # a number once the memory plan has chosen it
    micro_batch_size: int | Any = dataclasses.field(default=8, metadata={"minimum": 1, "also": (AUTO,)})
    dtype: str | None = _option(None, enum=DTYPES, advice=", or quantization for fewer bits")
    quantization: QuantizationConfig | None = None
    engine: ParallelConfig = ParallelConfig()
    kv_cache: CacheConfig = CacheConfig()
    matmul_precision: str = _option("float32", enum=MATMUL_PRECISIONS)
    kernels: str = _option("auto", enum=KERNELS)
    head_sketch: bool = True
    batch_invariant: bool = False
    max_logprobs: int = _option(5, minimum=0, maximum=MAX_TOP_LOGPROBS)
    memory_fraction: float = _option(0.9, exclusiveMinimum=0, maximum=1)
    compilation_cache: str | Path | bool | None = None
    executables: str | Path | bool | None = None

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        for name, part in _PARTS.items():
            value = getattr(self, name)
            if not isinstance(value, part) and not (name == "quantization" and value is None):
                raise ConfigError(f"{name} is {value!r}; give a {part.__name__}, or a dict through EngineConfig.load")
        if self.quantization is not None and not self.quantization.enabled:
            put("quantization", None)
        if self.prefill_chunk is not None and self.engine.sequence_parallel:
            raise ConfigError(
                f"prefill_chunk is {self.prefill_chunk} and engine.sequence_parallel True, which splits whole prompts; leave one"
            )
        put("dtype", dtype_name(self.dtype))
        for name in ("checkpoint", "compilation_cache", "executables"):
            if isinstance(getattr(self, name), Path):
                put(name, str(getattr(self, name)))
        _check("", self)
        if self.quantization is not None:
            self._check_quantization(self.quantization)
        if not is_number(self.memory_fraction) or not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction is {self.memory_fraction!r}; give a number above 0, at most 1")
        if not isinstance(self.executables, str | bool | None):
            raise ConfigError(
                f"executables is {self.executables!r}; give a folder, True or None for those beside the checkpoint, or False"
            )
        if not isinstance(self.compilation_cache, str | bool | None):
            raise ConfigError(f"compilation_cache is {self.compilation_cache!r}; give a folder, None for the user's, or False")
        if not isinstance(self.checkpoint, str | None) or self.checkpoint == "":
            raise ConfigError(f"checkpoint is {self.checkpoint!r}; give a path, a hub id or 'demo'")

    def _check_quantization(self, q: QuantizationConfig) -> None:
        """Raise ConfigError for a dtype or a cache that the quantisation contradicts."""
        if q.weight_bits in FLOATS and self.dtype not in (None, *(name for name in DTYPES if f"{q.weight_bits}" in name)):
            raise ConfigError(f"quantization.weight_bits is {q.weight_bits} and dtype is {self.dtype!r}; leave one of them")
        if q.attention_bits == 8 and self.cache_dtype in ("fp8", "int4"):
            raise ConfigError(
                f"quantization.attention_bits is 8 and kv_cache.dtype {self.cache_dtype!r}; integers are read from int8 and float caches"
            )

    @property
    def cache_dtype(self) -> str:
        """The dtype of keys and values by name."""
        return self.kv_cache.dtype or self.dtype or "float32"

    @classmethod
    def load(
        cls, source: "EngineConfig | Mapping[str, Any] | str | Path | None", more: Mapping[str, Any] | None = None
    ) -> "EngineConfig":
        """From an EngineConfig, a dict, the path of a JSON file, or None for the defaults.

        more: further keys, as keyword arguments give them. Keys are those of EngineConfig and of DeepSpeed's inference configuration
        (jaxinfer.deepspeed). Raises ConfigError for an unknown key, a value that cannot be used, and two values for one thing.
        """
        if isinstance(source, cls) and not more:
            return source
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        values = deepspeed.translate(merge(_written(source), _written(more)), tuple(_PARTS), defaults)
        check_keys(values, _fields(cls), "the configuration", deepspeed.NAMES)
        for name, part in _PARTS.items():
            if isinstance(values.get(name), Mapping):
                check_keys(values[name], _fields(part), name)
                values[name] = part(**values[name])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `load` gives an equal configuration back."""
        return dataclasses.asdict(self)


def _written(source: Any) -> dict[str, Any]:
    """What a source sets, under the names that it uses; parts as dicts."""
    if source is None:
        return {}
    if isinstance(source, EngineConfig):
        return _set_by(source)
    if isinstance(source, str | Path):
        source = _read(source)
    if not isinstance(source, Mapping):
        raise ConfigError(f"a configuration is a dict or a JSON object, got {type(source).__name__}")
    values = {key: _set_by(value) if isinstance(value, tuple(_PARTS.values())) else value for key, value in source.items()}
    if "dtype" in values:
        values["dtype"] = dtype_name(values["dtype"])
    if isinstance(short_form := values.get("quantization"), str):
        short = dataclasses.asdict(QuantizationConfig.parse(short_form))
        values["quantization"] = {key: value for key, value in short.items() if value is not None}
    return values


def _set_by(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults, parts as dicts."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            out[field.name] = _set_by(value) if dataclasses.is_dataclass(value) else value
    return out


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text("utf-8"), object_pairs_hook=_without_repeats)
    except OSError as e:
        raise ConfigError(f"the configuration {path} cannot be read: {e.strerror}") from e
    except ConfigError as e:
        raise ConfigError(f"the configuration {path}: {e}") from e
    except ValueError as e:
        raise ConfigError(f"the configuration {path} is not JSON: {e}") from e


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ConfigError for a key that stands in it twice, of which json would keep the last."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"the key {twice[0]!r} is there twice; leave one of them")
    return dict(pairs)
