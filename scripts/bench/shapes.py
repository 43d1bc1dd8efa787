#!/usr/bin/env python
"""Decoding with the shape of a model that is not at hand: made-up weights, in several precisions, in turn in one process.

Speed does not depend on what the weights are. They are drawn once, written as a checkpoint, and loaded in each precision as any other
one; then the precisions take turns, each round in another order, since a machine's speed changes, and ratios are taken within a round.

    python scripts/bench/shapes.py                                    # GPT-2 of 124M parameters: bfloat16, int8, int4
    python scripts/bench/shapes.py qwen2-0.5b --precisions float32,bfloat16,int8,w4a16-g32 --batch 8 --rounds 5
    python scripts/bench/shapes.py config.json --cache int8           # any family that jaxinfer knows

A precision is a dtype or a short form of quantisation (see jaxinfer.QuantizationConfig.parse). The first one is what others are compared
with.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bandwidth import read_bandwidth

import jaxinfer
from convert.native import save_native
from convert.readers.base import LazyTensor, Shard, TokenizerAssets
from jaxinfer.config import CACHE_DTYPES
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import parameters
from jaxinfer.models.families import find_family
from pallas_kernels.cpu import library

DTYPES = ("float32", "bfloat16", "float16")
PROMPT = 8  # tokens
# config.json, as far as it says the shape
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-124m": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
    },
    "gpt2-355m": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 1024,
        "n_layer": 24,
        "n_head": 16,
        "n_positions": 1024,
    },
    "qwen2-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
}


class Drawn(LazyTensor):
    """A tensor that is made up when it is read, normal with variance 1 / inputs."""

    def __init__(self, name: str, shape: tuple[int, ...], seed: int):
        self.name, self.shape, self.dtype, self._seed = name, shape, np.dtype(np.float32), seed

    def read(self, units: Shard = None) -> np.ndarray:
        assert all(unit is None for unit in self.shard(units)), "it is read whole"
        rng = np.random.default_rng([self._seed, zlib.crc32(self.name.encode())])
        return rng.standard_normal(self.shape, np.float32) / np.float32(math.sqrt(self.shape[-1]))


def config_of(shape: str) -> ModelConfig:
    """Of one of SHAPES, or of a config.json."""
    hf: Mapping[str, Any] = SHAPES[shape] if shape in SHAPES else json.loads(Path(shape).read_text(encoding="utf-8"))
    return find_family(hf).config(hf, {})


def measure(args: argparse.Namespace, config: ModelConfig, folder: Path) -> list[dict[str, Any]]:
    """A row for each precision: bytes of its weights, and tokens a second in each round."""
    checkpoint = folder / "checkpoint"
    tensors = {path: Drawn(path, info.shape, args.seed) for path, info in parameters(config).items()}
    save_native(checkpoint, config=config.to_dict(), tensors=tensors, assets=TokenizerAssets())
    common = {
        "inference_max_tokens": PROMPT + args.tokens,
        "micro_batch_size": args.batch,
        "kernels": args.kernels,
        "kv_cache": {"dtype": args.cache},
        "executables": False,
    }
    engines = {}
    for name in args.precisions:
        form = {"dtype": name} if name in DTYPES else {"dtype": "float32", "quantization": name}
        engines[name] = jaxinfer.init_inference(checkpoint, common | form)
        print(f"loaded {name}", file=sys.stderr, flush=True)
    prompts = [[(row * 101 + i * 37) % config.vocab for i in range(PROMPT)] for row in range(args.batch)]
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(args.rounds + 1):  # the first one compiles
        names = list(engines)[turn % len(engines) :] + list(engines)[: turn % len(engines)]
        for name in names:
            speed = tokens_per_second(engines[name], prompts, args.tokens)
            if turn:
                speeds[name].append(speed)
        print(f"\rround {turn} of {args.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    base = speeds[args.precisions[0]]
    rows = []
    for name, engine in engines.items():
        size = engine.params.step_bytes(args.batch)
        ratios = [a / b for a, b in zip(speeds[name], base, strict=True)]
        median = statistics.median(speeds[name])
        rows.append(
            {
                "precision": name,
                "bytes": size,
                "tokens_per_second": speeds[name],
                "ratios": ratios,
                "gb_per_second": size * median / args.batch / 1e9,
            }
        )
    return rows


def tokens_per_second(engine: jaxinfer.Engine, prompts: list[list[int]], tokens: int) -> float:
    """Of all sequences together, from the first new token to the last."""
    results = engine.generate(prompts, jaxinfer.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
    return len(prompts) * (tokens - 1) / max(result.timings.decode_seconds for result in results)


def text(report: dict[str, Any]) -> str:
    lines = [
        f"{report['shape']}: {report['parameters'] / 1e6:.0f}M parameters, batch {report['batch']}, {report['tokens']} tokens, cache "
        f"{report['cache']}, {report['rounds']} rounds; {report['kernels']}; memory {report['bandwidth_gb_per_second']:.0f} GB/s",
        f"{'precision':<14} {'MB':>6} {'tokens/s':>22} {'times ' + report['precisions'][0]['precision']:>22} {'GB/s':>6}",
    ]
    for row in report["precisions"]:
        speed, ratio = (
            f"{statistics.median(v):{form}} ({min(v):{form}}-{max(v):{form}})"
            for v, form in ((row["tokens_per_second"], ".0f"), (row["ratios"], ".2f"))
        )
        lines.append(f"{row['precision']:<14} {row['bytes'] / 1e6:6.0f} {speed:>22} {ratio:>22} {row['gb_per_second']:6.1f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shape", nargs="?", default="gpt2-124m", help=f"a config.json, or one of {', '.join(SHAPES)} (default gpt2-124m)"
    )
    parser.add_argument("--precisions", default="bfloat16,int8,int4")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="new ones of each sequence (default 128)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", default="bfloat16", choices=CACHE_DTYPES)
    parser.add_argument("--kernels", default="auto", choices=("auto", "native", "xla"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    args.precisions = list(dict.fromkeys(args.precisions.split(",")))
    if args.tokens < 2 or args.rounds < 1 or args.batch < 1:
        parser.error("--tokens is at least 2, --rounds and --batch at least 1")
    if args.shape not in SHAPES and not Path(args.shape).is_file():
        parser.error(f"{args.shape!r} is neither a file nor one of {', '.join(SHAPES)}")
    config = config_of(args.shape)
    if config.learned_positions and args.tokens + PROMPT > config.max_positions:
        parser.error(
            f"--tokens {args.tokens}: the shape has {config.max_positions} positions, of which the prompt takes {PROMPT}"
        )
    with tempfile.TemporaryDirectory(prefix="shapes-") as folder:
        rows = measure(args, config, Path(folder))
    found = library.load()
    native = args.kernels != "xla" and not isinstance(found, str)
    report = {
        "shape": args.shape,
        "parameters": sum(math.prod(info.shape) for info in parameters(config).values()),
        "batch": args.batch,
        "tokens": args.tokens,
        "cache": args.cache,
        "rounds": args.rounds,
        "kernels": f"native kernels on {library.instruction_set()}, {library.threads()} threads" if native else "XLA",
        "bandwidth_gb_per_second": read_bandwidth(library.threads()),
        "precisions": rows,
    }
    print(json.dumps(report) if args.json else text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
