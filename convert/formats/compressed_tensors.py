"""compressed-tensors: groups of modules, each with a scheme for weights and inputs, as llm-compressor writes them.

    pack-quantized       weight_packed int32 [O, ceil(I / n)]   values plus 2^(bits-1), n = 32 / bits to a word from its lowest bits on
                         weight_scale [O, G], weight_zero_point int32 [ceil(O / n), G] packed along the outputs, weight_shape
    int-quantized        weight int8 [O, I], weight_scale [O, 1] or [O, G], weight_zero_point int8 likewise
    float-quantized      weight float8_e4m3fn [O, I], weight_scale [1], [O, 1] or one for each block
    mxfp4-pack-quantized weight_packed uint8 [O, I / 2], the low nibble first, weight_scale uint8 [O, I / 32]
    naive-quantized      as int- or float-quantized

Quantisation of inputs becomes the QTensor's activation: dynamic per token or group, or static with input_scale [1] of the module.
Layout: the compressed-tensors package.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import ConversionError, UnsupportedFormatError
from convert.formats.base import Bundle, PackedMatrix, Settings, bundles, in_units, nibbles_in_order, repeated_group, starts
from convert.formats.block_fp8 import FP8Matrix, one_scale
from convert.formats.gptq import pack_words
from convert.readers.base import LazyTensor, PackedFormat
from pallas_kernels.qtensor import ActivationQuant
from pallas_kernels.value_formats import MX_GROUP
from sharding.partition import Units

METHOD = "compressed-tensors"
PACKED, INT, FLOAT, NAIVE, MXFP4 = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
)
FORMATS = (PACKED, INT, FLOAT, NAIVE, MXFP4)
ENDS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale")
UNDERSTOOD = {"quant_method", "config_groups", "format"}
HARMLESS = {"global_compression_ratio", "ignore", "quantization_status", "version", "transform_config"}
NEUTRAL: dict[str, Any] = {"sparsity_config": {}, "moe_sparsity_config": {}, "run_compressed": True}
# what an observer did does not matter any more, nor in which order columns were quantised, where they are stored in theirs
ARGS = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"}
ARGS_HARMLESS = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
REGEX = "re:"


def read(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """The tensors with one packed matrix for each module. Raises UnsupportedFormatError, MissingTensorError."""
    sparse = (config.get("sparsity_config") or {}).get("format") == "dense"
    settings = Settings({k: v for k, v in config.items() if not (sparse and k == "sparsity_config")}, where)
    if transforms := (settings.get("transform_config") or {}).get("config_groups"):
        raise settings.error(f"transform_config has {', '.join(map(repr, transforms))}, and transforms are not applied")
    settings.only(UNDERSTOOD | HARMLESS, NEUTRAL)
    groups = [Scheme(group, settings, name) for name, group in settings.get("config_groups", {}).items()]
    found, rest = bundles(tensors, "weight_scale", ENDS)
    return rest | {bundle.name: _matrix(bundle, _scheme_of(bundle.module, groups, settings)) for bundle in found}


class Scheme:
    """One of the config_groups: which modules, and how their weights and inputs are quantised."""

    def __init__(self, group: Mapping[str, Any], settings: Settings, name: str):
        where = f"{settings.where}, config_groups.{name}"
        whole = Settings(group, where)
        whole.only({"targets", "weights", "input_activations", "format"}, {"output_activations": {}})
        self.targets = tuple(whole.get("targets", ()))
        weights = Settings(whole.get("weights", {}), f"{where}.weights")
        weights.only(ARGS | ARGS_HARMLESS, {})
        self.format = whole.one_of("format", FORMATS, settings.get("format"))
        self.bits = weights.one_of("num_bits", (4, 8), 8)
        self.type = weights.one_of("type", ("int", "float"), "int")
        self.symmetric = weights.one_of("symmetric", (True, False), True)
        weights.one_of("dynamic", (False,), False)
        self.strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"), "tensor")
        self.group = weights.get("group_size") if self.strategy == "group" else None
        block = weights.get("block_structure")
        if isinstance(block, str):
            block = [int(n) for n in block.split("x")]
        self.block = block if self.strategy == "block" else None
        if self.type == "float" and self.bits == 8 and self.group:
            self.block = [1, self.group]
        if self.type == "float" and self.bits == 4 and self.format != MXFP4:
            raise weights.error("4-bit floats are read in mxfp4-pack-quantized only")
        self.activation = _activation(whole.get("input_activations"), f"{where}.input_activations")

    def exact(self, module: str) -> bool:
        return module in self.targets

    def matches(self, module: str) -> bool:
        return any(re.match(t.removeprefix(REGEX), module) for t in self.targets if t.startswith(REGEX))

    def by_class(self, module: str) -> bool:
        return "Linear" in self.targets


def _scheme_of(module: str, groups: list[Scheme], settings: Settings) -> Scheme:
    """Names before patterns before classes of modules, as the package resolves them."""
    for matches in (Scheme.exact, Scheme.matches, Scheme.by_class):
        for group in groups:
            if matches(group, module):
                return group
    raise settings.error(f"{module} has a weight_scale, but none of config_groups has it as a target")


def _activation(config: Mapping[str, Any] | None, where: str) -> ActivationQuant | None:
    if config is None:
        return None
    settings = Settings(config, where)
    settings.only(ARGS | ARGS_HARMLESS, {})
    settings.one_of("num_bits", (8,), 8)
    settings.one_of("symmetric", (True,), True)
    kind = "fp8" if settings.one_of("type", ("int", "float"), "int") == "float" else "int8"
    if not settings.one_of("dynamic", (True, False), False):
        settings.one_of("strategy", ("tensor",), "tensor")
        return ActivationQuant(format=kind, group=None, static=True)
    strategy = settings.one_of("strategy", ("token", "group"), "token")
    return ActivationQuant(format=kind, group=settings.get("group_size") if strategy == "group" else None)


def _matrix(bundle: Bundle, scheme: Scheme) -> LazyTensor:
    if "weight_g_idx" in bundle:
        raise UnsupportedFormatError(f"{bundle.module}.weight_g_idx: actorder 'group' is not read; requantise with 'weight'")
    static = bundle["input_scale"] if scheme.activation is not None and scheme.activation.static else None
    if scheme.type == "float" and scheme.bits == 8:
        return FP8Matrix(
            bundle["weight"], bundle["weight_scale"], block=scheme.block, activation=scheme.activation, input_scale=static
        )
    if scheme.format == MXFP4:
        return MXFP4Matrix(bundle["weight_packed"], bundle["weight_scale"], bundle.name)
    return IntMatrix(bundle, scheme)


class IntMatrix(PackedMatrix):
    """Integers, packed into words or one to a byte."""

    def __init__(self, bundle: Bundle, scheme: Scheme):
        self._words = scheme.format == PACKED
        self._weight = bundle["weight_packed" if self._words else "weight"]
        self._per, self._scheme, self.name = 32 // scheme.bits, scheme, bundle.name
        if not self._words and (scheme.bits != 8 or self._weight.dtype != np.int8):
            raise UnsupportedFormatError(f"{self._weight.name} is {self._weight.dtype} of {scheme.bits} bits, not int8")
        outputs, inputs = self._weight.shape
        if self._words:
            inputs *= self._per
            if "weight_shape" in bundle and tuple(np.asarray(bundle["weight_shape"].read()).tolist()) != (outputs, inputs):
                raise UnsupportedFormatError(
                    f"{self._weight.name}: its inputs do not fill words of {self._per}, which is not read"
                )
            self.columns = self._per
        self.shape = (outputs, inputs)
        self._size = scheme.group or inputs
        # padding inputs need scales of their own where a value of 0 does not stand for zero
        grouped = scheme.group or scheme.bits == 4 or not scheme.symmetric
        group = repeated_group(self._size, inputs) if grouped else None
        if scheme.block or inputs % self._size or group == 0:
            raise UnsupportedFormatError(f"{self.name}: blocks {scheme.block or self._size} do not suit {self.shape} integers")
        self._scales = bundle["weight_scale"]
        self._groups = inputs // self._size
        if self._scales.shape not in [(outputs, self._groups), *([(), (1,)] if scheme.strategy == "tensor" else [])]:
            raise UnsupportedFormatError(f"{self._scales.name} {self._scales.shape} is no scale of {self.shape}")
        self._zeros = None if scheme.symmetric else bundle["weight_zero_point"]
        self._inputs = bundle["input_scale"] if scheme.activation and scheme.activation.static else None
        form = "int4" if scheme.bits == 4 else "int8" if scheme.symmetric else "uint8"
        self.packed = PackedFormat(
            format=form,
            group=group,
            zeros=not scheme.symmetric,
            scale_dtype=self._scales.dtype,
            zeros_dtype=None if scheme.symmetric else np.dtype(np.uint8),
            activation=scheme.activation,
        )

    def values(self, rows: Units, columns: Units) -> np.ndarray:
        if not self._words:
            values = np.asarray(self._weight.read((rows, columns)))
            return values if self._scheme.symmetric else values.view(np.uint8) ^ 0x80
        packed = np.asarray(self._weight.read((rows, in_units(columns, self._per)))).view(np.uint8)
        if self._scheme.bits == 4:
            return nibbles_in_order(packed, self.packed.group)
        return (packed ^ 0x80).view(np.int8) if self._scheme.symmetric else packed

    def scales(self, rows: Units, columns: Units) -> dict[str, np.ndarray]:
        spread = lambda a: np.broadcast_to(a.reshape(-1, a.shape[-1] if a.ndim == 2 else 1), (self.shape[0], self._groups))
        parts = {"scales": spread(np.asarray(self._scales.read()))}
        if self._zeros is not None:
            parts["zeros"] = spread(self._zero_points(np.asarray(self._zeros.read())))
        group = self.packed.group
        groups = starts(columns, group) // self._size if group else np.zeros(1, np.int64)
        out = {part: np.ascontiguousarray(a[rows.elements][:, groups]) for part, a in parts.items()}
        return out if self._inputs is None else out | {"input_scale": one_scale(self._inputs)}

    def _zero_points(self, stored: np.ndarray) -> np.ndarray:
        """uint8, shifted as the values are."""
        if stored.dtype == np.int8:
            return (stored.astype(np.int16) + (1 << self._scheme.bits - 1)).astype(np.uint8)
        words = np.ascontiguousarray(stored.T)  # [G, ceil(O / n)]
        zeros = words.view(np.uint8)
        if self._scheme.bits == 4:
            zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(words.shape[0], -1)
        if zeros.shape[1] < self.shape[0]:
            raise ConversionError(f"{self.name}: zero points for {zeros.shape[1]} of {self.shape[0]} outputs")
        return zeros[:, : self.shape[0]].T


class MXFP4Matrix(PackedMatrix):
    """Nibbles of e2m1 [O, I / 2], the low one first, and exponents [O, I / 32], both of bytes."""

    columns = 2

    def __init__(self, values: LazyTensor, scales: LazyTensor, name: str):
        outputs, half = values.shape
        self.name, self.shape = name, (outputs, half * 2)
        if scales.shape != (outputs, half * 2 // MX_GROUP) or {values.dtype, scales.dtype} != {np.dtype(np.uint8)}:
            raise UnsupportedFormatError(f"{values.name} {values.dtype} {values.shape} with scales {scales.shape} is not mxfp4")
        self._weight, self._scales = values, scales
        self.packed = PackedFormat(format="mxfp4", group=MX_GROUP, scale_dtype=np.dtype(np.uint8))

    def values(self, rows: Units, columns: Units) -> np.ndarray:
        return nibbles_in_order(np.asarray(self._weight.read((rows, in_units(columns, 2)))), MX_GROUP)

    def scales(self, rows: Units, columns: Units) -> dict[str, np.ndarray]:
        return {"scales": np.asarray(self._scales.read((rows, in_units(columns, MX_GROUP))))}


def write(module: str, levels: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, *, bits: int) -> dict[str, np.ndarray]:
    """The tensors of a module, pack-quantized for 4 bits, int- and float-quantized for 8: levels int8 or float8 [O, I], scales, zero
    points [O, G]."""
    if bits == 8:
        out = {f"{module}.weight": levels, f"{module}.weight_scale": scales}
        return out if zeros is None else out | {f"{module}.weight_zero_point": zeros}
    outputs, inputs = levels.shape
    nibbles = (levels + 8).astype(np.uint8)
    out = {
        f"{module}.weight_packed": pack_words(nibbles.reshape(outputs, -1, 8), bits),
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": np.array([outputs, inputs], np.int64),
    }
    if zeros is not None:
        padded = np.zeros((scales.shape[1], -(-outputs // 8) * 8), np.uint8)
        padded[:, :outputs] = (zeros + 8).astype(np.uint8).T
        out[f"{module}.weight_zero_point"] = np.ascontiguousarray(pack_words(padded.reshape(scales.shape[1], -1, 8), bits).T)
    return out
