"""FP8 as DeepSeek stores it: float8 e4m3 values with a float32 scale for each block of 128 x 128.

    weight float8_e4m3fn [O, I]
    weight_scale_inv float32 [ceil(O / rows), ceil(I / columns)]   w = value * scale, its name notwithstanding; [] for all of it

activation_scheme "dynamic": inputs are rounded to FP8 with one scale per token and block of inputs. The scale of a block is kept
for each of its outputs, in groups of its inputs: see qtensor. Layout: DeepSeek-V3's repository, fp8 weights.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import UnsupportedFormatError
from convert.formats.base import PackedMatrix, Settings, bundles, repeated_group, starts
from convert.readers.base import LazyTensor, PackedFormat
from pallas_kernels.qtensor import ActivationQuant
from pallas_kernels.value_formats import FP8
from sharding.partition import Units

METHOD = "fp8"
ENDS = ("weight", "weight_scale_inv")
UNDERSTOOD = {"quant_method", "fmt", "activation_scheme", "weight_block_size", "modules_to_not_convert"}


def read(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """The tensors with one packed matrix for each module. Raises UnsupportedFormatError, MissingTensorError."""
    settings = Settings(config, where)
    settings.only(UNDERSTOOD, {"dequantize": False, "scale_fmt": "float"})
    settings.one_of("fmt", ("e4m3",), "e4m3")
    settings.one_of("activation_scheme", ("dynamic",), "dynamic")
    block = settings.get("weight_block_size")
    activation = ActivationQuant(format="fp8", group=block[1] if block else None)
    found, rest = bundles(tensors, "weight_scale_inv", ENDS)
    out = {b.name: FP8Matrix(b["weight"], b["weight_scale_inv"], block=block, activation=activation) for b in found}
    bare = [name for name, tensor in rest.items() if tensor.dtype == FP8]
    if bare:
        raise UnsupportedFormatError(f"{where}: {bare[0]} and {len(bare) - 1} others are float8 without a weight_scale_inv")
    return rest | out


class FP8Matrix(PackedMatrix):
    """A float8 matrix with one scale for all, for each output, or for each block (block: its outputs and inputs)."""

    def __init__(
        self,
        weight: LazyTensor,
        scales: LazyTensor,
        *,
        block: tuple[int, int] | None = None,
        activation: ActivationQuant | None = None,
        input_scale: LazyTensor | None = None,
    ):
        if weight.dtype != FP8 or len(weight.shape) != 2:
            raise UnsupportedFormatError(f"{weight.name} is {weight.dtype} {weight.shape}, not a matrix of {FP8}")
        self.name, self.shape = weight.name, weight.shape
        self._weight, self._scales, self._inputs = weight, scales, input_scale
        outputs, inputs = self.shape
        self._block = (block[0], block[1]) if block else None
        group = repeated_group(self._block[1], inputs) if self._block else None
        wanted: list[tuple[int, ...]] = [(), (1,), (outputs,), (outputs, 1)]
        if self._block:
            wanted = [(-(-outputs // self._block[0]), -(-inputs // self._block[1]))]
        if group == 0 or scales.shape not in wanted:
            raise UnsupportedFormatError(f"{scales.name} {scales.shape} is no scale of blocks {block} of {weight.shape}")
        self.packed = PackedFormat(format="fp8", group=group, scale_dtype=np.dtype(np.float32), activation=activation)

    def values(self, rows: Units, columns: Units) -> np.ndarray:
        return np.asarray(self._weight.read((rows, columns)))

    def scales(self, rows: Units, columns: Units) -> dict[str, np.ndarray]:
        scales = np.asarray(self._scales.read()).astype(np.float32)
        if self._block:
            by_row = scales[rows.elements // self._block[0]]
            scales = np.ascontiguousarray(by_row[:, starts(columns, self.packed.group or 1) // self._block[1]])
        else:
            scales = scales.reshape(-1, 1)
            scales = scales[rows.elements] if len(scales) > 1 else np.repeat(scales.reshape(1, 1), rows.length, 0)
        return {"scales": scales} if self._inputs is None else {"scales": scales, "input_scale": one_scale(self._inputs)}


def one_scale(stored: LazyTensor) -> np.ndarray:
    """The static scale of a module's inputs, float32 [1, 1]. Raises UnsupportedFormatError for several."""
    if math.prod(stored.shape) != 1:
        raise UnsupportedFormatError(f"{stored.name} {stored.shape}: a static scale is one for all inputs")
    return np.asarray(stored.read()).astype(np.float32).reshape(1, 1)
