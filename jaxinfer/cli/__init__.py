"""The command line: one file per command. jax is imported when a command runs, so that help and usage errors are instant."""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from jaxinfer.cli import bench, chat, compile, convert, generate, info, launch, profile, quantize, score, tune
from jaxinfer.cli.output import note, paint
from jaxinfer.errors import EXPECTED
from sharding import distributed

COMMANDS = (generate, chat, score, convert, quantize, compile, info, bench, profile, tune, launch)
INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the number of the signal, as a shell reports it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and give its exit status: 0, 1 for an expected error, 130 for Ctrl-C. Raises SystemExit(2) for wrong usage.

    One of several processes ends at once with a status that is not 0: jax would wait for the others.
    """
    status = _main(arguments)
    distributed.leave(status)
    return status


def _main(arguments: Sequence[str] | None) -> int:
    if getattr(sys.stdout, "errors", None) == "strict":  # an encoding that lacks a character must not end the command
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            args = _parser().parse_args(arguments)
            return args.run(args)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a reader that has gone away is noticed in time
    except BrokenPipeError:
        # what is still in the buffer goes nowhere, so that the interpreter's last flush does not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        note("jaxinfer: interrupted")
        return INTERRUPTED
    except (*EXPECTED, OSError) as error:
        note(f"jaxinfer: {paint('error:', 'red', sys.stderr)} {error}")
        return 1


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        try:
            version = importlib.metadata.version("jaxinfer")
        except importlib.metadata.PackageNotFoundError:
            version = "(a source tree that is not installed)"
        print(f"jaxinfer {version}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxinfer",
        description="Run language models on JAX and XLA: sharded, quantised, from Hugging Face folders, GGUF files or native ones.",
        epilog="""examples:
  jaxinfer generate demo --prompt "The capital of France is" --stream
  jaxinfer chat demo
  jaxinfer score demo --text "The capital of France is Paris." --tokens
  jaxinfer info demo
  jaxinfer convert model.gguf model-int8 --quantize int8
  jaxinfer quantize demo demo-int4 --bits 4 --group-size 64 --method gptq --calibration text.txt
  jaxinfer generate --help

exit status: 0 done, 1 an error that is explained in one message, 2 wrong usage, 130 interrupted""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
