"""`jaxinfer compile`: the programs that serving will need, compiled once and kept beside the checkpoint."""

import argparse
import time
from pathlib import Path
from typing import Any

from jaxinfer.cli.options import SOURCE_HELP, add_engine, at_least_one, engine_config, start, token_ids
from jaxinfer.cli.output import format_bytes, print_fields, print_json, short_name, work


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "compile",
        help="compile a model's programs once, for starts that compile nothing",
        description="""Compile the programs that serving needs, and keep them as executables: in the folder `executables` of a checkpoint's
folder, or beside its file. An engine of the same model, weights, mesh and cache loads them when it starts, and compiles nothing for
requests of these sizes. Executables run with the versions, the configuration and the kind of device that they were made with, and are
refused elsewhere. They are machine code: use those that you made, or whose maker you trust. No weight is read.""",
        epilog="""examples:
  jaxinfer compile demo
  jaxinfer compile model-int8 --prompt-tokens 16,128,1024 --new-tokens 128,512 --batch 1,8
  jaxinfer compile path/to/hf-folder --dtype bfloat16 --tp 4 --output /srv/executables
  jaxinfer generate path/to/hf-folder --dtype bfloat16 --tp 4 --executables /srv/executables --prompt Hello""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    add = {"type": token_ids, "metavar": "N,N,..."}
    buckets = [16, 32, 64, 128]
    parser.add_argument(
        "--prompt-tokens", default=buckets, **add, help="prompts, each for all that are padded to it (16,32,64,128)"
    )
    parser.add_argument("--new-tokens", default=[128], **add, help="what requests set max_tokens to (128)")
    parser.add_argument("--batch", default=[1], **add, help="sequences that run at the same time (1)")
    parser.add_argument("--with-logprobs", action="store_true", help="also what reports the log-probabilities of alternatives")
    parser.add_argument("--without-scores", action="store_true", help="leave out what `score` needs")
    parser.add_argument("--output", metavar="DIR", help="the folder to write to, instead of the one beside the checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_engine(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    at_least_one(args, "prompt_tokens", "new_tokens", "batch")
    start(args)
    from jaxinfer import executables
    from jaxinfer.ahead import Need, Traffic
    from jaxinfer.api import open_model
    from jaxinfer.engine import SCORE_ROWS

    traffic = Traffic(
        prompt_tokens=tuple(args.prompt_tokens),
        new_tokens=tuple(args.new_tokens),
        batches=tuple(args.batch),
        logprobs=args.with_logprobs,
        scores=not args.without_scores,
    )
    begin = time.perf_counter()
    needs: list[Need] = []
    with work(f"compiling {short_name(args.source)}", f"compiled {short_name(args.source)}") as progress:
        opened = open_model(args.source, engine_config(args), progress=progress)
        engine = opened.engine()
        engine.walk(needs.append).traffic(traffic, score_rows=SCORE_ROWS)
        assert opened.path is not None  # of a checkpoint
        folder = Path(args.output).expanduser().absolute() if args.output else executables.beside(opened.path)
        made = executables.save(engine.programs, needs, folder, config=engine.config.to_dict(), progress=progress)
    counts: dict[str, int] = {}
    for need in needs:
        counts[need.program.name] = counts.get(need.program.name, 0) + 1
    facts: dict[str, Any] = {
        "source": str(opened.path),
        "folder": str(made),
        "programs": counts,
        "bytes": sum(path.stat().st_size for path in made.iterdir()),
        "seconds": time.perf_counter() - begin,
    }
    if args.json:
        print_json(facts)
    else:
        programs = ", ".join(f"{count} {name}" for name, count in counts.items())
        print_fields({"folder": facts["folder"], "programs": programs, "size": format_bytes(facts["bytes"])})
    return 0
