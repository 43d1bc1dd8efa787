"""Packed formats of Hugging Face folders: a quantization_config and raw tensors become packed matrices under canonical names.

Each module of this package is one format: METHOD, the quant_method it reads, and read(config, tensors, where).
"""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import UnsupportedFormatError
from convert.readers.base import LazyTensor

METHODS = {
    "gptq": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed_tensors",
    "fp8": "block_fp8",
    "bitsandbytes": "bitsandbytes",
}
KEYS = ("quantization_config", "compression_config")  # the second one is what older files call it
# Models without biases, for which some writers of GPTQ files store zeros.
WITHOUT_BIAS = frozenset({"llama", "mistral", "mixtral", "gemma", "gemma2", "phi3", "qwen3"})


def unpacked(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], where: str
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """A config.json and tensors as those of an unquantised model, whose quantised matrices are packed LazyTensors.

    What has no quantization_config is passed on. Raises UnsupportedFormatError for a method or option that is not read, naming it.
    """
    quantization = next((config[key] for key in KEYS if config.get(key)), None)
    rest = {key: value for key, value in config.items() if key not in KEYS}
    if quantization is None:
        return rest, dict(tensors)
    where = f"{where}: quantization_config"
    if not isinstance(quantization, Mapping):
        raise UnsupportedFormatError(f"{where} is {quantization!r}, not an object")
    method = quantization.get("quant_method")
    if method is None and any(quantization.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"  # files of 2023 do not name it
    if method not in METHODS:
        raise UnsupportedFormatError(f"{where} has quant_method {method!r}; supported are {', '.join(METHODS)}")
    read = importlib.import_module(f"convert.formats.{METHODS[method]}").read
    out = read(quantization, tensors, where)
    packed = {name.removesuffix(".weight") for name, tensor in out.items() if tensor.packed}
    if config.get("model_type") in WITHOUT_BIAS and not (config.get("attention_bias") or config.get("mlp_bias")):
        out = {name: tensor for name, tensor in out.items() if not _empty_bias(name, tensor, packed)}
    return rest, out


def _empty_bias(name: str, tensor: LazyTensor, packed: set[str]) -> bool:
    module, _, end = name.rpartition(".")
    return end == "bias" and module in packed and not np.asarray(tensor.read()).any()
