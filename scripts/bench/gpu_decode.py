#!/usr/bin/env python
"""How fast a Llama-3.1-8B decodes on the GPU that is here: its shapes, with random weights that are made on the device.

    python scripts/bench/gpu_decode.py [--forms bfloat16,int8,int4] [--prompt 512] [--tokens 256] [--json FILE]
    python scripts/bench/gpu_decode.py --dry-run

One sequence, greedy, through the engine: a call for some tokens and one for many, whose difference is the time of the tokens between them.
Per form: tokens a second; the same as percent of two ceilings, what the card's data sheet lets an 8B model of so many bits be read at (on
an H100 223, 446 and 794 tokens a second for 16, 8 and 4.5 bits a weight), and what copying its own bytes takes in this process; the time
to the first token; the kernels that the compiled loop launches a layer, and whether XLA put them into command buffers.
--dry-run does all of it with a tiny model on any device, so that a fault of this script shows before a GPU is there; its numbers say
nothing.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import SamplingParams
from jaxinfer.api import open_model
from jaxinfer.config import EngineConfig
from jaxinfer.tuning import FORMS, LLAMA, shapes_of_llama
from pallas_kernels.deviceless import inspect
from pallas_kernels.gpus import KNOWN

NAMES = ("bfloat16", "int8", "int4")
BITS = {"bfloat16": 16, "int8": 8, "int4": 4.5}  # a weight, with its scales, that the ceilings are made of
TINY = LLAMA | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
COPIED = 1 << 30  # bytes
LAYERS = 32


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "kind", "sharding"))
def _made(key, *, shape, dtype, kind, sharding):
    if kind == "norm":
        made = jnp.ones(shape, dtype)
    elif kind == "scale":
        made = jnp.full(shape, 2e-3, dtype)
    elif jnp.issubdtype(dtype, jnp.floating):
        made = 0.02 * jax.random.normal(key, shape, dtype)
    else:
        made = jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
    return jax.lax.with_sharding_constraint(made, sharding)


def weights(shapes: Any) -> Any:
    """Random weights in these shapes, on their devices."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def make(path, leaf):
        name = jax.tree_util.keystr(path)
        kind = "norm" if "norm" in name else "scale" if name.endswith("scales") else "value"
        return _made(next(keys), shape=leaf.shape, dtype=leaf.dtype, kind=kind, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(make, shapes)


def copied(size: int) -> float:
    """Bytes a second that the device reads and writes while it copies an array, the best of several times."""
    a, copy = jnp.zeros(size // 4, jnp.float32), jax.jit(lambda a: a + 1)
    copy(a).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            b = copy(a)
        b.block_until_ready()
        times.append((time.perf_counter() - start) / 4)
    return 2 * size / min(times)


def opened(source: Path, form: dict[str, Any], tokens: int):
    config = {"inference_max_tokens": tokens, "micro_batch_size": 1, "kv_cache": {"dtype": "bfloat16"}, "executables": False}
    return open_model(source, dataclasses.replace(EngineConfig.load(config), **form)).engine()


def launches(form: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What the loop of the compiled decode program launches for a layer, and whether in command buffers. None where no GPU runs it."""
    if jax.default_backend() != "gpu":
        return {"launches_per_layer": None, "command_buffers": None}
    with shapes_of_llama(layers=2) as source:
        programs = opened(source, form, tokens).programs
    decode = programs.decode(0, ())
    arguments = (programs.shapes, jax.eval_shape(programs.state(1, tokens)), jax.ShapeDtypeStruct((), jnp.int32))
    found = inspect(decode.lower(*decode.abstract(*arguments))).launches
    places = [i for i, name in enumerate(found) if name == "decode_attention"]
    return {
        "launches_per_layer": places[1] - places[0] if len(places) > 1 else None,
        "command_buffers": sum(name == "kCommandBuffer" for name in found),
    }


def measure(
    name: str, form: dict[str, Any], *, prompt: int, new: int, shape: dict[str, Any], layers: int, copy: float
) -> dict[str, Any]:
    """A row of the report."""
    few, tokens = max(1, new // 8), prompt + new
    with shapes_of_llama(layers=layers, shape=shape) as source, opened(source, form, tokens) as engine:
        engine.provide(weights(engine.programs.shapes))
        read = engine.params.step_bytes(1)
        ids = [int(i) for i in np.random.default_rng(0).integers(1, shape["vocab_size"], prompt)]

        def run(count: int) -> float:
            start = time.perf_counter()
            result = engine.generate(ids, SamplingParams(max_tokens=count, temperature=0.0))
            if len(result.token_ids) != count:
                raise SystemExit(f"{name}: {len(result.token_ids)} tokens came back, not {count}")
            return time.perf_counter() - start

        for count in (1, few, new):
            run(count)  # compiles
        first = min(run(1) for _ in range(3))
        rate = (new - few) / (min(run(new) for _ in range(3)) - min(run(few) for _ in range(3)))
    kind = jax.devices()[0].device_kind
    card = next((gpu for gpu in KNOWN.values() if gpu.device_kind == kind), None)
    width, mlp = shape["hidden_size"], shape["intermediate_size"]
    kv = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    matrices = layers * (2 * width * width + 2 * width * kv + 3 * width * mlp) + width * shape["vocab_size"]
    ceiling = None if card is None else card.bandwidth / (matrices * BITS[name] / 8)
    return {
        "form": name,
        "tokens_per_second": rate,
        "weight_bytes": read,
        "ceiling": ceiling,
        "percent_of_ceiling": None if ceiling is None else 100 * rate / ceiling,
        "percent_of_copy": 100 * rate * read / copy,
        "first_token_seconds": first,
    }


def in_words(row: dict[str, Any]) -> str:
    known = lambda value: "-" if value is None else value
    ceiling = "no ceiling is known"
    if row["ceiling"] is not None:
        ceiling = f"{row['percent_of_ceiling']:5.1f} % of the ceiling of {row['ceiling']:.0f}"
    return (
        f"decode {row['form']:8} {row['tokens_per_second']:8.1f} tokens/s, {ceiling}, {row['percent_of_copy']:5.1f} % of copying; "
        f"first token {1e3 * row['first_token_seconds']:.1f} ms; {known(row['launches_per_layer'])} launches a layer, "
        f"{known(row['command_buffers'])} command buffers"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default=",".join(NAMES), help="of the weights, separated by commas")
    parser.add_argument("--prompt", type=int, default=512, help="tokens that are read first")
    parser.add_argument("--tokens", type=int, default=256, help="tokens that are generated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on any device")
    args = parser.parse_args(arguments)
    wanted = args.forms.split(",")
    if unknown := [name for name in wanted if name not in NAMES]:
        parser.error(f"--forms {','.join(unknown)}: there are {', '.join(NAMES)}")
    if min(args.prompt, args.tokens - 1) < 1:
        parser.error(f"--prompt {args.prompt} --tokens {args.tokens}: there must be one token to read, and two to generate")
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.dry_run:
        parser.error(f"the device here is a {device.platform}, not a GPU; --dry-run takes any")
    shape, layers, size = (TINY, 2, 1 << 20) if args.dry_run else (LLAMA, LAYERS, COPIED)
    copy, rows = copied(size), []
    for name, form in zip(NAMES, FORMS, strict=True):
        if name in wanted:
            row = measure(name, form, prompt=args.prompt, new=args.tokens, shape=shape, layers=layers, copy=copy)
            row |= launches(form, args.prompt + args.tokens)
            rows.append(row)
            print(in_words(row), flush=True)
    if args.json:
        facts = {"device": device.device_kind, "jax": jax.__version__, "dry_run": args.dry_run, "copy_bytes_per_second": copy}
        args.json.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
