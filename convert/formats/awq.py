"""AWQ, gemm layout: int32 words along the outputs, in an order that its GPU kernel reads without moving nibbles.

    qweight int32 [I, O / 8]   nibble k of word j is output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[k]
    qzeros int32 [G, O / 8]    zero points, in the same order
    scales float [G, O]        w = (q - zero) * scale

Layout: AutoAWQ's WQLinear_GEMM; method: Lin et al. 2023, arXiv:2306.00978.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import UnsupportedFormatError
from convert.formats.base import Bundle, PackedMatrix, Settings, bundles, in_units, repeated_group, starts
from convert.readers.base import LazyTensor, PackedFormat
from pallas_kernels.qtensor import pack_int4
from sharding.partition import Units

METHOD = "awq"
ENDS = ("qweight", "qzeros", "scales")
PER_WORD = 8
NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
UNDERSTOOD = {
    "quant_method",
    "bits",
    "w_bit",
    "group_size",
    "q_group_size",
    "zero_point",
    "version",
    "format",
    "modules_to_not_convert",
}
HARMLESS = {
    "backend",
    "do_fuse",
    "fuse_max_seq_len",
    "modules_to_fuse",
    "exllama_config",
}  # which kernels its authors had in mind


def read(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """The tensors with one packed matrix for each module. Raises UnsupportedFormatError, MissingTensorError."""
    settings = Settings(config, where)
    settings.only(UNDERSTOOD | HARMLESS, {})
    settings.one_of("w_bit" if "w_bit" in config else "bits", (4,), 4)
    version = settings.get("version", settings.get("format", "gemm"))
    if str(version).lower() != "gemm":
        raise settings.error(f"version is {version!r}, supported: 'gemm'")
    settings.one_of("zero_point", (True,), True)
    size = settings.get("group_size", settings.get("q_group_size", 128))
    found, rest = bundles(tensors, "qweight", ENDS)
    return rest | {bundle.name: AWQMatrix(bundle, size) for bundle in found}


class AWQMatrix(PackedMatrix):
    rows, along = PER_WORD, 1

    def __init__(self, bundle: Bundle, size: int):
        self._weight = bundle["qweight"]
        inputs, outputs = self._weight.shape[0], self._weight.shape[1] * PER_WORD
        self.name, self.shape = bundle.name, (outputs, inputs)
        self._size = inputs if size == -1 else size
        group = repeated_group(self._size, inputs)
        if not group or inputs % self._size:
            raise UnsupportedFormatError(f"{self.name}: groups of {size} do not divide its {inputs} inputs")
        groups = inputs // self._size
        self._zeros = bundle.expect("qzeros", (groups, outputs // PER_WORD))
        self._scales = bundle.expect("scales", (groups, outputs))
        self.packed = PackedFormat(
            format="int4", group=group, zeros=True, scale_dtype=self._scales.dtype, zeros_dtype=np.dtype(np.uint8)
        )

    def values(self, rows: Units, columns: Units) -> np.ndarray:
        words = np.asarray(self._weight.read((columns, in_units(rows, PER_WORD))))
        return pack_int4(np.ascontiguousarray(_outputs(words).T), self.packed.group)

    def scales(self, rows: Units, columns: Units) -> dict[str, np.ndarray]:
        groups = starts(columns, self.packed.group or 1) // self._size
        zeros = _outputs(np.asarray(self._zeros.read((None, in_units(rows, PER_WORD)))))
        scales = np.asarray(self._scales.read((None, rows)))
        return {"scales": np.ascontiguousarray(scales[groups].T), "zeros": np.ascontiguousarray(zeros[groups].T)}


def _outputs(words: np.ndarray) -> np.ndarray:
    """int32 [n, O / 8] -> nibbles uint8 [n, O] in the order of the outputs."""
    packed = words.view(np.uint8).reshape(*words.shape, 4)
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(*words.shape, PER_WORD)
    return nibbles[..., NIBBLE_OF_OUTPUT].reshape(words.shape[0], -1)
