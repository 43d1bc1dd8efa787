#!/usr/bin/env python
"""What quantisation costs and gives: bytes, perplexity, KL divergence to float32, top-1 agreement and speed, per format and method.

    python scripts/bench/quantization.py MODEL --data FILE [--calibration FILE] [--windows 40] [--variants w8a8,w4a16,w4a16:gptq,...]
        [--folder FOLDER] [--speed] [--json]

A variant is a dtype, "stored" (what the checkpoint holds), a short form of quantisation, or FORM:METHOD, a method of `jaxinfer quantize`
with its default settings; auto:METHOD spends the bytes that uniform INT4 (w4a16) takes on symmetric forms. What methods make is kept in
--folder and not made again. Perplexity: as scripts/bench/perplexity.py. --speed: tokens a second of greedy decode at batch 1 after 16
tokens, and of reading 512 tokens, medians of --repetitions in this process; take them on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxinfer
from jaxinfer.loading import open_source
from jaxinfer.measuring import Runner, timed
from jaxinfer.quantization.methods import Method
from jaxinfer.quantizing import Calibration, compare, quantize_checkpoint
from jaxinfer.text import Tokenizer

WINDOW = 1024
DTYPES = ("float32", "bfloat16", "float16")
UNIFORM = "w4a16"
SYMMETRIC = (
    "w4a16-g64",
    "w4a16-g32",
    "w8a16",
    "bfloat16",
    "float32",
)  # a form with minima may be a file's own, and lose nothing
VARIANTS = "bfloat16,w8a16,w8a8,fp8,fp8-a16,w4a16,w4a16-g32-asym,nf4,mxfp4"
CALIBRATED = ",w4a16:rtn,w4a16:awq,w4a16:gptq,w4a16:awq+gptq,w8a8:smoothquant,auto:rtn,auto:gptq"
DECODED, READ, BEFORE = 64, 512, 16


def made(args: argparse.Namespace, variant: str) -> tuple[str | Path, dict[str, Any]]:
    """The source of a variant, and how it is loaded."""
    form, _, method = variant.partition(":")
    if not method:
        load: dict[str, Any] = {} if form == "stored" else {"dtype": form} if form in DTYPES else {"quantization": form}
        return args.model, load
    if args.calibration is None:
        raise SystemExit(f"{variant} needs --calibration")
    folder = args.folder / variant.replace(":", "-")
    if not folder.exists():
        text = Calibration(text=args.calibration.read_text("utf-8"), sequences=args.sequences)
        uniform = jaxinfer.QuantizationConfig.parse(UNIFORM if form == "auto" else form)
        sizes = open_source(args.model).stored_as(dtype=None, quantization=uniform).values()
        budget = sum(tensor.nbytes for tensor in sizes) if form == "auto" else None
        settings: dict[str, Any] = {"quantization": uniform, "method": Method(name=method), "calibration": text}
        quantize_checkpoint(args.model, folder, budget=budget, forms=SYMMETRIC, progress=shown(variant), **settings)
    return folder, {}


def shown(what: str):
    """Progress on one line of stderr."""
    return lambda done, total, name: print(f"\r{what}: {name} {done} of {total}   ", end="", file=sys.stderr, flush=True)


def speeds(model, repetitions: int) -> dict[str, float]:
    """Tokens a second of a module in an engine: decoding at batch 1, and reading a prompt."""
    engine = jaxinfer.init_inference(model, inference_max_tokens=READ + 1, micro_batch_size=1)
    runner = Runner(engine=engine)
    read = timed(lambda: runner.prefill(1, READ), repetitions)
    kept = [runner.state(runner.prefill(1, BEFORE), BEFORE + DECODED * (repetitions + 1))]

    def decode():
        kept[0] = runner.decode(kept[0], DECODED)
        return kept[0]

    return {"decode": DECODED / timed(decode, repetitions).median, "prefill": READ / read.median}


def row(variant: str, args: argparse.Namespace, reference, windows: np.ndarray) -> dict[str, Any]:
    source, load = made(args, variant)
    model = jaxinfer.load_model(source, **load)
    comparison = compare(reference, model, windows, shown(variant))
    print(file=sys.stderr)
    out = {"bytes": sum(a.nbytes for a in jax.tree.leaves(nnx.state(model))), **dataclasses.asdict(comparison)}
    return out | (speeds(model, args.repetitions) if args.speed else {})


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table; the first row is float32."""
    speed = "decode" in next(iter(rows.values()))
    lines = [
        "| weights | MB | perplexity | to float32 | KL | same top-1 |" + (" decode tok/s | prefill tok/s |" if speed else "")
    ]
    lines.append("|---|---|---|---|---|---|" + ("---|---|" if speed else ""))
    for name, r in rows.items():
        change = r["perplexity"] / r["reference_perplexity"] - 1
        cells = [f"`{name}`", f"{r['bytes'] / 1e6:.0f}", f"{r['perplexity']:.4f}", f"{change:+.2%}"]
        cells += [f"{r['kl']:.4f}", f"{r['same_top1']:.1%}"]
        cells += [f"{r['decode']:.0f}", f"{r['prefill']:.0f}"] if speed else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='a folder, a .gguf file, a hub id, or "demo"')
    parser.add_argument(
        "--data", type=Path, required=True, help="the text that is scored, such as the validation part of WikiText-2"
    )
    parser.add_argument("--calibration", type=Path, help="the text that methods see; no part of what is scored")
    parser.add_argument(
        "--sequences", type=int, default=32, help="of 512 tokens, of the calibration text (default: %(default)s)"
    )
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--variants", help=f"default: {VARIANTS}, and with a calibration text {CALIBRATED[1:]}")
    parser.add_argument("--folder", type=Path, help="where what methods make is kept; a temporary folder by default")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_assets(open_source(args.model).assets)
    ids = np.asarray(tokenizer.encode(args.data.read_text("utf-8"), add_special=False), np.int32)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)[: args.windows]
    variants = args.variants or VARIANTS + (CALIBRATED if args.calibration else "")
    reference = jaxinfer.load_model(args.model, dtype="float32")
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        rows = {name: row(name, args, reference, windows) for name in ["float32", *variants.split(",")]}
    print(json.dumps({"windows": len(windows), "rows": rows}) if args.json else table(rows))


if __name__ == "__main__":
    main()
