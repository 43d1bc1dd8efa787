#!/usr/bin/env python
"""Perplexity of a model on a text, per precision, with KL divergence and top-1 agreement to float32.

Protocol: the whole file is tokenised in one go without special tokens and cut into windows of 1024 tokens without overlap, the last
partial one dropped; tokens 1..1023 of each window are scored; ppl = exp(mean negative log-likelihood).

    python scripts/bench/perplexity.py MODEL --data FILE [--windows 40] [--precisions float32,bfloat16,w8a8,w8a16,stored]
        [--step 128] [--json]

A precision is a dtype, a short form of quantisation (see jaxinfer.QuantizationConfig.parse), "stored": what the checkpoint holds, packed
weights as they are; or float32-attn8: float32 whose attention multiplies 8-bit integers. With +DTYPE, as in float32+int4, the tokens are
read through a cache of that dtype, --step of them at a time, each attending to what the cache holds; --step 1 is what decoding does.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxinfer
from jaxinfer.loading import open_source
from jaxinfer.models.decoder import cached_layers, embed, head_logits, layer_spec
from jaxinfer.text import Tokenizer
from pallas_kernels.layer_cache import LayerCache, cache_dtype

WINDOW = 1024
AT_ONCE = 8  # windows that go through a cache together
INTEGER_ATTENTION = "float32-attn8"
DTYPES = ("float32", "bfloat16", "float16")

type Logits = Callable[[np.ndarray], Iterator[jax.Array]]  # windows int32 [n, T] -> for each of them float32 [T - 1, V]


def load(source: str, precision: str):
    """The module of a model in one precision."""
    if precision == "stored":
        return jaxinfer.load_model(source)
    if precision in DTYPES:
        return jaxinfer.load_model(source, dtype=precision)
    if precision == INTEGER_ATTENTION:
        return jaxinfer.load_model(source, quantization=jaxinfer.QuantizationConfig(weight_bits=32, attention_bits=8))
    return jaxinfer.load_model(source, quantization=precision)


def logits_of(model) -> Logits:
    """Compiled; the weights are an argument."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids)[0, :-1])
    return lambda windows: (run(state, jnp.asarray(window[None])) for window in windows)


def cached_logits_of(model, dtype: str, step: int) -> Logits:
    """Through a cache, `step` tokens of AT_ONCE windows at a time."""
    graph, state = nnx.split(model)
    config = model.config

    @jax.jit
    def hidden(state, ids):
        weights = nnx.merge(graph, state).weights()
        B, T = ids.shape
        a = config.attention
        cache = LayerCache.zeros(rows=B, kv_heads=a.kv_heads, tokens=T, head_dim=a.head_dim, dtype=cache_dtype(dtype))

        def read(caches, first):
            positions = jnp.broadcast_to(first + jnp.arange(step, dtype=jnp.int32), (B, step))
            x = embed(weights, jax.lax.dynamic_slice_in_dim(ids, first, step, 1), positions=positions)
            x, caches = cached_layers(weights.layers, x, caches, positions, config, layer_spec(config), rows=None)
            return caches, x

        _, x = jax.lax.scan(read, (cache,) * config.layers, jnp.arange(0, T, step, dtype=jnp.int32))
        return jnp.moveaxis(x, 1, 0).reshape(B, T, -1)

    logits = jax.jit(lambda state, x: head_logits(nnx.merge(graph, state).weights(), x, config))

    def run(windows):
        for at in range(0, len(windows), AT_ONCE):
            for row in hidden(state, jnp.asarray(windows[at : at + AT_ONCE])):
                yield logits(state, row[:-1])

    return run


@jax.jit
def compare(logits, reference, targets):
    """(sum of negative log-likelihoods, sum of KL(reference || model), agreements of the most likely token)."""
    p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(q, targets[:, None], 1).sum()
    kl = jnp.sum(jnp.exp(p) * (p - q))
    return nll, kl, jnp.sum(jnp.argmax(p, -1) == jnp.argmax(q, -1))


def measure(windows: np.ndarray, models: dict) -> dict[str, dict]:
    """Means per token over all windows, for every model; the first one is the reference."""
    totals = {name: np.zeros(3) for name in models}
    start = time.perf_counter()
    running = {name: run(windows) for name, run in models.items()}
    for n, window in enumerate(windows):
        reference = None
        for name, found in running.items():
            logits = next(found)
            reference = logits if reference is None else reference
            totals[name] += [float(v) for v in compare(logits, reference, window[1:])]
        print(f"\r{n + 1} of {len(windows)} windows, {time.perf_counter() - start:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    count = windows.size - len(windows)
    means = {name: total / count for name, total in totals.items()}
    return {
        name: {"nll": nll, "perplexity": math.exp(nll), "kl": kl, "top1_agreement": same}
        for name, (nll, kl, same) in means.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='a folder, a .gguf file, a hub id, or "demo"')
    parser.add_argument("--data", type=Path, required=True, help="a text file, such as the validation part of WikiText-2")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--precisions", default="float32,bfloat16,w8a8,w8a16,stored")
    parser.add_argument(
        "--step", type=int, default=128, help="tokens that are read at a time through a cache; 1 as in decoding"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.step < 1 or WINDOW % args.step:
        parser.error(f"--step {args.step} does not divide {WINDOW}")

    tokenizer = Tokenizer.from_assets(open_source(args.model).assets)
    ids = np.asarray(tokenizer.encode(args.data.read_text(encoding="utf-8"), add_special=False), np.int32)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)[: args.windows]
    names = ["float32", *(name for name in args.precisions.split(",") if name != "float32")]
    runs, sizes = {}, {}
    for name in names:
        weights, _, cache = name.partition("+")
        model = load(args.model, weights)
        runs[name] = cached_logits_of(model, cache, args.step) if cache else logits_of(model)
        sizes[name] = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))
    rows = {name: {"bytes": sizes[name], **row} for name, row in measure(windows, runs).items()}
    if args.json:
        print(json.dumps({"tokens_in_file": len(ids), "windows": len(windows), "precisions": rows}))
        return
    print(f"{len(ids)} tokens in the file, {len(windows)} windows of {WINDOW}")
    print(f"{'precision':<15} {'MB':>7} {'nll':>8} {'ppl':>9} {'to float32':>10} {'KL':>9} {'top-1':>7}")
    for name, row in rows.items():
        change = f"{row['perplexity'] / rows['float32']['perplexity'] - 1:+.2%}"
        mb, top1 = row["bytes"] / 1e6, row["top1_agreement"]
        print(f"{name:<15} {mb:7.0f} {row['nll']:8.5f} {row['perplexity']:9.4f} {change:>10} {row['kl']:9.6f} {top1:7.2%}")


if __name__ == "__main__":
    main()
