"""`jaxinfer profile`: where the time of prefill and decode goes, by the parts of the model; and a trace to look at.

--json gives {"source", "trace", "platform", "phases": [{"phase", "sequences", "tokens", "steps", "wall_seconds", "accounted", "scopes":
{path: seconds}, "layers": {number: seconds}, "between_operations_seconds", "outside_seconds"}]}. Seconds are of one step: of a prefill, or
of a token of decode.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from jaxinfer.cli.options import SOURCE_HELP, add_engine, engine_config, load_engine, start
from jaxinfer.cli.output import note, paint, print_fields, print_json, short_name, work

BETWEEN, OUTSIDE = "between operations", "outside of programs"
PREFILLS = 3


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "profile",
        help="where the time goes, by the parts of the model",
        description="""Run prefill and decode under jax's profiler. Prints the time of each part of the model, and leaves a trace in a
folder, which Perfetto (ui.perfetto.dev, the file .trace.json.gz) and XProf (the folder) show. Every instant is shared out over the
instructions that run at it; what is between them, and outside of the compiled programs, is told apart.""",
        epilog="""examples:
  jaxinfer profile demo
  jaxinfer profile model-int8 --prompt-tokens 512 --batch 8 --layers --json
  jaxinfer profile path/to/hf-folder --tp 2 --output trace""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--prompt-tokens", metavar="N", type=int, default=128, help="length of the prompts (128)")
    parser.add_argument("--batch", metavar="N", type=int, default=1, help="sequences (1)")
    parser.add_argument("--tokens", metavar="N", type=int, default=16, help="tokens that each of them decodes (16)")
    parser.add_argument("--output", metavar="DIR", help="where the trace goes; by default a new folder here")
    parser.add_argument("--layers", action="store_true", help="also print the time of each layer")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_engine(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    for name in ("prompt_tokens", "batch", "tokens"):
        if getattr(args, name) < 1:
            args.parser.error(f"--{name.replace('_', '-')} must be at least 1")
    start(args)
    import dataclasses

    # executables that were loaded do not tell their text
    config = dataclasses.replace(engine_config(args), executables=False)
    engine = load_engine(args.source, config)
    folder = Path(args.output or time.strftime("jaxinfer-profile-%Y%m%d-%H%M%S")).expanduser().absolute()
    with work(f"profiling {short_name(args.source)}", f"profiled {short_name(args.source)}"):
        phases = measure(engine, folder, prompt_tokens=args.prompt_tokens, sequences=args.batch, steps=args.tokens)
    facts = {
        "source": args.source,
        "trace": str(folder),
        "platform": engine.mesh.devices.flat[0].platform,
        "phases": phases,
    }
    if args.json:
        print_json(facts)
        return 0
    for phase in phases:
        _print(phase, args.layers)
    print_fields({"trace": facts["trace"]})
    return 0


def measure(engine, folder: Path, *, prompt_tokens: int, sequences: int, steps: int) -> list[dict[str, Any]]:
    """The phases of --json, measured; the trace is in `folder`. Raises TokenLimitError for more tokens than inference_max_tokens."""
    import jax

    from jaxinfer import profiling
    from jaxinfer.errors import TokenLimitError
    from jaxinfer.measuring import Runner
    from jaxinfer.slots import cache_bucket

    longest = engine.config.inference_max_tokens
    needed = prompt_tokens + 2 * steps + 1
    if needed > longest:
        raise TokenLimitError(
            f"{prompt_tokens} prompt tokens and twice {steps} new ones need {needed}, inference_max_tokens is {longest}; "
            "lower --prompt-tokens or --tokens, or raise --max-length"
        )
    runner = Runner(engine=engine)
    rows = runner.sequences(runner.batch(sequences))
    prefix = runner.prefill(rows, prompt_tokens)
    state = runner.decode(runner.state(prefix, cache_bucket(needed, longest)), steps)
    jax.block_until_ready((runner.prefill(rows, prompt_tokens), state))
    with profiling.tracing(folder):
        for _ in range(PREFILLS):
            with jax.profiler.TraceAnnotation("prefill"):
                jax.block_until_ready(runner.prefill(rows, prompt_tokens))
        with jax.profiler.TraceAnnotation("decode"):
            jax.block_until_ready(runner.decode(state, steps))
    trace = profiling.read_trace(folder, ("prefill", "decode"))
    modules = [profiling.Module.parse(compiled.as_text() or "") for compiled in runner.compiled.values()]
    out = []
    for name, times, tokens in (("prefill", PREFILLS, rows * prompt_tokens), ("decode", steps, rows)):
        found = profiling.attribute(trace, name, modules)
        seconds = lambda nanoseconds, times=times: nanoseconds / times / 1e9
        out.append(
            {
                "phase": name,
                "sequences": rows,
                "tokens": tokens,
                "steps": times,
                "wall_seconds": seconds(found.wall),
                "accounted": found.accounted,
                "scopes": {path: seconds(found.scopes[path]) for path in sorted(found.scopes)},
                "layers": {str(layer): seconds(found.layers[layer]) for layer in sorted(found.layers)},
                "between_operations_seconds": seconds(found.between),
                "outside_seconds": seconds(found.outside),
            }
        )
    return out


def _print(phase: dict[str, Any], layers: bool) -> None:
    """The parts of a phase as a tree, each with what is in it, the largest first."""
    import sys

    wall, each = phase["wall_seconds"], "a prefill" if phase["phase"] == "prefill" else "a step"
    what = f"{phase['phase']}: {phase['tokens']} tokens of {phase['sequences']} sequences in {wall * 1e3:.2f} ms {each}"
    print(paint(what, "bold", sys.stdout))
    sums: dict[tuple[str, ...], float] = {}
    for path, seconds in phase["scopes"].items():
        parts = tuple(path.split("/"))
        for depth in range(1, len(parts) + 1):
            sums[parts[:depth]] = sums.get(parts[:depth], 0.0) + seconds
    rows = [("  " * len(parts) + parts[-1], sums[parts]) for parts in _by_size(sums)]
    rows += [(f"  {BETWEEN}", phase["between_operations_seconds"]), (f"  {OUTSIDE}", phase["outside_seconds"])]
    if layers:
        rows += [(f"  layer {number}", seconds) for number, seconds in phase["layers"].items()]
    width = max(len(name) for name, _ in rows) + 2
    for name, seconds in rows:
        print(f"{name.ljust(width)}{seconds * 1e3:9.3f} ms {seconds / wall:7.1%}")
    if phase["accounted"] < 0.9:
        note(f"{1 - phase['accounted']:.0%} of {phase['phase']} is not in any part of the model")
    print()


def _by_size(sums: dict[tuple[str, ...], float]) -> list[tuple[str, ...]]:
    """The paths of a tree, each after the one that it is in, neighbours by falling size."""

    def below(parent: tuple[str, ...]) -> list[tuple[str, ...]]:
        children = [path for path in sums if path[:-1] == parent]
        return [p for child in sorted(children, key=lambda c: -sums[c]) for p in (child, *below(child))]

    return below(())
