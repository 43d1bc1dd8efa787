"""Speed of jaxinfer at batch 1: decode and prefill tokens a second, as one JSON line.

    python scripts/bench/worker_jaxinfer.py MODEL --dtype float32
    python scripts/bench/worker_jaxinfer.py MODEL --dtype bfloat16 --quantize int8

Compiling is not part of any figure but `first_token_seconds`, which runs from the start of loading to the first token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from bandwidth import read_bandwidth

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is" in SmolLM2's vocabulary


def bytes_per_token(engine: Any) -> int:
    """Bytes of weights read for each token: all of them but the embedding table, of which one row is; a tied one counts."""
    import jax

    params = engine.params
    unread = 0 if params.head is None else sum(leaf.nbytes for leaf in jax.tree.leaves(params.embedding))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - unread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="anything init_inference takes: a folder, a .gguf file, a native checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", metavar="SPEC", help="quantization by its short name, or a JSON object")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (default 128)")
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens of the prefill (default 512)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the bandwidth measurement; XLA takes the cores it may use")
    args = parser.parse_args()

    start = time.perf_counter()
    import jaxinfer

    config: dict[str, Any] = {"dtype": args.dtype, "inference_max_tokens": 1024}
    if args.quantize:
        config["quantization"] = json.loads(args.quantize) if args.quantize.startswith("{") else args.quantize
    engine = jaxinfer.init_inference(args.model, config)
    load_seconds = time.perf_counter() - start

    def run(prompt: list[int], count: int) -> Any:
        sampling = jaxinfer.SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        result = engine.generate([prompt], sampling)[0]
        if len(result.token_ids) != count:
            raise RuntimeError(f"generate made {len(result.token_ids)} tokens instead of {count}")
        return result.timings

    run(PROMPT, 1)
    first_token_seconds = time.perf_counter() - start
    long_prompt = [i * 37 % 1000 + 100 for i in range(args.prefill)]
    run(PROMPT, args.tokens), run(long_prompt, 1)
    decodes = [(args.tokens - 1) / run(PROMPT, args.tokens).decode_seconds for _ in range(args.repetitions)]
    prefills = [args.prefill / run(long_prompt, 1).prefill_seconds for _ in range(args.repetitions)]

    import jax

    result = {
        "system": f"jaxinfer, jax {jax.__version__}",
        "precision": args.quantize or args.dtype,
        "decode_tokens_per_second": statistics.median(decodes),
        "prefill_tokens_per_second": statistics.median(prefills),
        "first_token_seconds": first_token_seconds,
        "load_seconds": load_seconds,
        "bytes_per_token": bytes_per_token(engine),
        "bandwidth_gb_per_second": read_bandwidth(args.threads),
        "threads": args.threads,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
