"""Writes packed matrices that the formats' own packages made, with what these packages make of them again.

Runs in the oracle environment (scripts/oracle_env.sh: torch, no jax) with `compressed-tensors`, `bitsandbytes` and `loguru` added to it
(pip install --no-deps). Each case is a quantization_config, the bytes of a safetensors file, and the floats of the package.

    python scripts/make_golden_formats.py                                    tests/data/packed_formats.npz
    python scripts/make_golden_formats.py --seed 7 --out FILE.npz            other matrices
    python scripts/make_golden_formats.py --autoawq awq/utils/packing_utils.py      that file of autoawq's sources: AWQ as well
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save

OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "packed_formats.npz"
Case = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]  # quantization_config, tensors of a module, floats

PACK, NAIVE, MXFP4 = PackedQuantizationCompressor, NaiveQuantizationCompressor, MXFP4PackedCompressor
GROUPS = {"strategy": "group", "group_size": 32}
COMPRESSED = {
    "int4": (PACK, "pack-quantized", {"num_bits": 4, **GROUPS}),
    "int4_zeros": (PACK, "pack-quantized", {"num_bits": 4, "symmetric": False, **GROUPS}),
    "int4_channels": (PACK, "pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "int8_packed": (PACK, "pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8": (NAIVE, "int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8_zeros": (NAIVE, "int-quantized", {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
    "fp8": (NAIVE, "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8_blocks": (NAIVE, "float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 32]}),
    "mxfp4": (MXFP4, "mxfp4-pack-quantized", {"num_bits": 4, "type": "float", **GROUPS}),
}


def compressed(weight: torch.Tensor, compressor: Any, form: str, options: dict[str, Any]) -> Case:
    args = QuantizationArgs(**options)
    rows, columns = weight.shape
    if args.strategy == "block":
        block = args.block_structure
        parts = weight.reshape(rows // block[0], block[0], columns // block[1], block[1]).transpose(1, 2).flatten(2)
    else:
        parts = weight.reshape(rows, columns // (args.group_size or columns), -1)
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    if compressor is MXFP4:
        scale = 2.0 ** (torch.floor(torch.log2(parts.abs().amax(-1))) - 2)
    state = {"weight": weight.clone(), "weight_scale": scale}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packed = compressor.compress(state, scheme)
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme.model_dump()}}
    return json.loads(json.dumps(settings, default=str)), packed, compressor.decompress(packed, scheme)["weight"]


def nf4(weight: torch.Tensor, nested: bool) -> Case:
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    tensors = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return settings, tensors, bnb.dequantize_4bit(packed, state)


def llm_int8(weight: torch.Tensor) -> Case:
    values, largest, _ = bnb.int8_vectorwise_quant(weight.half())
    tensors = {"weight": values, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, bnb.int8_vectorwise_dequant(values, largest)


def awq(rng: np.random.Generator, path: Path) -> Case:
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = lambda *shape: torch.tensor(rng.integers(-(2**31), 2**31, shape).astype(np.int32))
    tensors = {"qweight": words(128, 2), "qzeros": words(4, 2)}
    tensors["scales"] = torch.tensor(rng.uniform(0.01, 0.02, (4, 16)).astype(np.float16))
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    floats = module.dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), 4, 32)
    return settings, tensors, floats.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--autoawq", type=Path, metavar="FILE", help="awq/utils/packing_utils.py of autoawq's sources")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    weight = torch.tensor((rng.standard_normal((16, 128)) * 0.1).astype(np.float32))
    cases = {name: compressed(weight, *how) for name, how in COMPRESSED.items()}
    cases |= {"nf4": nf4(weight, nested=False), "nf4_nested": nf4(weight, nested=True), "llm_int8": llm_int8(weight)}
    if args.autoawq:
        cases["awq"] = awq(rng, args.autoawq)
    out: dict[str, np.ndarray] = {}
    for name, (settings, tensors, floats) in cases.items():
        file = save({f"module.{end}": tensor.contiguous() for end, tensor in tensors.items()})
        out[f"{name}/config"] = np.array(json.dumps(settings))
        out[f"{name}/file"] = np.frombuffer(file, np.uint8)
        out[f"{name}/floats"] = floats.detach().float().numpy()
    np.savez_compressed(args.out, **out)
    print(f"{args.out}: {len(cases)} cases, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
