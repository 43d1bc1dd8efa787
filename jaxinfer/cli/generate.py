"""`jaxinfer generate`: text for one prompt or a batch, whole or streamed."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from jaxinfer.cli.options import (
    SOURCE_HELP,
    add_engine,
    add_sampling,
    engine_config,
    is_first_process,
    load_engine,
    sampling_params,
    start,
    token_ids,
)
from jaxinfer.cli.output import paint, print_json, visible, work

MAX_TOKENS = 128
STDIN = Path("-")

Prompt = str | list[int]


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate text",
        description="Generate text for one prompt, or for several as one batch. The text goes to stdout, everything else to stderr.",
        epilog="""examples:
  jaxinfer generate demo --prompt "The capital of France is" --stream --stats
  jaxinfer generate model.gguf --prompt "One" --prompt "Two" --max-tokens 32 --json
  echo "Once upon a time" | jaxinfer generate path/to/hf-folder --dtype bfloat16 --temperature 0.8 --seed 1
  jaxinfer generate demo --prompt-file question.txt --tp 2 --cpu-devices 2
  jaxinfer generate demo --prompt-ids 504,3575,282 --logprobs 3 --json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)

    prompts = parser.add_argument_group(
        "prompts (each may be given several times; without any, stdin is read where it is piped)"
    )
    add = {"action": "append", "dest": "prompts"}
    prompts.add_argument("--prompt", metavar="TEXT", **add, help="as it is; no chat template is applied")
    prompts.add_argument(
        "--prompt-file", metavar="FILE", type=Path, **add, help="the file is one prompt, without its last newline"
    )
    prompts.add_argument("--prompt-ids", metavar="1,2,3", type=token_ids, **add, help="token ids, which need no tokenizer")
    prompts.add_argument(
        "--special-as-text", action="store_true", help="what looks like a special token in a prompt is text, and not that token"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print the text of one prompt as it comes")
    output.add_argument("--stats", action="store_true", help="print times, speeds and memory to stderr; compiles first")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout; with --stream, one a line")

    add_sampling(parser, max_tokens=f"{MAX_TOKENS} by default")
    add_engine(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    prompts = _prompts(args) if is_first_process() else []
    if args.stream and len(prompts) > 1:
        args.parser.error(f"--stream is for one prompt, there are {len(prompts)}")
    if args.stream and max(args.n or 1, args.best_of or 1) > 1:
        args.parser.error("--stream is for one sample; leave out --n and --best-of")
    start(args)
    from jaxinfer.cli.stats import measure
    from sharding import distributed

    if distributed.is_one_of_many():
        prompts = distributed.channel("prompts").from_first(lambda: prompts)

    config, params = engine_config(args), sampling_params(args, max_tokens=MAX_TOKENS)
    begin = time.perf_counter()
    engine = load_engine(args.source, config, expect=None if args.special_as_text else (prompts, params))
    loaded = time.perf_counter()
    given = [_encoded(engine, prompt) if args.special_as_text else prompt for prompt in prompts]
    if args.stats:
        _compile(engine, given, params)
    started = time.perf_counter()
    results = [_stream(engine, given[0], params, args.json)] if args.stream else _whole(engine, given, params)
    seconds = time.perf_counter() - started
    stats = None
    if args.stats:
        times = {"load_seconds": loaded - begin, "compile_seconds": started - loaded, "start": started, "seconds": seconds}
        stats = measure(engine, results, params, **times)
    _print(args, prompts, results, stats)
    return 0


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    given = args.prompts
    if not given:
        if sys.stdin is None or sys.stdin.isatty():
            args.parser.error("give a prompt with --prompt, --prompt-file or --prompt-ids, or pipe one in")
        given = [STDIN]
    return [_read(prompt) if isinstance(prompt, Path) else prompt for prompt in given]


def _read(path: Path) -> str:
    """One prompt from a file or stdin, without the newline that ends a text file."""
    from jaxinfer.errors import PromptError

    try:
        text = sys.stdin.read() if path == STDIN else path.read_text("utf-8")
    except OSError as error:
        raise PromptError(f"the prompt file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt in {path} is not UTF-8 text: {error}") from error
    return text.removesuffix("\n")


def _encoded(engine, prompt: Prompt) -> Prompt:
    """A prompt whose special tokens are text, as token ids; without a tokenizer, or empty, it is left to be refused."""
    if isinstance(prompt, list) or engine.tokenizer is None or not prompt:
        return prompt
    return engine.tokenizer.encode(prompt, special_as_text=True)


def _compile(engine, prompts: list[Prompt], params) -> None:
    """Compile what the run will need by a short one like it, so that speeds are those of a running engine."""
    with work("compiling", "compiled"):
        engine.check(prompts, params)  # what cannot be run is refused here, before anything is compiled
        tokens = min(params.max_tokens, 2)  # the first comes from prefill, the second from decode
        short = {"max_tokens": tokens, "min_tokens": 0, "stop": (), "stop_token_ids": (), "ignore_eos": True}
        engine.generate(prompts, dataclasses.replace(params, **short))


def _whole(engine, prompts: list[Prompt], params) -> list:
    with work("generating (the first run compiles)"):
        return engine.generate(prompts, params)


def _stream(engine, prompt: Prompt, params, as_json: bool):
    """Print pieces as they come; the result."""
    deltas = engine.stream(prompt, params)
    with work("compiling"):  # gone when the first piece is there
        delta = next(deltas)
    while True:
        if as_json:
            print_json({"text": delta.text, "token_ids": delta.token_ids}, pretty=False)
        elif engine.tokenizer is not None:
            print(visible(delta.text, sys.stdout), end="\n" if delta.result else "", flush=True)
        else:
            print(_listed(delta.token_ids), end="\n" if delta.result else ",", flush=True)
        if delta.result is not None:
            return delta.result
        delta = next(deltas)


def _print(args: argparse.Namespace, prompts: list[Prompt], results: list, stats) -> None:
    """The results, as far as a stream has not printed them, and the stats."""
    if args.json:
        entries = [{"prompt": p if isinstance(p, str) else None, **r.to_dict()} for p, r in zip(prompts, results, strict=True)]
        value = {"source": args.source, "results": entries} | ({"stats": stats.to_dict()} if stats else {})
        print_json(value, pretty=not args.stream)
    elif not args.stream:
        samples = [(prompt, sample) for prompt, r in zip(prompts, results, strict=True) for sample in (r, *r.alternatives)]
        for i, (prompt, result) in enumerate(samples):
            if len(samples) > 1:
                name = prompt if isinstance(prompt, str) else _listed(prompt)
                print(paint(f"[{i + 1}] {visible(name, sys.stdout)}", "bold", sys.stdout))
            print(visible(result.text, sys.stdout) or _listed(result.token_ids))
    sys.stdout.flush()
    if stats:
        stats.print()


def _listed(ids: list[int]) -> str:
    return ",".join(map(str, ids))
