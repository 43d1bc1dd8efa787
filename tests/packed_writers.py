"""Random matrices in the packed formats of Hugging Face folders, written bit by bit, with the floats that they stand for.

Each writer takes (rng, outputs, inputs) and gives the tensors of one module by the ends of their names, and the weight as float32.
It follows the format's description and shares nothing with the reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

type Written = tuple[dict[str, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Format:
    """config: the quantization_config. write: of one module."""

    config: dict[str, Any]
    write: Callable[[np.random.Generator, int, int], Written]
    exact: bool = True  # inputs of matmuls stay floats
    options: dict[str, Any] = field(default_factory=dict)


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """int [n, 32 / bits] -> int32 [n], the first value in the lowest bits; one bit field after another."""
    out = []
    for row in values.tolist():
        word = 0
        for k, value in enumerate(row):
            word |= (value & (1 << bits) - 1) << bits * k
        out.append(word)
    return np.array(out, np.uint32).view(np.int32)


def along_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack the first axis: [n, m] -> int32 [n bits / 32, m]."""
    per = 32 // bits
    return np.stack([words(values[:, c].reshape(-1, per), bits) for c in range(values.shape[1])], 1)


def along_columns(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack the last axis: [n, m] -> int32 [n, ceil(m bits / 32)], zeros at the end."""
    per = 32 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per)))
    return np.stack([words(row.reshape(-1, per), bits) for row in padded])


def scales_of(rng, *shape, dtype=np.float16) -> np.ndarray:
    return rng.uniform(0.005, 0.03, shape).astype(dtype)


def gptq(*, bits=4, size=8, symmetric=False, shuffled=False, version=1) -> Callable[..., Written]:
    def write(rng, outputs, inputs):
        group = inputs if size == -1 else size
        top = 1 << bits
        q = rng.integers(0, top, (outputs, inputs))
        groups = np.arange(inputs) // group
        if shuffled:
            groups = groups[rng.permutation(inputs)]
        scales = scales_of(rng, inputs // group, outputs) * np.float16(16 / top)
        zeros = np.full(scales.shape, top // 2) if symmetric else rng.integers(0, top, scales.shape)
        w = (q - zeros[groups].T).astype(np.float32) * scales[groups].T.astype(np.float32)
        tensors = {
            "qweight": along_rows(q.T, bits),
            "qzeros": along_columns(zeros - 1 if version == 1 else zeros, bits),
            "scales": scales,
            "g_idx": groups.astype(np.int32),
        }
        return tensors, w

    return write


def awq(*, size=8) -> Callable[..., Written]:
    def write(rng, outputs, inputs):
        group = inputs if size == -1 else size
        q = rng.integers(0, 16, (inputs, outputs))
        zeros = rng.integers(0, 16, (inputs // group, outputs))
        scales = scales_of(rng, inputs // group, outputs)
        at = np.arange(inputs) // group
        w = ((q - zeros[at]).astype(np.float32) * scales[at].astype(np.float32)).T

        def interleaved(values):
            by_word = values.reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
            return along_columns(by_word.reshape(len(values), -1), 4)

        return {"qweight": interleaved(q), "qzeros": interleaved(zeros), "scales": scales}, w

    return write


def pack_quantized(*, bits=4, size=8, symmetric=True) -> Callable[..., Written]:
    def write(rng, outputs, inputs):
        group = size or inputs
        half = 1 << bits - 1
        q = rng.integers(-half, half, (outputs, inputs))
        scales = scales_of(rng, outputs, inputs // group, dtype=ml_dtypes.bfloat16)
        scales = (scales.astype(np.float32) * 8 / half).astype(ml_dtypes.bfloat16)
        zeros = np.zeros(scales.shape, int) if symmetric else rng.integers(-half, half, scales.shape)
        at = np.arange(inputs) // group
        w = (q - zeros[:, at]).astype(np.float32) * scales[:, at].astype(np.float32)
        tensors = {
            "weight_packed": along_columns(q + half, bits),
            "weight_scale": scales,
            "weight_shape": np.array([outputs, inputs]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = np.ascontiguousarray(along_columns((zeros + half).T, bits).T)
        return tensors, w

    return write


def int_quantized(*, symmetric=True) -> Callable[..., Written]:
    def write(rng, outputs, inputs):
        q = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
        scales = scales_of(rng, outputs, 1, dtype=np.float32) / 16
        if symmetric:
            return {"weight": q, "weight_scale": scales}, q.astype(np.float32) * scales
        zeros = rng.integers(-20, 20, (outputs, 1)).astype(np.int8)
        w = (q.astype(np.float32) - zeros.astype(np.float32)) * scales
        return {"weight": q, "weight_scale": scales, "weight_zero_point": zeros}, w

    return write


def float8(rng, *shape) -> np.ndarray:
    """Random bytes that are no NaN, of moderate size."""
    bits = rng.integers(0, 2, shape) << 7 | rng.integers(0, 15 << 3, shape)
    return bits.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)


def fp8_value(bits: np.ndarray) -> np.ndarray:
    """e4m3 by its definition: sign, 4 bits of exponent with a bias of 7, 3 of mantissa; no infinity."""
    sign, exponent, mantissa = bits >> 7, (bits >> 3 & 15).astype(int), (bits & 7).astype(int)
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return (np.where(sign == 1, -1, 1) * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)).astype(np.float32)


def fp8(*, scale: str, rows=32, columns=32) -> Callable[..., Written]:
    def write(rng, outputs, inputs):
        q = float8(rng, outputs, inputs)
        w = fp8_value(q.view(np.uint8))
        if scale == "block":
            scales = scales_of(rng, -(-outputs // rows), -(-inputs // columns), dtype=np.float32) / 50
            whole = np.repeat(np.repeat(scales, rows, 0)[:outputs], columns, 1)[:, :inputs]
            return {"weight": q, "weight_scale_inv": scales}, w * whole
        shape = {"channel": (outputs, 1), "tensor": (1,)}[scale]
        scales = (scales_of(rng, *shape, dtype=np.float32) / 50).astype(ml_dtypes.bfloat16)
        return {"weight": q, "weight_scale": scales}, w * scales.astype(np.float32)

    return write


def static_inputs(write: Callable[..., Written], top: float) -> Callable[..., Written]:
    """The same with a scale of inputs up to 8."""

    def with_scale(rng, outputs, inputs):
        tensors, w = write(rng, outputs, inputs)
        return tensors | {"input_scale": np.array([8 / top], np.float32)}, w

    return with_scale


E2M1 = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 3.0, 6: 4.0, 7: 6.0}


def mxfp4(rng, outputs, inputs) -> Written:
    q = rng.integers(0, 16, (outputs, inputs))
    exponents = rng.integers(117, 123, (outputs, inputs // 32)).astype(np.uint8)
    value = np.vectorize(lambda n: -E2M1[n & 7] if n & 8 else E2M1[n])(q).astype(np.float32)
    w = value * np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, 1)
    return {"weight_packed": (q[:, ::2] | q[:, 1::2] << 4).astype(np.uint8), "weight_scale": exponents}, w.astype(np.float32)


# the table of QLoRA's appendix E
NORMAL_FLOAT = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4(*, nested: bool, size=64) -> Callable[..., Written]:
    def write(rng, outputs, inputs):
        q = rng.integers(0, 16, outputs * inputs)
        table, blocks = np.array(NORMAL_FLOAT, np.float32), -(-q.size // size)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": [outputs, inputs]}
        tensors = {"weight": (q[::2] << 4 | q[1::2]).astype(np.uint8)[:, None], "weight.quant_map": table}
        if nested:
            levels, outer = rng.integers(0, 256, blocks).astype(np.uint8), rng.uniform(0.1, 0.2, -(-blocks // 256))
            codes = np.linspace(-1, 1, 256, dtype=np.float32)
            outer, offset = outer.astype(np.float32), 0.21
            absmax = codes[levels] * np.repeat(outer, 256)[:blocks] + np.float32(offset)
            state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
            tensors |= {"weight.absmax": levels, "weight.nested_absmax": outer, "weight.nested_quant_map": codes}
        else:
            absmax = rng.uniform(0.1, 0.3, blocks).astype(np.float32)
            tensors["weight.absmax"] = absmax
        described = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors["weight.quant_state.bitsandbytes__nf4"] = described
        return tensors, (table[q] * np.repeat(absmax, size)[: q.size]).reshape(outputs, inputs)

    return write


def llm_int8(rng, outputs, inputs) -> Written:
    q = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    largest = rng.uniform(0.1, 0.4, outputs).astype(np.float32)
    w = q.astype(np.float32) * (largest / np.float32(127))[:, None]
    return {"weight": q, "SCB": largest, "weight_format": np.zeros((), np.uint8)}, w


def compressed(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8, "dynamic": False}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False, "observer": "minmax"}
_TOKENS = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True, "observer": None}
_STATIC = {"num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False, "observer": "minmax"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "damp_percent": 0.01, "desc_act": False, "sym": False}
_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}

FORMATS = {
    "gptq": Format(_GPTQ, gptq()),
    "gptq_v2": Format(_GPTQ | {"checkpoint_format": "gptq_v2", "format": "gptq_v2", "method": "gptq"}, gptq(version=2)),
    "gptq_symmetric": Format(_GPTQ | {"sym": True}, gptq(symmetric=True)),
    "gptq_act_order": Format(_GPTQ | {"desc_act": True}, gptq(shuffled=True)),
    "gptq_act_order_symmetric": Format(_GPTQ | {"desc_act": True, "sym": True}, gptq(shuffled=True, symmetric=True)),
    "gptq_channels": Format(_GPTQ | {"group_size": -1}, gptq(size=-1)),
    "gptq_8_bits": Format(_GPTQ | {"bits": 8}, gptq(bits=8)),
    "gptq_8_bits_symmetric": Format(_GPTQ | {"bits": 8, "sym": True}, gptq(bits=8, symmetric=True)),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}, awq()),
    "awq_channels": Format({"quant_method": "awq", "bits": 4, "group_size": -1, "version": "GEMM"}, awq(size=-1)),
    "int4": Format(compressed("pack-quantized", _INT4), pack_quantized()),
    "int4_zeros": Format(compressed("pack-quantized", _INT4 | {"symmetric": False}), pack_quantized(symmetric=False)),
    "int4_channels": Format(
        compressed("pack-quantized", _INT4 | {"strategy": "channel", "group_size": None}), pack_quantized(size=0)
    ),
    "int8_packed": Format(compressed("pack-quantized", _INT8), pack_quantized(bits=8, size=0)),
    "int8_packed_zeros": Format(
        compressed("pack-quantized", _INT8 | {"symmetric": False}), pack_quantized(bits=8, size=0, symmetric=False)
    ),
    "int8": Format(compressed("int-quantized", _INT8), int_quantized()),
    "int8_zeros": Format(compressed("int-quantized", _INT8 | {"symmetric": False}), int_quantized(symmetric=False)),
    "int8_inputs": Format(compressed("int-quantized", _INT8, _TOKENS | {"type": "int"}), int_quantized(), exact=False),
    "fp8": Format(compressed("float-quantized", _FP8), fp8(scale="channel")),
    "fp8_tensor": Format(compressed("naive-quantized", _FP8 | {"strategy": "tensor"}), fp8(scale="tensor")),
    "fp8_inputs": Format(compressed("float-quantized", _FP8, _TOKENS | {"type": "float"}), fp8(scale="channel"), exact=False),
    "int8_static_inputs": Format(
        compressed("int-quantized", _INT8, _STATIC | {"type": "int"}), static_inputs(int_quantized(), 127), exact=False
    ),
    "fp8_static_inputs": Format(
        compressed("float-quantized", _FP8, _STATIC | {"type": "float"}), static_inputs(fp8(scale="channel"), 448), exact=False
    ),
    "fp8_blocks": Format(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
        fp8(scale="block"),
        exact=False,
    ),
    "nf4": Format(_NF4 | {"bnb_4bit_use_double_quant": False}, nf4(nested=False)),
    "nf4_nested": Format(_NF4 | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}, nf4(nested=True)),
    "llm_int8": Format({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}, llm_int8),
    "mxfp4": Format(
        compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}), mxfp4
    ),
}


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """A folder in a format: every projection packed, the rest of `tensors` as it is. Returns the floats of all by plain name."""
    form, rng, stored, truth = FORMATS[name], np.random.default_rng(len(name)), {}, {}
    for full, array in sorted(tensors.items()):
        if re.search(r"(_proj|\.w[123])\.weight$", full):
            parts, truth[full] = form.write(rng, *array.shape)
            stored |= {f"{full.removesuffix('.weight')}.{end}": part for end, part in parts.items()}
        else:
            stored[full] = truth[full] = array
    folder.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": form.config}))
    return truth
