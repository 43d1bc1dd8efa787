#!/usr/bin/env python
"""What quantisation costs and gives: bytes, perplexity, KL divergence to float32, top-1 agreement and speed, per format and method.

    python scripts/bench/quantization.py MODEL --data FILE [--calibration FILE] [--windows 40] [--variants w8a8,w4a16,w4a16:gptq,...]
        [--folder FOLDER] [--speed] [--json]

A variant is a dtype, "stored" (what the checkpoint holds), a short form of quantisation, or FORM:METHOD, a method of `jaxinfer quantize`
with its default settings, with +static behind it static scales of inputs; auto:METHOD spends the bytes that uniform INT4 (w4a16) takes on
symmetric forms. Of a GGUF file also what other systems make of the same weights, where their environments are there (peers_env.sh,
../quantizers_env.sh): llama.cpp:Q8_0 and further types of its own quantize, torchao:int8 (weights), torchao:int8-inputs, quanto:int8 and
quanto:int4. What methods make is kept in --folder and not made again. Perplexity: as scripts/bench/perplexity.py; all variants score a
window before the next one is taken, so that they are in memory together. --speed: tokens a second of greedy decode at batch 1 after 16
tokens, and of reading 512 tokens, medians of --repetitions in this process; take them on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxinfer
from jaxinfer.loading import open_source, resolve
from jaxinfer.measuring import Runner, timed
from jaxinfer.quantization.methods import Method
from jaxinfer.quantizing import Calibration, compared, comparison, logits_of, quantize_checkpoint
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
VARIANTS = "bfloat16,w8a16,w8a16-g64,w8a8,fp8,fp8-a16,w4a16,w4a16-g32-asym,nf4,mxfp4"
CALIBRATED = (
    ",w4a16:rtn,w4a16:awq,w4a16:gptq,w4a16:awq+gptq,w8a8:smoothquant,w8a8:smoothquant+static,fp8:gptq,fp8:gptq+static,"
    "auto:rtn,auto:gptq"
)
PEERS = {
    "llama.cpp": ("Q8_0", "Q4_0", "Q4_K_M"),
    "torchao": ("int8", "int8-inputs"),
    "quanto": ("int8", "int4"),
}
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
        how = Method(name=method.removesuffix("+static"), static_inputs=method.endswith("+static"))
        settings: dict[str, Any] = {"quantization": uniform, "method": how, "calibration": text}
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


class Ours:
    """A variant in this process."""

    def __init__(self, variant: str, args: argparse.Namespace):
        source, load = made(args, variant)
        model = jaxinfer.load_model(source, **load)
        self.facts: dict[str, Any] = {"bytes": sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))}
        if args.speed:
            self.facts |= speeds(model, args.repetitions)
        self._run = logits_of(model)

    def logits(self, number: int, window: np.ndarray) -> jax.Array:
        return self._run(jnp.asarray(window[None]))


class Peer:
    """A variant in a process of another system. Raises RuntimeError where that says nothing."""

    def __init__(self, variant: str, args: argparse.Namespace):
        system, _, precision = variant.partition(":")
        python, worker, model = args.pythons[system], Path(__file__).with_name("peer_logits.py"), Path(args.gguf)
        if system == "llama.cpp":
            model = args.folder / f"{precision}.gguf"
            if not model.exists():
                maker = Path(__file__).with_name("peer_llama_cpp.py")
                subprocess.run([python, maker, args.gguf, "--precision", precision, "--quantize", model], check=True)
        self._out = args.folder / f"{variant.replace(':', '-')}.npy"
        command = [python, worker, system, model, precision, args.folder / "windows.npy", self._out]
        self._process = subprocess.Popen(
            [str(part) for part in command] + ["--speed"] * args.speed, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = json.loads(self._answer("ready"))

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise RuntimeError(f"{self._process.args} ended with status {self._process.wait()}")

    def logits(self, number: int, window: np.ndarray) -> jax.Array:
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        self._answer("done")
        return jnp.asarray(np.load(self._out))


def compare(args: argparse.Namespace, variants: list[str], windows: np.ndarray) -> dict[str, dict[str, Any]]:
    """A row of every variant, float32 among them."""
    args.folder.mkdir(parents=True, exist_ok=True)
    np.save(args.folder / "windows.npy", windows)
    models: dict[str, Ours | Peer] = {}
    for name in ["float32", *variants]:
        models[name] = Peer(name, args) if name.partition(":")[0] in PEERS else Ours(name, args)
        print(file=sys.stderr)
    sums = {name: np.zeros(4) for name in models}
    for n, window in enumerate(windows):
        reference = models["float32"].logits(n, window)
        for name, model in models.items():
            shown(name)(n, len(windows), "windows")
            logits = reference if name == "float32" else model.logits(n, window)
            sums[name] += np.asarray(compared(reference, logits, jnp.asarray(window[1:])), np.float64)
    print(file=sys.stderr)
    tokens = windows.size - len(windows)
    return {name: model.facts | dataclasses.asdict(comparison(sums[name], tokens)) for name, model in models.items()}


def peers(args: argparse.Namespace) -> dict[str, str]:
    """The Pythons of the systems that are there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxinfer"
    found = {"llama.cpp": cache / "peers" / "llama-cpp-python" / "bin" / "python"}
    found |= dict.fromkeys(("torchao", "quanto"), args.quantizers or cache / "quantizers" / "bin" / "python")
    return {name: str(python) for name, python in found.items() if python.exists()}


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
    parser.add_argument("--quantizers", type=Path, help="the Python that scripts/quantizers_env.sh prints, if not in its place")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_assets(open_source(args.model).assets)
    ids = np.asarray(tokenizer.encode(args.data.read_text("utf-8"), add_special=False), np.int32)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)[: args.windows]
    variants = (args.variants or VARIANTS + (CALIBRATED if args.calibration else "")).split(",")
    args.pythons, args.gguf = peers(args), resolve(args.model)
    if args.variants is None and args.gguf.suffix == ".gguf":
        variants += [f"{system}:{form}" for system, forms in PEERS.items() if system in args.pythons for form in forms]
    if missing := {v for v in variants if (system := v.partition(":")[0]) in PEERS and system not in args.pythons}:
        parser.error(f"{', '.join(sorted(missing))}: make their environments first, see --help")
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        rows = compare(args, variants, windows)
    print(json.dumps({"windows": len(windows), "rows": rows}) if args.json else table(rows))


if __name__ == "__main__":
    main()
