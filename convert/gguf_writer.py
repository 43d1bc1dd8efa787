"""GGUF files of Llama's kind: names and keys of `convert.names.gguf` read backwards, packed matrices as Q4_0, Q4_1 and Q8_0."""

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from convert.errors import UnsupportedFormatError
from convert.load import Progress
from convert.names import gguf as names
from convert.readers.base import BFLOAT16, FLOAT16, LazyTensor, PackedFormat
from convert.rules import PermuteRows, StackedTensor, transformed
from pallas_kernels.qtensor import QTensor, regroup

BLOCK = 32
# model_type -> key of names.ARCHITECTURES
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
GENERAL = {"mixtral": "llama"}  # general.architecture, where it is another
_EXPERT = re.compile(r"(?P<block>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.weight")
PLAIN = {np.dtype(np.float32): Type.F32, FLOAT16: Type.F16, BFLOAT16: Type.BF16}
TOKENIZER = "tokenizer."
ROUTER = ".ffn_gate_inp."  # which llama.cpp keeps in float32
FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.Q4_0: 2, Type.Q4_1: 3, Type.Q8_0: 7, Type.BF16: 32}  # general.file_type


def write_gguf(
    path: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write a GGUF file; tensors are read and written one by one.

    config: keys of config.json. tensors: by canonical name. metadata: of the GGUF file whose tokenizer is taken over; without one the
    file has no tokenizer. Raises UnsupportedFormatError for an architecture, rope scaling or form that is not written.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UnsupportedFormatError(
            f"model_type {model_type!r} is not written as GGUF; written are {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[model_type]
    writer = GGUFWriter(path, GENERAL.get(architecture, architecture))
    for key, value in _keys(config, architecture).items():
        _add(writer, key, value)
    for key, value in metadata.items():
        if key.startswith(TOKENIZER):
            _add(writer, key, value)
    whole = _experts_together(tensors)
    ordered = {_gguf_name(name, architecture): _stored_order(tensor, config, architecture) for name, tensor in whole.items()}
    kinds = {name: Type.F32 if ROUTER in name else _type(tensor) for name, tensor in ordered.items()}
    scaling = config.get("rope_scaling") or {}
    factors = np.asarray(scaling["factors"], np.float32) if scaling.get("rope_type") == "factors" else None
    writer.add_quantization_version(2)
    matrices = [kinds[name] for name, tensor in ordered.items() if tensor.packed] or [kinds[next(iter(kinds))]]
    writer.add_file_type(FILE_TYPES[max(set(matrices), key=matrices.count)])
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes, Type.F32)
    for name, tensor in ordered.items():
        block, size = GGML_QUANT_SIZES[kinds[name]]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)  # in bytes
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), kinds[name])
    total, done = sum(tensor.nbytes for tensor in ordered.values()), 0
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name, tensor in ordered.items():
            value = tensor.read()
            writer.write_tensor_data(_blocks(value) if isinstance(value, QTensor) else _plain(value, kinds[name]))
            done += tensor.nbytes
            if progress:
                progress(done, total, name)


def _experts_together(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The same with one tensor for a matrix of all experts of a layer. Raises UnsupportedFormatError where one is missing."""
    out: dict[str, LazyTensor] = {}
    stacks: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if found := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{found['block']}.{found['part']}.weight", {})[int(found["number"])] = tensor
        else:
            out[name] = tensor
    for name, parts in stacks.items():
        if sorted(parts) != list(range(len(parts))):
            raise UnsupportedFormatError(f"{name}: there are experts {sorted(parts)}, and those between them are missing")
        out[name] = StackedTensor(name, [parts[n] for n in range(len(parts))])
    return out


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)


def _keys(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Metadata of the architecture. Raises UnsupportedFormatError for a setting that has no key."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    values = {**config, "rope_theta": float(theta)}
    values.setdefault("num_key_value_heads", heads)
    values["vocab_size"] = config["vocab_size"]
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise UnsupportedFormatError(
            f"sliding_window {config['sliding_window']} is not written: {architecture} files have none"
        )
    values.pop("sliding_window", None)
    if architecture == "qwen3moe" and (
        not config.get("norm_topk_prob") or config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    ):
        raise UnsupportedFormatError(
            "llama.cpp gives every layer of a qwen3_moe experts whose weights add up to one; this model has norm_topk_prob false, "
            "mlp_only_layers or a decoder_sparse_step"
        )
    known = {**names.CONFIG, **names.ARCHITECTURES[architecture].keys}
    architecture = GENERAL.get(architecture, architecture)
    keys = {f"{architecture}.{key}": values[name] for key, name in known.items() if values.get(name) is not None}
    size = config.get("head_dim") or hidden // heads
    keys |= {f"{architecture}.{key}": size for key in names.HEAD}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        keys |= {f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": float(rope["factor"])}
    elif kind not in ("default", "factors"):
        raise UnsupportedFormatError(f"rope scaling {kind!r} is not written as GGUF; written are default, linear and factors")
    return keys


def _gguf_name(name: str, architecture: str) -> str:
    """The GGUF name of a canonical name. Raises UnsupportedFormatError for one that has none."""
    module, _, end = name.rpartition(".")
    parts = module.split(".")
    if module.startswith("model.layers."):
        block = {canonical: own for own, canonical in {**names.BLOCK, **names.ARCHITECTURES[architecture].block}.items()}
        own = block.get(".".join(parts[3:]))
        out = f"blk.{parts[2]}.{own}.{end}"
    else:
        own = {canonical: own for own, canonical in names.TOP.items()}.get(module)
        out = f"{own}.{end}"
    if own is None or names.canonical_name(out, architecture) != name:
        raise UnsupportedFormatError(f"{name} has no name in GGUF files")
    return out


def _stored_order(tensor: LazyTensor, config: Mapping[str, Any], architecture: str) -> LazyTensor:
    """Rows of q and k with the two of a rotary pair side by side, where the architecture stores them so."""
    heads = names.rotary_heads(tensor.name, config) if architecture in names.INTERLEAVED else None
    if heads is None:
        return tensor
    return transformed(tensor, (PermuteRows(lambda rows: np.argsort(names.half_split_order(rows, heads))),))


def _type(tensor: LazyTensor) -> Type:
    if tensor.packed is not None:
        return _packed_type(tensor.name, tensor.packed)
    if len(tensor.shape) == 1:
        return Type.F32
    if tensor.dtype not in PLAIN:
        raise UnsupportedFormatError(f"{tensor.name} is {tensor.dtype}; GGUF files hold {', '.join(map(str, PLAIN))}")
    return PLAIN[tensor.dtype]


def _packed_type(name: str, p: PackedFormat) -> Type:
    half = p.scale_dtype == FLOAT16 and p.zeros_dtype in (None, FLOAT16)
    if p.format not in ("int4", "int8") or not p.group or p.group % BLOCK or not half or p.activation:
        raise UnsupportedFormatError(
            f"{name} is {p.format} with groups of {p.group or 'a row'}, scales {p.scale_dtype} and zeros {p.zeros_dtype}; GGUF's "
            f"Q4_0, Q4_1 and Q8_0 have groups of {BLOCK} (or multiples), float16 scales and minima, and float inputs"
        )
    return Type.Q8_0 if p.format == "int8" else Type.Q4_1 if p.zeros else Type.Q4_0


def _blocks(q: QTensor) -> np.ndarray:
    """uint8 [O, bytes of a row]: each block its scale, its minimum if any, its values."""
    q = regroup(q, BLOCK)
    values = np.asarray(q.values).view(np.uint8).reshape(*q.scales.shape, -1)
    heads = [np.asarray(a)[..., None].view(np.uint8) for a in (q.scales, q.zeros) if a is not None]
    return np.concatenate([*heads, values], -1).reshape(*q.shape[:-1], -1)


def _plain(value: np.ndarray, kind: Type) -> np.ndarray:
    return value.astype(np.float32) if kind == Type.F32 else value
