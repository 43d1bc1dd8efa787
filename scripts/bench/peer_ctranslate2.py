"""Worker: CTranslate2.

    python scripts/bench/peer_ctranslate2.py FOLDER --precision int8

FOLDER is a model of its own format. With --convert TARGET the model is a float32 GGUF file of a Llama, which is written to the folder
TARGET in --precision, and not run.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import ctranslate2
import worker


class CTranslate2:
    compiles, cache = False, "float32"

    def __init__(self, folder: Path, precision: str, threads: int):
        self.system = f"CTranslate2 {ctranslate2.__version__}"
        self._generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
        )
        self.kernels = f"compute type {self._generator.compute_type}"
        self._weights = folder / "model.bin"

    def bytes_per_token(self) -> int:
        return self._weights.stat().st_size  # the tied table is in it once

    def generate(self, prompts: Sequence[list[int]], new: int) -> worker.Generated:
        times = []  # of every token

        def note(step) -> bool:
            times.append(time.perf_counter())
            return False

        start = time.perf_counter()
        results = self._generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=new,
            end_token=[],  # nothing ends a text
            include_prompt_in_result=False,  # reads the prompt at once
            callback=note,
        )
        end = time.perf_counter()
        ids = [result.sequences_ids[0] for result in results]
        return worker.Generated(ids=ids, first_seconds=times[0] - start, seconds=end - start)


def convert(source: Path, target: Path, precision: str) -> None:
    """Write a Llama from a float32 GGUF file; the folder appears under its name only when it is complete.

    Token i is named by its number: prompts are ids. GGUF files of Llamas hold the rows of q and k in pairs (0, 1), (2, 3), ... of what
    rotates together; here, as in Hugging Face folders, they are the halves of a head. Raises WorkerError for what it does not know.
    """
    import gguf
    import numpy as np
    from ctranslate2.specs import common_spec, transformer_spec

    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith(("general.", "llama."))}
    weights = {t.name: np.array(t.data) for t in reader.tensors}  # in memory: rounding is done in place
    if fields["general.architecture"] != "llama" or "rope_freqs.weight" in weights or "output.weight" in weights:
        raise worker.WorkerError(
            f"{source} is no plain Llama with a tied head: the only kind that is written for CTranslate2 here"
        )
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        fields["llama.block_count"],
        heads,
        activation=common_spec.Activation.SWISH,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=fields["llama.rope.freq_base"],
        num_heads_kv=kv_heads,
    )

    def halves(name: str, count: int):
        w = weights[name]
        return w.reshape(count, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["token_embd.weight"]
    decoder.layer_norm.gamma = weights["output_norm.weight"]
    for i, layer in enumerate(decoder.layer):
        at = f"blk.{i}."
        layer.self_attention.layer_norm.gamma = weights[f"{at}attn_norm.weight"]
        q, k = halves(f"{at}attn_q.weight", heads), halves(f"{at}attn_k.weight", kv_heads)
        layer.self_attention.linear[0].weight = np.concatenate([q, k, weights[f"{at}attn_v.weight"]])
        layer.self_attention.linear[1].weight = weights[f"{at}attn_output.weight"]
        layer.ffn.layer_norm.gamma = weights[f"{at}ffn_norm.weight"]
        layer.ffn.linear_0.weight = weights[f"{at}ffn_gate.weight"]
        layer.ffn.linear_0_noact.weight = weights[f"{at}ffn_up.weight"]
        layer.ffn.linear_1.weight = weights[f"{at}ffn_down.weight"]
    spec.config.layer_norm_epsilon = fields["llama.attention.layer_norm_rms_epsilon"]
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "0", "1", "2"
    spec.register_vocabulary([str(token) for token in range(len(weights["token_embd.weight"]))])
    spec.validate()
    spec.optimize(precision)
    unfinished = target.with_name(f"{target.name}.part{os.getpid()}")
    unfinished.mkdir()
    spec.save(str(unfinished))
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


def main() -> None:
    parser = worker.parser(__doc__, ("float32", "int8"), ())
    parser.add_argument("--convert", type=Path, metavar="TARGET", help="write the model to this folder, and end")
    args = parser.parse_args()
    if args.convert:
        convert(args.model, args.convert, args.precision)
    else:
        worker.main(lambda args: CTranslate2(args.model, args.precision, args.threads), args)


if __name__ == "__main__":
    main()
