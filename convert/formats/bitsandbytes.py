"""bitsandbytes: nf4 with blocks over the whole matrix, its absmax quantised once more or not, and int8 rows.

nf4:
    weight uint8 [O I / 2, 1]      two neighbours of the flattened matrix in a byte, the first one in the high nibble
    weight.absmax                  float32 [blocks], or uint8 levels of `nested_quant_map`
    weight.quant_map               float32 [16]
    weight.nested_absmax, weight.nested_quant_map          absmax = map[level] * nested_absmax + nested_offset
    weight.quant_state.bitsandbytes__nf4                   JSON as bytes: shape, blocksize, nested_offset, ...
int8:
    weight int8 [O, I], SCB float32 [O]                    w = value * SCB / 127

How its kernels round the inputs of int8 matrices (outliers apart) is no part of the format: inputs stay floats here.
Method: QLoRA, arXiv:2305.14314, and LLM.int8(), arXiv:2208.07339.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import UnsupportedFormatError
from convert.formats.base import Bundle, PackedMatrix, Settings, bundles, nibbles_in_order, repeated_group, starts
from convert.readers.base import FileTensor, LazyTensor, PackedFormat
from pallas_kernels.value_formats import NF4
from sharding.partition import Units

METHOD = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__"
MAPS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
FLAGS = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
UNDERSTOOD = {"quant_method", *FLAGS, "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"}
# what its kernels compute with, and which modules were left as they are, which the tensors tell
HARMLESS = {"bnb_4bit_compute_dtype", "llm_int8_skip_modules", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload"}


def read(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """The tensors with one packed matrix for each module. Raises UnsupportedFormatError, MissingTensorError."""
    settings = Settings(config, where)
    settings.only(UNDERSTOOD | HARMLESS, {"llm_int8_has_fp16_weight": False})
    if settings.get("load_in_4bit", settings.get("_load_in_4bit", False)):
        settings.one_of("bnb_4bit_quant_type", ("nf4",), "fp4")
        state = f"{STATE}nf4"
        found, rest = bundles(tensors, state, ("weight", state, *MAPS))
        return rest | {bundle.name: NF4Matrix(bundle, bundle[state]) for bundle in found}
    found, rest = bundles(tensors, "SCB", ("weight", "SCB", "weight_format"))
    return rest | {bundle.name: Int8Matrix(bundle) for bundle in found}


class NF4Matrix(PackedMatrix):
    def __init__(self, bundle: Bundle, state: LazyTensor):
        weight = bundle["weight"]
        try:
            facts = json.loads(np.asarray(state.read()).tobytes())
            shape, size = tuple(map(int, facts["shape"])), int(facts["blocksize"])
        except (ValueError, KeyError, TypeError) as error:
            raise UnsupportedFormatError(
                f"{state.name} does not describe a matrix ({error!r}); get the checkpoint again"
            ) from error
        if len(shape) != 2 or not np.array_equal(np.asarray(bundle["weight.quant_map"].read()), NF4):
            raise UnsupportedFormatError(f"{weight.name}, shape {shape}, is not of the nf4 table; other tables are not read")
        self.name, self.shape, self._size = weight.name, shape, size
        outputs, inputs = shape
        group = repeated_group(size, inputs)
        if not group or not isinstance(weight, FileTensor) or weight.nbytes * 2 != outputs * inputs:
            raise UnsupportedFormatError(f"{weight.name} of {weight.nbytes} bytes is no nf4 matrix {shape} in blocks of {size}")
        self._weight = weight.seen_as((outputs, inputs // 2), np.dtype(np.uint8))
        self._absmax = bundle.expect("weight.absmax", (math.ceil(outputs * inputs / size),))
        self._nested = None
        if "weight.nested_absmax" in bundle:
            self._nested = (bundle["weight.nested_quant_map"], bundle["weight.nested_absmax"])
            self._nested_size, self._offset = int(facts["nested_blocksize"]), np.float32(facts["nested_offset"])
        self.columns = 2
        self.packed = PackedFormat(format="nf4", group=group, scale_dtype=np.dtype(np.float32))

    def values(self, rows: Units, columns: Units) -> np.ndarray:
        packed = np.asarray(self._weight.read((rows, Units(columns.size // 2, columns.indices))))
        return nibbles_in_order(packed, self.packed.group, high_first=True)

    def scales(self, rows: Units, columns: Units) -> dict[str, np.ndarray]:
        places = rows.elements[:, None] * self.shape[1] + starts(columns, self.packed.group or 1)
        return {"scales": self._scales()[places // self._size]}

    def _scales(self) -> np.ndarray:
        """float32 [blocks]."""
        absmax = np.asarray(self._absmax.read())
        if self._nested is None:
            return absmax.astype(np.float32)
        table, outer = (np.asarray(t.read()).astype(np.float32) for t in self._nested)
        return table[absmax] * outer[np.arange(len(absmax)) // self._nested_size] + self._offset


class Int8Matrix(PackedMatrix):
    def __init__(self, bundle: Bundle):
        self._weight = bundle["weight"]
        if self._weight.dtype != np.int8 or len(self._weight.shape) != 2:
            raise UnsupportedFormatError(
                f"{self._weight.name} is {self._weight.dtype} {self._weight.shape}, not an int8 matrix"
            )
        if "weight_format" in bundle and np.asarray(bundle["weight_format"].read()).any():
            raise UnsupportedFormatError(f"{self._weight.name} is in another order than rows; save the model again")
        self.name, self.shape = bundle.name, self._weight.shape
        self._scb = bundle.expect("SCB", self.shape[:1])
        self.packed = PackedFormat(format="int8", group=None, scale_dtype=np.dtype(np.float32))

    def values(self, rows: Units, columns: Units) -> np.ndarray:
        return np.asarray(self._weight.read((rows, columns)))

    def scales(self, rows: Units, columns: Units) -> dict[str, np.ndarray]:
        return {"scales": (np.asarray(self._scb.read((rows,))).astype(np.float32) / np.float32(127))[:, None]}
