"""`jaxinfer generate`: text for one prompt or a batch, whole or streamed."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.cli.convert import DTYPES, QUANTIZE_HELP
from jaxinfer.cli.environment import start_jax
from jaxinfer.cli.output import paint, print_json, short_name, work

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
    parser.add_argument("source", metavar="SOURCE", help="a folder, a .gguf file, a converted folder, a hub id, or demo")

    prompts = parser.add_argument_group(
        "prompts (each may be given several times; without any, stdin is read where it is piped)"
    )
    add = {"action": "append", "dest": "prompts"}
    prompts.add_argument("--prompt", metavar="TEXT", **add, help="as it is; no chat template is applied")
    prompts.add_argument(
        "--prompt-file", metavar="FILE", type=Path, **add, help="the file is one prompt, without its last newline"
    )
    prompts.add_argument("--prompt-ids", metavar="1,2,3", type=_token_ids, **add, help="token ids, which need no tokenizer")

    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print the text of one prompt as it comes")
    output.add_argument("--stats", action="store_true", help="print times, speeds and memory to stderr; compiles first")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout; with --stream, one a line")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", metavar="N", type=int, default=MAX_TOKENS, help=f"new tokens at most ({MAX_TOKENS})")
    sampling.add_argument("--temperature", metavar="X", type=float, help="0, the default, takes the most likely token")
    sampling.add_argument("--top-k", metavar="N", type=int, help="draw from the N most likely tokens")
    sampling.add_argument("--top-p", metavar="X", type=float, help="draw from the most likely tokens that sum up to X")
    sampling.add_argument("--min-p", metavar="X", type=float, help="draw from tokens of at least X times the best probability")
    sampling.add_argument("--seed", metavar="N", type=int, help="0 by default; the same seed draws the same tokens")
    sampling.add_argument("--stop", metavar="TEXT", action="append", help="ends the text, and is not part of it; repeatable")
    sampling.add_argument("--stop-token-id", metavar="ID", dest="stop_token_ids", type=int, action="append", help="repeatable")
    sampling.add_argument("--ignore-eos", action="store_true", default=None, help="do not end at the model's end tokens")
    sampling.add_argument(
        "--logprobs", metavar="N", type=int, help="report each token's log-probability and N others; needs --json"
    )

    engine = parser.add_argument_group("engine (these override --config)")
    engine.add_argument("--config", metavar="FILE.json", help="an EngineConfig as JSON")
    engine.add_argument("--dtype", choices=DTYPES, help="of the matrices; by default as they are stored")
    engine.add_argument("--quantize", metavar="SPEC", help=QUANTIZE_HELP + "; demo takes int8 by itself")
    engine.add_argument("--tp", metavar="N", type=int, help="tensor parallelism: devices that share every layer")
    engine.add_argument("--pp", metavar="N", type=int, help="pipeline parallelism: stages that share the layers")
    engine.add_argument("--max-length", metavar="N", type=int, help="tokens of prompt and text together (inference_max_tokens)")
    engine.add_argument("--micro-batch-size", metavar="N", type=int, help="sequences that are decoded together, at most")
    engine.add_argument("--kv-cache-dtype", choices=(*DTYPES, "int8"), help="by default that of the weights")
    engine.add_argument("--cpu-devices", metavar="N", type=int, help="run on N CPU devices, to try meshes out")
    parser.set_defaults(run=run, parser=parser)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def run(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    if args.stream and len(prompts) > 1:
        args.parser.error(f"--stream is for one prompt, there are {len(prompts)}")
    if args.logprobs is not None and not args.json:
        args.parser.error("--logprobs needs --json, where they are printed")
    if args.cpu_devices is not None and args.cpu_devices < 1:
        args.parser.error("--cpu-devices must be at least 1")
    start_jax(args.cpu_devices)
    from jaxinfer.api import init_inference
    from jaxinfer.cli.stats import measure
    from jaxinfer.sampling_params import SamplingParams

    config = _engine_config(args)
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    params = SamplingParams(**{k: v for k, v in vars(args).items() if k in names and v is not None})
    begin = time.perf_counter()
    with work(f"loading {short_name(args.source)}", f"loaded {short_name(args.source)}") as progress:
        engine = init_inference(args.source, config, progress=progress)
    loaded = time.perf_counter()
    if args.stats:
        _compile(engine, prompts, params)
    start = time.perf_counter()
    results = [_stream(engine, prompts[0], params, args.json)] if args.stream else _whole(engine, prompts, params)
    seconds = time.perf_counter() - start
    stats = None
    if args.stats:
        stats = measure(
            engine, results, load_seconds=loaded - begin, compile_seconds=start - loaded, start=start, seconds=seconds
        )
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


def _engine_config(args: argparse.Namespace):
    """EngineConfig of --config, with what the command line says put over it."""
    from jaxinfer.config import EngineConfig

    values = dataclasses.asdict(EngineConfig.load(args.config))

    def put(section: dict[str, Any], options: Mapping[str, Any]) -> None:
        section.update({key: value for key, value in options.items() if value is not None})

    put(values["engine"], {"tensor_parallel_size": args.tp, "pipeline_parallel_size": args.pp})
    put(values["kv_cache"], {"dtype": args.kv_cache_dtype})
    top = {"dtype": args.dtype, "quantization": args.quantize}
    top |= {"inference_max_tokens": args.max_length, "micro_batch_size": args.micro_batch_size}
    put(values, top)
    if args.logprobs is not None:
        values["max_logprobs"] = max(values["max_logprobs"], args.logprobs)
    return EngineConfig.load(values)


def _compile(engine, prompts: list[Prompt], params) -> None:
    """Compile what the run will need by a short one like it, so that speeds are those of a running engine."""
    with work("compiling", "compiled"):
        for prompt in prompts:
            engine.stream(prompt, params)  # not run: what cannot be run is refused here, before anything is compiled
        tokens = min(params.max_tokens, 2)  # the first comes from prefill, the second from decode
        engine.generate(prompts, dataclasses.replace(params, max_tokens=tokens, stop=(), stop_token_ids=(), ignore_eos=True))


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
            print(delta.text, end="\n" if delta.result else "", flush=True)
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
        for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            if len(prompts) > 1:
                print(paint(f"[{i + 1}] {prompt if isinstance(prompt, str) else _listed(prompt)}", "bold", sys.stdout))
            print(result.text or _listed(result.token_ids))
    sys.stdout.flush()
    if stats:
        stats.print()


def _listed(ids: list[int]) -> str:
    return ",".join(map(str, ids))
