"""Worker: llama.cpp through the low-level calls of llama-cpp-python.

    python scripts/bench/peer_llama_cpp.py MODEL.gguf --precision Q8_0

The file is read as it is: --precision only names the row. With --quantize TARGET it is not run but rounded to --precision, by llama.cpp's
own quantize, and written to TARGET.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp as llama
import numpy as np
import worker

PRECISIONS = ("Q4_1", "Q4_0", "Q4_K_M", "Q8_0", "BF16", "F16", "F32")
BF16 = 30  # ggml_type; the bindings have no name for it
CACHES = {"f16": llama.GGML_TYPE_F16, "bf16": BF16, "q8_0": llama.GGML_TYPE_Q8_0, "f32": llama.GGML_TYPE_F32}


@llama.llama_log_callback
def silent(level: int, text: bytes, data: object) -> None:
    """llama.cpp writes pages about what it loads; errors come back as return codes."""


class LlamaCpp:
    compiles = False
    kernels = "ggml"

    def __init__(self, path: Path, threads: int, cache: str | None):
        self.cache = cache or "f16"
        self.system = f"llama.cpp (llama-cpp-python {llama.__version__})"
        self._threads, self._cache = threads, CACHES[self.cache]
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self._model:
            raise worker.WorkerError(f"llama.cpp cannot load {path}")
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._path, self._context, self._sizes = path, None, None

    def bytes_per_token(self) -> int:
        return worker.gguf_bytes_per_token(self._path)

    def _sized(self, tokens: int, sequences: int):
        """A context with room for as many tokens in each of the sequences; the one at hand where its sizes are the same."""
        if self._sizes != (tokens, sequences):
            if self._context:
                llama.llama_free(self._context)
            p = llama.llama_context_default_params()
            p.n_ctx, p.n_seq_max, p.n_batch = tokens * sequences, sequences, max(p.n_batch, tokens * sequences)
            p.n_threads = p.n_threads_batch = self._threads
            p.type_k = p.type_v = self._cache
            self._context, self._sizes = llama.llama_init_from_model(self._model, p), (tokens, sequences)
            if not self._context:
                raise worker.WorkerError(f"llama.cpp makes no context of {sequences} x {tokens} tokens")
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        return self._context

    def _choose(self, context, batch, count: int) -> list[int]:
        """Run a batch; the most likely token after each of the `count` tokens whose logits it asks for."""
        if status := llama.llama_decode(context, batch):
            raise worker.WorkerError(f"llama_decode gave {status}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (count, self._vocab))
        return logits.argmax(1).tolist()

    def generate(self, prompts: Sequence[list[int]], new: int) -> worker.Generated:
        length = max(map(len, prompts))
        room = -(-(length + new) // 256) * 256
        context, count = self._sized(room, len(prompts)), len(prompts)
        batch = llama.llama_batch_init(length * count, 0, 1)
        _fill(batch, [(token, at, row, at == len(p) - 1) for row, p in enumerate(prompts) for at, token in enumerate(p)])
        start = time.perf_counter()
        chosen = self._choose(context, batch, count)
        first = time.perf_counter() - start
        ids = [[token] for token in chosen]
        for _ in range(new - 1):
            _fill(
                batch, [(row[-1], len(p) + len(row) - 1, n, True) for n, (p, row) in enumerate(zip(prompts, ids, strict=True))]
            )
            for row, token in zip(ids, self._choose(context, batch, count), strict=True):
                row.append(token)
        seconds = time.perf_counter() - start
        llama.llama_batch_free(batch)
        return worker.Generated(ids=ids, first_seconds=first, seconds=seconds)


def _fill(batch, entries: list[tuple[int, int, int, bool]]) -> None:
    """Entries of a batch: token, position, sequence, whether its logits are wanted."""
    batch.n_tokens = len(entries)
    for i, (token, position, sequence, wanted) in enumerate(entries):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence


def quantize(source: Path, target: Path, precision: str, threads: int) -> None:
    """Round a GGUF file, a packed one from what it stands for; `target` appears under its name only when it is complete."""
    params = llama.llama_model_quantize_default_params()
    kind = "ALL_F32" if precision == "F32" else f"MOSTLY_{precision}"
    params.nthread, params.ftype, params.allow_requantize = threads, getattr(llama, f"LLAMA_FTYPE_{kind}"), True
    unfinished = target.with_name(f"{target.name}.part{os.getpid()}")
    if status := llama.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(params)):
        raise worker.WorkerError(f"llama_model_quantize gave {status} for {source} to {precision}")
    os.replace(unfinished, target)


def main() -> None:
    parser = worker.parser(__doc__, PRECISIONS, tuple(CACHES))
    parser.add_argument("--quantize", type=Path, metavar="TARGET", help="write the model rounded to --precision, and end")
    args = parser.parse_args()
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    if args.quantize:
        quantize(args.model, args.quantize, args.precision, args.threads)
    else:
        worker.main(lambda args: LlamaCpp(args.model, args.threads, args.cache), args)


if __name__ == "__main__":
    main()
