"""`jaxinfer bench`: how fast prefill and decode are on this machine, and how near to what its memory gives.

--json gives an object of this layout; a change of it raises "format_version". A spread is {"median", "min", "max", "count"}. --start
and --per-layer have others, see jaxinfer.cli.start_up and jaxinfer.cli.per_layer.

    format_version      2
    source, platform, device_kind, devices, processor, cores, versions {name: version}, mesh {axis: size}
    weight_bytes        that a decode step of one sequence reads
    bandwidth_bytes_per_second      that this process can read, measured before and after the rest; the larger one
    prefill             [{"tokens", "sequences", "seconds": spread, "tokens_per_second": spread}]
    decode              [{"sequences", "context", "cache", "steps", "seconds_per_step": spread, "tokens_per_second": spread,
                          "weight_bytes", "bytes_per_step", "bytes_per_second": spread, "share_of_bandwidth": spread}]
    layers              [{"block", "phase", "sequences", "tokens", "seconds": spread (of one layer), "weight_bytes",
                          "bytes_per_second": spread, "share_of_bandwidth": spread}]
"""

import argparse
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxinfer.cli import per_layer, start_up
from jaxinfer.cli.options import SOURCE_HELP, add_engine, at_least_one, engine_config, load_engine, start, token_ids
from jaxinfer.cli.output import format_bytes, format_spread, print_fields, print_json, print_table, short_name, work

FORMAT_VERSION = 2


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="how fast a model is on this machine",
        description="""Measure prefill at several lengths, decode at several batch sizes, and the half layers alone. Programs are compiled
and run once before they are timed; each figure is the median of the repetitions, with the fastest and the slowest. The share is of the
memory bandwidth that the same process measures.""",
        epilog="""examples:
  jaxinfer bench demo
  jaxinfer bench model-int8 --batch 1,8,32 --prompt-tokens 512,2048 --max-length 4096 --json
  jaxinfer bench path/to/hf-folder --dtype bfloat16 --tp 2 --without-layers
  jaxinfer bench demo --start --repetitions 3
  jaxinfer bench demo --per-layer --batch 8 --context 2048 --json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    add = {"type": token_ids, "metavar": "N,N,..."}
    parser.add_argument("--prompt-tokens", default=[16, 128, 512], **add, help="prompt lengths of prefill (16,128,512)")
    parser.add_argument("--batch", default=[1, 2, 4, 8], **add, help="sequences that are decoded together (1,2,4,8)")
    parser.add_argument("--context", metavar="N", type=int, default=64, help="prompt tokens before decode (64)")
    parser.add_argument("--tokens", metavar="N", type=int, default=32, help="tokens of a repetition of decode (32)")
    parser.add_argument("--repetitions", metavar="N", type=int, default=5, help="of each measurement (5)")
    parser.add_argument("--without-layers", action="store_true", help="leave out the half layers alone")
    parser.add_argument(
        "--start", action="store_true", help="instead: how long fresh processes, and a second engine, take to their first token"
    )
    parser.add_argument(
        "--per-layer",
        action="store_true",
        help="instead: how long every layer takes in a decode step, which balances a pipeline",
    )
    parser.add_argument("--start-once", action="store_true", help=argparse.SUPPRESS)  # one of these processes
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_engine(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    at_least_one(args, "prompt_tokens", "batch", "context", "tokens", "repetitions")
    if args.start or args.start_once:
        return start_up.once(args) if args.start_once else start_up.run(args)
    if args.per_layer:
        return per_layer.run(args)
    start(args)
    import dataclasses

    config = engine_config(args)
    if args.micro_batch_size is None:
        shards = config.engine.devices // config.engine.tensor_parallel_size  # that have sequences of their own
        config = dataclasses.replace(config, micro_batch_size=max(1, *(-(-n // shards) for n in args.batch)))
    engine = load_engine(args.source, config)
    with work(f"measuring {short_name(args.source)}", f"measured {short_name(args.source)}") as progress:
        facts = {"format_version": FORMAT_VERSION, "source": args.source} | measure(engine, args, progress)
    print_json(facts) if args.json else _print(facts)
    return 0


def measure(engine, args: argparse.Namespace, progress) -> dict[str, Any]:
    """What --json gives, from "platform" on. Raises TokenLimitError for sizes above inference_max_tokens."""
    from jaxinfer.errors import TokenLimitError
    from jaxinfer.measuring import Halves, Runner, device_bandwidth

    runner = Runner(engine=engine)
    most = args.context + args.tokens * (args.repetitions + 1) + 1
    for what, tokens in (("--prompt-tokens", max(args.prompt_tokens)), ("--context, --tokens and --repetitions", most)):
        if tokens > engine.config.inference_max_tokens:
            raise TokenLimitError(
                f"{what} need {tokens} tokens, inference_max_tokens is {engine.config.inference_max_tokens}; "
                "lower them, or raise --max-length"
            )
    jobs = [("prefill", n) for n in args.prompt_tokens] + [("decode", n) for n in args.batch]
    jobs += [] if args.without_layers else [("layers", 0)]
    found: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": [], "layers": []}
    before = device_bandwidth(engine)
    for done, (kind, size) in enumerate(jobs):
        progress(done, len(jobs), kind)
        if kind == "prefill":
            found[kind].append(_prefill(runner, size, args))
        elif kind == "decode":
            found[kind].append(_decode(runner, size, most, args))
        else:
            found[kind] = _layers(runner, Halves(engine), most, args)
    bandwidth = max(before, device_bandwidth(engine))
    progress(len(jobs), len(jobs), "done")
    for entry in (*found["decode"], *found["layers"]):
        entry["share_of_bandwidth"] = {
            key: value if key == "count" else value / bandwidth for key, value in entry["bytes_per_second"].items()
        }
    device = engine.mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": engine.mesh.devices.size,
        "processor": processor(),
        "cores": _cores(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
        "mesh": dict(engine.mesh.shape),
        "weight_bytes": runner.weight_bytes(1),
        "bandwidth_bytes_per_second": bandwidth,
        **found,
    }


def _prefill(runner, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    from jaxinfer.measuring import timed

    rows = runner.engine.data_shards
    seconds = timed(lambda: runner.prefill(rows, tokens), args.repetitions)
    rate = seconds.each(_rate(rows * tokens))
    return {"tokens": tokens, "sequences": rows, "seconds": seconds.to_dict(), "tokens_per_second": rate.to_dict()}


def _decode(runner, wanted: int, most: int, args: argparse.Namespace) -> dict[str, Any]:
    from jaxinfer.measuring import timed
    from jaxinfer.slots import cache_bucket

    sequences = runner.sequences(runner.batch(wanted))
    cache = cache_bucket(most, runner.engine.config.inference_max_tokens)
    states = [runner.state(runner.prefill(sequences, args.context), cache)]

    def step():
        states[0] = runner.decode(states[0], args.tokens)
        return states[0]

    seconds = timed(step, args.repetitions).each(lambda s: s / args.tokens)
    mean = args.context + args.tokens * (args.repetitions + 2) / 2  # the first repetition is not timed
    weights = runner.weight_bytes(sequences)
    read = weights + sequences * mean * runner.cache_bytes_per_token
    return {
        "sequences": sequences,
        "context": args.context,
        "cache": cache,
        "steps": args.tokens,
        "seconds_per_step": seconds.to_dict(),
        "tokens_per_second": seconds.each(_rate(sequences)).to_dict(),
        "weight_bytes": weights,
        "bytes_per_step": read,
        "bytes_per_second": seconds.each(_rate(read)).to_dict(),
    }


def _layers(runner, halves, most: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each half of a layer alone: at decode for every batch, at prefill for every length."""
    from jaxinfer.measuring import timed
    from jaxinfer.slots import cache_bucket

    engine = runner.engine
    cache = cache_bucket(most, engine.config.inference_max_tokens)
    runs = []
    for batch in dict.fromkeys(runner.batch(n) for n in args.batch):
        runs.append(("attention", "decode", batch, 1, halves.attention_decode(batch, args.context, cache)))
        runs.append(("mlp", "decode", batch, 1, halves.mlp(batch, 1)))
    for tokens in args.prompt_tokens:
        runs.append(("attention", "prefill", 1, tokens, halves.attention_prefill(1, tokens)))
        runs.append(("mlp", "prefill", 1, tokens, halves.mlp(1, tokens)))
    out = []
    for half, phase, rows, tokens, call in runs:
        seconds = timed(call, args.repetitions).each(lambda s: s / engine.plan.slots)
        read = halves.bytes(half) * engine.data_shards
        out.append(
            {
                "block": half,
                "phase": phase,
                "sequences": rows * engine.data_shards,
                "tokens": tokens,
                "seconds": seconds.to_dict(),
                "weight_bytes": read,
                "bytes_per_second": seconds.each(_rate(read)).to_dict(),
            }
        )
    return out


def _rate(amount: float) -> Callable[[float], float]:
    return lambda seconds: amount / seconds


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    from pallas_kernels.cpu import library

    return library.cores()


def _print(facts: dict[str, Any]) -> None:
    device = f"{facts['devices']} x {facts['device_kind']}" if facts["platform"] != "cpu" else facts["processor"]
    bandwidth = f"{format_bytes(facts['bandwidth_bytes_per_second'])}/s"
    print_fields(
        {
            "device": f"{device}, {facts['cores']} cores",
            "weights": f"{format_bytes(facts['weight_bytes'])} a step",
            "bandwidth": f"{bandwidth} read by this process",
        }
    )
    rows = [
        [f"{e['tokens']} tokens", format_spread(e["seconds"], 1e3), format_spread(e["tokens_per_second"], 1, 0)]
        for e in facts["prefill"]
    ]
    print_table("prefill", ["prompt", "ms", "tokens/s"], rows)
    rows = [
        [str(e["sequences"]), format_spread(e["seconds_per_step"], 1e3), format_spread(e["tokens_per_second"], 1), *_reached(e)]
        for e in facts["decode"]
    ]
    print_table("decode", ["sequences", "ms a step", "tokens/s", "GB/s", "share"], rows)
    if facts["layers"]:
        rows = [
            [e["block"], e["phase"], f"{e['sequences']} x {e['tokens']}", format_spread(e["seconds"], 1e6, 0), *_reached(e)]
            for e in facts["layers"]
        ]
        print_table("one layer", ["block", "phase", "tokens", "us", "GB/s", "share"], rows)
    print("median (fastest-slowest of the repetitions); GB/s of weights and cache, share of the bandwidth")


def _reached(entry: dict[str, Any]) -> list[str]:
    return [f"{entry['bytes_per_second']['median'] / 1e9:.1f}", f"{entry['share_of_bandwidth']['median']:.0%}"]
