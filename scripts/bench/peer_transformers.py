"""Worker: transformers on torch, in the oracle environment (torch, transformers, gguf).

    python scripts/bench/peer_transformers.py MODEL.gguf --precision bfloat16

MODEL is a .gguf file or a Hugging Face folder; a GGUF's weights are made floats while loading.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a file; nothing is looked up on the network

import torch
import transformers
import worker
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Stops nothing; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Transformers:
    compiles = False

    def __init__(self, source: Path, precision: str):
        self.system = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
        where, file = (source.parent, {"gguf_file": source.name}) if source.suffix == ".gguf" else (source, {})
        self._model = model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, precision), **file).eval()
        self.cache = precision
        # no end of text; the model's own settings would supply one
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self.kernels = f"attention {model.config._attn_implementation}"

    def bytes_per_token(self) -> int:
        embedding = self._model.get_input_embeddings().weight
        tied = self._model.get_output_embeddings().weight is embedding
        return sum(p.nbytes for p in self._model.parameters()) - (0 if tied else embedding.nbytes)

    def generate(self, prompts: Sequence[list[int]], new: int) -> worker.Generated:
        ids, clock = torch.tensor(prompts), Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        seconds = time.perf_counter() - start
        return worker.Generated(ids=out[:, ids.shape[1] :].tolist(), first_seconds=clock.times[0] - start, seconds=seconds)


def load(args: argparse.Namespace) -> Transformers:
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return Transformers(args.model, args.precision)


if __name__ == "__main__":
    worker.main(load, worker.parser(__doc__, ("float32", "bfloat16"), ()).parse_args())
