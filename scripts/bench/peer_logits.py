"""Worker: what another system makes of windows of tokens at one of its precisions, for scripts/bench/quantization.py.

    python scripts/bench/peer_logits.py SYSTEM MODEL PRECISION WINDOWS.npy OUT.npy

SYSTEM: llama.cpp, whose MODEL is a GGUF file at that precision; torchao or quanto, which read any GGUF file as floats. Says
"ready" with bytes and, with --speed, tokens a second as JSON; then for each line "N" of its input writes the logits of window N, float32
[T - 1, V], to OUT.npy, and says "done".
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

DECODED, READ, BEFORE, REPETITIONS = 64, 512, 16, 3


class LlamaCpp:
    def __init__(self, args: argparse.Namespace):
        import ctypes

        import llama_cpp as llama
        from peer_llama_cpp import LlamaCpp as Runner
        from peer_llama_cpp import silent

        llama.llama_log_set(silent, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self.llama, self.nbytes = llama, args.model.stat().st_size
        self.runner = Runner(args.model, args.threads, "f32")

    def logits(self, window: np.ndarray) -> np.ndarray:
        from peer_llama_cpp import _fill

        context = self.runner._sized(len(window), 1)
        batch = self.llama.llama_batch_init(len(window), 0, 1)
        _fill(batch, [(int(token), at, 0, True) for at, token in enumerate(window)])
        if status := self.llama.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        out = np.ctypeslib.as_array(self.llama.llama_get_logits(context), (len(window), self.runner._vocab))[:-1].copy()
        self.llama.llama_batch_free(batch)
        return out

    def read(self, tokens: list[int]) -> float:
        return self.runner.generate([tokens], 1).first_seconds

    def decode(self, tokens: list[int]) -> float:
        out = self.runner.generate([tokens], DECODED + 1)
        return out.seconds - out.first_seconds


class Torch:
    def __init__(self, args: argparse.Namespace):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(args.threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            args.model.parent, gguf_file=args.model.name, dtype=torch.float32
        ).eval()
        if args.system == "torchao":
            from torchao import quantization as ao

            forms = {
                "int8": ao.Int8WeightOnlyConfig,
                "int8-inputs": ao.Int8DynamicActivationInt8WeightConfig,
            }
            ao.quantize_(self.model, forms[args.precision](), filter_fn=_linear)
            size = lambda t: t.untyped_storage().nbytes()
            self.nbytes = sum(_packed_bytes(p, size) for p in self.model.parameters())
        else:
            from optimum.quanto import freeze, qint4, qint8, quantize

            quantize(self.model, weights={"int8": qint8, "int4": qint4}[args.precision], exclude="lm_head")
            freeze(self.model)
            self.nbytes = sum(_packed_bytes(p, lambda t: t.untyped_storage().nbytes()) for p in self.model.parameters())

    def logits(self, window: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self.model(self.torch.tensor(window[None].astype(np.int64))).logits[0, :-1].float().numpy()

    def read(self, tokens: list[int]) -> float:
        start = time.perf_counter()
        with self.torch.no_grad():
            self.model(self.torch.tensor([tokens]), logits_to_keep=1)
        return time.perf_counter() - start

    def decode(self, tokens: list[int]) -> float:
        ids, cache, start = self.torch.tensor([tokens]), None, 0.0
        with self.torch.no_grad():
            for n in range(DECODED + 1):
                out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                start = time.perf_counter() if n == 0 else start
        return time.perf_counter() - start


def _linear(module, name: str) -> bool:
    """Matrices of layers; the head is the embedding."""
    return type(module).__name__ == "Linear" and "lm_head" not in name


def _packed_bytes(parameter, size: Callable) -> int:
    """Of the arrays that a quantised parameter is made of."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return size(parameter)
    names, _ = parameter.__tensor_flatten__()
    return sum(_packed_bytes(getattr(parameter, name), size) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=("llama.cpp", "torchao", "quanto"))
    parser.add_argument("model", type=Path)
    parser.add_argument("precision")
    parser.add_argument("windows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    system = (LlamaCpp if args.system == "llama.cpp" else Torch)(args)
    windows, facts = np.load(args.windows), {"bytes": system.nbytes}
    if args.speed:
        tokens = windows.reshape(-1)[:READ].tolist()
        system.read(tokens)
        times = [(system.read(tokens), system.decode(tokens[:BEFORE])) for _ in range(REPETITIONS)]
        read, decode = (float(np.median(column)) for column in zip(*times, strict=True))
        facts |= {"prefill": READ / read, "decode": DECODED / decode}
    print(f"ready {json.dumps(facts)}", flush=True)
    while True:
        try:
            line = input()
        except EOFError:
            return
        np.save(args.out, system.logits(windows[int(line)]))
        print("done", flush=True)


if __name__ == "__main__":
    main()
