"""Speed of transformers on torch at batch 1: decode and prefill tokens a second, as one JSON line.

Runs in the oracle environment (torch, transformers, gguf). Warm-up once, then the median of the repetitions:

    python scripts/bench/peer_transformers.py MODEL.gguf --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a file; nothing is looked up on the network

import torch
import transformers
from bandwidth import read_bandwidth
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is" in SmolLM2's vocabulary


class Clock(BaseStreamer):
    """Notes when each token arrives; `generate` hands over the prompt first, then token by token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(source: Path, dtype: str) -> torch.nn.Module:
    """A GGUF file or a Hugging Face folder, with transformers' default attention."""
    where, file = (source.parent, {"gguf_file": source.name}) if source.suffix == ".gguf" else (source, {})
    return AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **file).eval()


def decode(model: torch.nn.Module, count: int) -> tuple[float, float]:
    """Seconds from the call to the first token, and decoded tokens a second after it."""
    ids, clock = torch.tensor([PROMPT]), Clock()
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, streamer=clock)
    if out.shape[1] != len(PROMPT) + count:
        raise RuntimeError(f"generate made {out.shape[1] - len(PROMPT)} tokens instead of {count}")
    first, last = clock.times[1], clock.times[-1]
    return first - start, (count - 1) / (last - first)


def prefill(model: torch.nn.Module, length: int) -> float:
    """Prompt tokens a second: one forward that fills the cache and gives the last position's logits."""
    ids = (torch.arange(length) * 37 % 1000 + 100)[None]
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return length / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .gguf file or a Hugging Face folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (default 128)")
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens of the prefill (default 512)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    model = load(args.model, args.dtype)
    load_seconds = time.perf_counter() - start
    # No end of text, so that the count is always reached; the model's own settings would supply one.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        decode(model, args.tokens), prefill(model, args.prefill)
        decodes = [decode(model, args.tokens) for _ in range(args.repetitions)]
        prefills = [prefill(model, args.prefill) for _ in range(args.repetitions)]
    # All weights are read for each token but the embedding, of which one row is; a tied one is read as the head.
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    read = sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding.nbytes)
    result = {
        "system": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "precision": args.dtype,
        "decode_tokens_per_second": statistics.median(rate for _, rate in decodes),
        "prefill_tokens_per_second": statistics.median(prefills),
        "first_token_seconds": statistics.median(first for first, _ in decodes),
        "load_seconds": load_seconds,
        "bytes_per_token": read,
        "bandwidth_gb_per_second": read_bandwidth(args.threads),
        "threads": args.threads,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
