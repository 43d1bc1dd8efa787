"""The options that commands share, as data: one for each field of SamplingParams and of EngineConfig. Imports no jax."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxinfer.cli.environment import start_jax
from jaxinfer.cli.output import short_name, work

DTYPES = ("float32", "bfloat16", "float16")
MATMUL_PRECISIONS = ("float32", "tf32_x3", "tf32", "bfloat16")
KERNELS = ("auto", "native", "xla")
SOURCE_HELP = "a folder, a .gguf file, a converted folder, a hub id, or demo"
QUANTIZE_HELP = (
    "quantise matrices while loading: int8, int4, w8a8, w8a16, w4a16 or w4a8 (bits of weights and inputs), fp8, nf4 or mxfp4, "
    "with -g64 (group), -asym (INT4 with a minimum), -token (one input scale a token), -a8 or -a16 (inputs), -attn8 (integers in "
    "attention); stored-a8: packed ones as they are, with INT8 inputs"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A flag. target: what it sets: a field, or section.field. kind: how its text is read; bool takes none, and sets `value`; a list is
    repeatable."""

    flag: str
    target: str
    help: str
    metavar: str | None = None
    kind: Callable[[str], Any] = str
    choices: Sequence[str] | None = None
    repeatable: bool = False
    value: bool = True

    @property
    def dest(self) -> str:
        return self.target.replace(".", "_")

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        if self.kind is bool:
            parser.add_argument(self.flag, dest=self.dest, action="store_const", const=self.value, help=self.help)
        else:
            parser.add_argument(
                self.flag,
                dest=self.dest,
                metavar=self.metavar,
                type=self.kind,
                choices=self.choices,
                action="append" if self.repeatable else "store",
                help=self.help,
            )


def token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def _bad_word_ids(text: str) -> tuple[int, ...]:
    return tuple(token_ids(text))


def _bias(text: str) -> tuple[int, float]:
    token, separator, bias = text.partition("=")
    try:
        if separator:
            return int(token), float(bias)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a token id and a number such as 42=-1.5")


def _whole_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def _folder_or_off(text: str) -> str | bool:
    return False if text == "off" else text


# Fields of SamplingParams. What has no option: logits_processor, which is a function.
SAMPLING = (
    Option(flag="--max-tokens", target="max_tokens", metavar="N", kind=int, help="new tokens at most"),
    Option(flag="--min-tokens", target="min_tokens", metavar="N", kind=int, help="before so many, nothing ends the text"),
    Option(flag="--temperature", target="temperature", metavar="X", kind=float, help="0, the default, takes the most likely token"),
    Option(flag="--top-k", target="top_k", metavar="N", kind=int, help="draw from the N most likely tokens"),
    Option(flag="--top-p", target="top_p", metavar="X", kind=float, help="draw from the most likely tokens that sum up to X"),
    Option(flag="--min-p", target="min_p", metavar="X", kind=float, help="draw from tokens of at least X times the best probability"),
    Option(flag="--seed", target="seed", metavar="N", kind=int, help="0 by default; the same seed draws the same tokens"),
    Option(
        flag="--repetition-penalty", target="repetition_penalty", metavar="X", kind=float,
        help="make tokens of prompt and text less likely, above 1",
    ),
    Option(
        flag="--presence-penalty", target="presence_penalty", metavar="X", kind=float,
        help="taken off the logits of tokens of the text so far, once",
    ),
    Option(flag="--frequency-penalty", target="frequency_penalty", metavar="X", kind=float, help="the same for each time they occur"),
    Option(
        flag="--no-repeat-ngram-size", target="no_repeat_ngram_size", metavar="N", kind=int,
        help="no sequence of N tokens occurs twice in prompt and text",
    ),
    Option(
        flag="--logit-bias", target="logit_bias", metavar="ID=X", kind=_bias, repeatable=True,
        help="add X, -100 to 100, to a token's logit; repeatable",
    ),
    Option(
        flag="--bad-word", target="bad_words", metavar="TEXT", repeatable=True,
        help="must not occur, with and without a space before it; repeatable",
    ),
    Option(
        flag="--bad-word-ids", target="bad_words", metavar="1,2,3", kind=_bad_word_ids, repeatable=True,
        help="the same as token ids",
    ),
    Option(flag="--stop", target="stop", metavar="TEXT", repeatable=True, help="ends the text, and is not part of it; repeatable"),
    Option(flag="--stop-token-id", target="stop_token_ids", metavar="ID", kind=int, repeatable=True, help="repeatable"),
    Option(flag="--ignore-eos", target="ignore_eos", kind=bool, help="do not end at the model's end tokens"),
    Option(flag="--n", target="n", metavar="N", kind=int, help="samples to give for each prompt"),
    Option(
        flag="--best-of", target="best_of", metavar="N", kind=int,
        help="samples to draw, of which the most likely ones are given",
    ),
    Option(
        flag="--logprobs", target="logprobs", metavar="N", kind=int,
        help="report each token's log-probability and N others; needs --json",
    ),
    Option(
        flag="--prompt-logprobs", target="prompt_logprobs", metavar="N", kind=int,
        help="the same for the tokens of the prompt; needs --json",
    ),
    Option(flag="--echo", target="echo", kind=bool, help="print the prompt before the new text"),
)  # fmt: skip

# Leaves of EngineConfig. What has none: checkpoint, which is SOURCE; the parts of quantization, which --quantize names together.
ENGINE = (
    Option(flag="--dtype", target="dtype", choices=DTYPES, help="of the matrices; by default as they are stored"),
    Option(flag="--quantize", target="quantization", metavar="SPEC", help=QUANTIZE_HELP + "; demo takes int8 by itself"),
    Option(
        flag="--tp", target="engine.tensor_parallel_size", metavar="N", kind=int,
        help="tensor parallelism: devices that share every layer",
    ),
    Option(
        flag="--pp", target="engine.pipeline_parallel_size", metavar="N", kind=int,
        help="pipeline parallelism: stages that share the layers",
    ),
    Option(
        flag="--dp", target="engine.data_parallel_size", metavar="N", kind=int,
        help="data parallelism: copies of the model that share the prompts",
    ),
    Option(
        flag="--ep", target="engine.expert_parallel_size", metavar="N", kind=int,
        help="expert parallelism: devices that share experts and prompts",
    ),
    Option(
        flag="--int8-across-hosts", target="engine.int8_across_hosts", kind=bool,
        help="sums of tensor shards cross hosts as INT8, which rounds them",
    ),
    Option(
        flag="--sequence-parallel", target="engine.sequence_parallel", kind=bool,
        help="split the tokens of prompts over tensor shards between half layers",
    ),
    Option(
        flag="--max-length", target="inference_max_tokens", metavar="N", kind=int,
        help="tokens of prompt and text together (inference_max_tokens)",
    ),
    Option(
        flag="--prefill-chunk", target="prefill_chunk", metavar="N", kind=int,
        help="tokens of a prompt that are read at once; by default all",
    ),
    Option(
        flag="--micro-batch-size", target="micro_batch_size", metavar="N", kind=_whole_or_auto,
        help="sequences that are decoded together, at most; auto: as many as fit",
    ),
    Option(
        flag="--kv-cache-dtype", target="kv_cache.dtype", choices=(*DTYPES, "int8", "fp8", "int4"), help="by default that of the weights",
    ),
    Option(
        flag="--matmul-precision", target="matmul_precision", choices=MATMUL_PRECISIONS, help="of float32 on a GPU",
    ),
    Option(flag="--kernels", target="kernels", choices=KERNELS, help="native: those for CPUs are required; xla: do without them"),
    Option(
        flag="--no-head-sketch", target="head_sketch", kind=bool, value=False,
        help="no sketch of the head beside it, which finds the likeliest token of a small model sooner",
    ),
    Option(flag="--batch-invariant", target="batch_invariant", kind=bool, help="the same results bit for bit whoever shares the batch"),
    Option(flag="--max-logprobs", target="max_logprobs", metavar="N", kind=int, help="alternatives that --logprobs may ask for"),
    Option(
        flag="--memory-fraction", target="memory_fraction", metavar="X", kind=float,
        help="of the device's free memory that may be taken; 0.9 by default",
    ),
    Option(
        flag="--compilation-cache", target="compilation_cache", metavar="FOLDER", kind=_folder_or_off,
        help="of compiled programs, instead of the user's; off: none",
    ),
    Option(
        flag="--executables", target="executables", metavar="FOLDER", kind=_folder_or_off,
        help="of `jaxinfer compile`, instead of the one beside the checkpoint; off: none",
    ),
)  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser, *, without: Collection[str] = (), max_tokens: str) -> None:
    """A flag for every field of SamplingParams but those of `without`. max_tokens: says what --max-tokens is by default."""
    group = parser.add_argument_group("sampling")
    for option in SAMPLING:
        if option.target not in without:
            help = f"{option.help}; {max_tokens}" if option.target == "max_tokens" else option.help
            dataclasses.replace(option, help=help).add_to(group)


def sampling_params(args: argparse.Namespace, **defaults: Any):
    """The SamplingParams that the options of a command line describe. Raises SamplingParamsError."""
    from jaxinfer.sampling_params import SamplingParams

    given = {o.target: value for o in SAMPLING if (value := getattr(args, o.dest, None)) is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return SamplingParams(**defaults | given)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """A flag for every part of EngineConfig, --config for a file of them, and --cpu-devices."""
    group = parser.add_argument_group("engine (these override --config)")
    group.add_argument("--config", metavar="FILE.json", help="an EngineConfig as JSON; DeepSpeed's names are understood")
    for option in ENGINE:
        option.add_to(group)
    group.add_argument("--cpu-devices", metavar="N", type=int, help="run on N CPU devices, to try meshes out")


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Refuse options whose number, or one of whose numbers, is below 1."""
    for name in names:
        values = getattr(args, name)
        if not values or min(values if isinstance(values, list) else [values]) < 1:
            args.parser.error(f"--{name.replace('_', '-')} needs numbers of at least 1")


def start(args: argparse.Namespace) -> None:
    """Import jax for the devices that the options of `add_engine` ask for, after refusing what is wrong usage of all these options."""
    if args.cpu_devices is not None and args.cpu_devices < 1:
        args.parser.error("--cpu-devices must be at least 1")
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(args, name, None) is not None and not args.json:
            args.parser.error(f"--{name.replace('_', '-')} needs --json, where they are printed")
    biases = getattr(args, "logit_bias", None) or ()
    if len(dict(biases)) < len(biases):
        args.parser.error("--logit-bias names a token twice; give each once")
    start_jax(args.cpu_devices)
    from sharding import distributed

    distributed.start()
    if not is_first_process():
        sys.stdout = open(os.devnull, "w")  # all have the same results, and process 0 prints them  # noqa: SIM115


def is_first_process() -> bool:
    """Whether this process says what there is to say: alone, or process 0 of those that a launcher has started."""
    from sharding import distributed

    launch = distributed.detect()
    return launch is None or launch.process == 0


def engine_config(args: argparse.Namespace):
    """EngineConfig of --config, with what the command line says put over it. Raises ConfigError."""
    from jaxinfer.config import EngineConfig

    values = EngineConfig.load(args.config).to_dict()
    for option in ENGINE:
        value = getattr(args, option.dest)
        if value is not None:
            *sections, name = option.target.split(".")
            place: Any = values
            for section in sections:
                place = place[section]
            place[name] = value
    reported = max(getattr(args, "logprobs", None) or 0, getattr(args, "prompt_logprobs", None) or 0)
    if args.max_logprobs is None:
        values["max_logprobs"] = max(values["max_logprobs"], reported)
    return EngineConfig.load(values)


def load_engine(source: str, config, **more: Any):
    """init_inference with its progress shown."""
    from jaxinfer.api import init_inference

    with work(f"loading {short_name(source)}", f"loaded {short_name(source)}") as progress:
        return init_inference(source, config, progress=progress, **more)


def shown_params(params) -> Mapping[str, Any]:
    """Fields of SamplingParams that a flag or /params may set, as JSON values."""
    return {name: value for name, value in params.to_dict().items() if name != "logits_processor"}
