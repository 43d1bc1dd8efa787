"""GPTQ: int32 words along the inputs, zero points and scales per group, act-order through g_idx.

    qweight int32 [I / n, O]   word i holds inputs n i .. n i + n - 1 from its lowest bits on, n = 32 / bits
    qzeros int32 [G, O / n]    zero points of the outputs in the same order; version 1 stores them less one, modulo 2^bits
    scales float [G, O]        w = (q - zero) * scale
    g_idx int32 [I]            the group of each input, i // group unless weights were quantised in the order of their inputs' size

Groups that are runs of inputs become int4 or int8. Where g_idx scatters them, the inputs stay where they are and the QTensor names
the group of each (int4_ordered): inputs are shared by matrices of other orders and are split over devices by heads, so that they
cannot be permuted for one matrix. Names and layout: AutoGPTQ's checkpoint format "gptq", and "gptq_v2".
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import ConversionError, UnsupportedFormatError
from convert.formats.base import Bundle, PackedMatrix, Settings, bundles, in_units, nibbles_in_order, repeated_group, starts
from convert.readers.base import LazyTensor, PackedFormat
from pallas_kernels.qtensor import pack_int4
from sharding.partition import Units

METHOD = "gptq"
ENDS = ("qweight", "qzeros", "scales", "g_idx")
UNDERSTOOD = {"quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format"}
# how the weights were found, which files the model is in, and which kernels its authors had in mind
HARMLESS = {
    *(
        "damp_percent",
        "damp_auto_increment",
        "true_sequential",
        "static_groups",
        "mse",
        "act_group_aware",
        "hyb_act",
        "gptaq",
        "foem",
    ),
    *(
        "model_name_or_path",
        "model_file_base_name",
        "dataset",
        "tokenizer",
        "model_seqlen",
        "block_name_to_quantize",
        "pad_token_id",
    ),
    *(
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "batch_size",
        "cache_block_outputs",
        "max_input_length",
    ),
    *(
        "use_cuda_fp16",
        "use_exllama",
        "disable_exllama",
        "exllama_config",
        "backend",
        "meta",
        "lm_head",
        "quantizer",
        "pack_impl",
    ),
    "offload_to_disk",
}
NEUTRAL: dict[str, Any] = {
    "method": "gptq",
    "is_marlin_format": False,
    "dynamic": {},
    "pack_dtype": "int32",
    "rotation": "",
    "adapter": {},
}


def read(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """The tensors with one packed matrix for each module. Raises UnsupportedFormatError, MissingTensorError."""
    settings = Settings(config, where)
    settings.only(UNDERSTOOD | HARMLESS, NEUTRAL)
    bits = settings.one_of("bits", (4, 8))
    key = "checkpoint_format" if settings.get("checkpoint_format") else "format"  # newer writers have both
    version = settings.one_of(key, ("gptq", "gptq_v2"), "gptq")
    symmetric = settings.one_of("sym", (True, False), False)
    found, rest = bundles(tensors, "qweight", ENDS)
    return rest | {
        b.name: GPTQMatrix(b, bits=bits, size=settings.get("group_size", -1), symmetric=symmetric, less_one=version == "gptq")
        for b in found
    }


class GPTQMatrix(PackedMatrix):
    """One matrix; what its group_size and g_idx say is checked here, before a weight is read."""

    along = 1

    def __init__(self, bundle: Bundle, *, bits: int, size: int, symmetric: bool, less_one: bool):
        weight, self._per = bundle["qweight"], 32 // bits
        self._bits, self._less_one, self._symmetric = bits, less_one, symmetric
        inputs, outputs = weight.shape[0] * self._per, weight.shape[1]
        self.name, self.shape, self.columns = bundle.name, (outputs, inputs), self._per
        self._size = inputs if size == -1 else size
        groups = math.ceil(inputs / self._size)
        self._weight, self._scales = weight, bundle.expect("scales", (groups, outputs))
        self._zeros = bundle.expect("qzeros", (groups, math.ceil(outputs / self._per)))
        self._order = self._read_order(bundle)
        group = self._size if self._order is not None else repeated_group(self._size, inputs)
        if inputs % self._size or not group or math.lcm(group, self._per) > inputs or inputs % math.lcm(group, self._per):
            raise UnsupportedFormatError(f"{self.name}: groups of {size} do not divide its {inputs} inputs")
        if self._order is not None and bits != 4:
            raise UnsupportedFormatError(f"{self.name} is in act-order with {bits} bits; act-order is read for 4 bits only")
        form = "int4_ordered" if self._order is not None else "int4" if bits == 4 else "int8" if symmetric else "uint8"
        zeros = None if symmetric else np.dtype(np.uint8)
        self.packed = PackedFormat(
            format=form, group=group, zeros=not symmetric, scale_dtype=self._scales.dtype, zeros_dtype=zeros
        )

    def _read_order(self, bundle: Bundle) -> np.ndarray | None:
        """g_idx, or None where every group is a run of inputs."""
        if "g_idx" not in bundle:
            return None
        inputs = self.shape[1]
        order = np.asarray(bundle.expect("g_idx", (inputs,)).read()).astype(np.int32)
        if (order == np.arange(inputs) // self._size).all():
            return None
        if order.min() < 0 or order.max() >= self._scales.shape[0]:
            raise ConversionError(f"{bundle.module}.g_idx names groups {order.min()}..{order.max()} of {self._scales.shape[0]}")
        return order

    def values(self, rows: Units, columns: Units) -> np.ndarray:
        words = np.asarray(self._weight.read((in_units(columns, self._per), rows)))
        # byte b of word i of an output: its inputs lie one after another
        packed = words.view(np.uint8).reshape(*words.shape, 4).transpose(1, 0, 2).reshape(rows.length, -1)
        if self._bits == 4:
            return nibbles_in_order(packed, self.packed.group)
        return (packed ^ 0x80).view(np.int8) if self._symmetric else packed

    def scales(self, rows: Units, columns: Units) -> dict[str, np.ndarray]:
        scales = np.asarray(self._scales.read((None, rows)))
        zeros = self._zero_points()[:, rows.elements]
        if self._symmetric and (zeros != 1 << self._bits - 1).any():
            raise ConversionError(f"{self.name}: the quantization_config says sym, but zero points differ from the middle")
        parts = {"scales": scales} if self._symmetric else {"scales": scales, "zeros": zeros}
        if self._order is not None:
            order = np.ascontiguousarray(self._order[None, columns.elements])
            return {**{part: np.ascontiguousarray(a.T) for part, a in parts.items()}, "order": order}
        groups = starts(columns, self.packed.group or 1) // self._size
        return {part: np.ascontiguousarray(a[groups].T) for part, a in parts.items()}

    def _zero_points(self) -> np.ndarray:
        """uint8 [G, O]."""
        words = np.asarray(self._zeros.read())
        zeros = words.view(np.uint8)
        if self._bits == 4:
            zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(words.shape[0], -1)
        zeros = zeros[:, : self.shape[0]]
        return (zeros + np.uint8(self._less_one)) & np.uint8((1 << self._bits) - 1)


def write(
    module: str, levels: np.ndarray, scales: np.ndarray, zeros: np.ndarray, *, group: int, bits: int
) -> dict[str, np.ndarray]:
    """The tensors of a module in version 1: levels uint8 [O, I], scales and zero points [O, G]."""
    per = 32 // bits
    packed = pack_words(np.ascontiguousarray(levels.T).reshape(-1, per, levels.shape[0]).swapaxes(1, 2), bits)
    less_one = (zeros.astype(np.int16) - 1).astype(np.uint8) & np.uint8((1 << bits) - 1)
    return {
        f"{module}.qweight": packed,
        f"{module}.qzeros": pack_words(np.ascontiguousarray(less_one.T).reshape(scales.shape[1], -1, per), bits),
        f"{module}.scales": np.ascontiguousarray(scales.T),
        f"{module}.g_idx": (np.arange(levels.shape[1]) // group).astype(np.int32),
    }


def pack_words(levels: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., 32 / bits] -> int32 [...], the first one lowest."""
    if bits == 4:
        levels = pack_int4(levels.reshape(-1, 2), 2).reshape(*levels.shape[:-1], 4)
    return np.ascontiguousarray(levels).view("<i4")[..., 0]
