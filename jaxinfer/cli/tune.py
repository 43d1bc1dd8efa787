"""`jaxinfer tune`: the fastest tiles of the GPU kernels that a model calls, measured here and kept for later starts."""

import argparse
import dataclasses
from pathlib import Path

from jaxinfer.cli.options import SOURCE_HELP, add_engine, at_least_one, engine_config, start, token_ids
from jaxinfer.cli.output import print_json, work


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure tile sizes of the GPU kernels, and keep the fastest",
        description="""Find the tile sizes with which the kernels of a model run fastest on the GPU of this machine, and keep them where
every later start looks. A tile is tried where its kernel compiles without spilled registers and within the shared memory, and kept where
it beats the heuristic's and gives the same results. What was measured stays when the command is interrupted. No weight is read.""",
        epilog="""examples:
  jaxinfer tune
  jaxinfer tune --model path/to/hf-folder --dtype bfloat16 --quantize w4a16-g128 --batch 1,8
  jaxinfer tune --op quant_matmul --op attention --json
  jaxinfer tune --op quant_matmul --compile-only h100
  jaxinfer tune --op triangle_attention --op latent_attention""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", metavar="SOURCE", help=SOURCE_HELP + "; by default the shapes of Llama-3.1-8B in bfloat16, INT8 and INT4"
    )
    parser.add_argument(
        "--op",
        metavar="NAME",
        action="append",
        default=[],
        help="only tiles of this operation; repeatable; one that the model has none of at the sizes of other models",
    )
    add = {"type": token_ids, "metavar": "N,N,..."}
    parser.add_argument("--prompt-tokens", default=[128, 1024], **add, help="prompts, each padded to a power of two (128,1024)")
    parser.add_argument("--new-tokens", default=[128], **add, help="what requests set max_tokens to (128)")
    parser.add_argument("--batch", default=[1], **add, help="sequences that run at the same time (1)")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="the folder to write to, instead of the one in the user's cache folder"
    )
    parser.add_argument(
        "--compile-only",
        metavar="CARD",
        help="measure nothing: list the legal tiles of a GPU that need not be here, such as h100",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout, with all that was tried")
    add_engine(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    at_least_one(args, "prompt_tokens", "new_tokens", "batch")
    if args.compile_only and args.output:
        args.parser.error("--compile-only measures nothing that --output could keep")
    start(args)
    from jaxinfer import tuning
    from jaxinfer.ahead import Traffic
    from pallas_kernels.gpus import KNOWN
    from pallas_kernels.tuning import user_folder

    if args.compile_only not in (None, *KNOWN):
        args.parser.error(f"--compile-only {args.compile_only}: there are {', '.join(KNOWN)}")
    if args.compile_only is None:
        tuning.check_gpu()
    traffic = Traffic(
        prompt_tokens=tuple(args.prompt_tokens), new_tokens=tuple(args.new_tokens), batches=tuple(args.batch), scores=False
    )
    with work("finding the kernels", "found the kernels"):
        found = tuning.tasks(args.model, engine_config(args), traffic, ops=args.op, gpu=args.compile_only)
    if args.compile_only:
        with work(f"compiling for {args.compile_only}") as progress:
            done = tuning.compile_only(found, args.compile_only, progress=progress)
    else:
        folder = args.output or user_folder()
        with work("measuring", f"wrote {folder}") as progress:
            done = tuning.measure(found, folder, progress=progress)
    if args.json:
        print_json([tuning.to_dict(one) for one in done])
        return 0
    for one in done:
        key = ", ".join(f"{name}={value}" for name, value in one.task.key.items())
        print(f"{one.task.op} ({key}){_gain(one)}")
        shown = one.candidates if args.compile_only else [c for c in one.candidates if c.refusal is None]
        for candidate in shown:
            print(f"  {_tile(candidate.tile)}: {_fate(candidate, one.task.default)}")
    return 0


def _gain(one) -> str:
    """The fastest tile beside the default one, where they were measured."""
    if one.candidates[0].seconds is None:
        return ""
    best, default = one.candidates[0].seconds, next(c.seconds for c in one.candidates if c.tile == one.task.default)
    return f": tuned {best * 1e6:.2f} us, default {default * 1e6:.2f} us, {default / best:.2f} x"


def _tile(tile) -> str:
    return " ".join(f"{f.name}={getattr(tile, f.name)}" for f in dataclasses.fields(tile))


def _fate(candidate, default) -> str:
    """What a candidate takes, or why it is none."""
    if candidate.refusal is not None:
        return f"not legal: {candidate.refusal}"
    kernels = candidate.kernels
    facts = [
        f"{max((k.registers for k in kernels), default=0)} registers",
        f"{max((k.shared for k in kernels), default=0) / 1024:.1f} KiB shared",
    ]
    if candidate.seconds is not None:
        facts.insert(0, f"{candidate.seconds * 1e6:.2f} us")
    return ", ".join(facts) + (" (the default)" if candidate.tile == default else "")
