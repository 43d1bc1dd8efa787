"""`jaxinfer convert`: a checkpoint into the native form, in the dtype or quantisation that it will run in, or into another system's."""

import argparse
import time
from pathlib import Path

from jaxinfer.cli.environment import start_jax
from jaxinfer.cli.info import stored_forms
from jaxinfer.cli.options import DTYPES, QUANTIZE_HELP
from jaxinfer.cli.output import format_bytes, print_fields, print_json, short_name, work

FORMATS = ("native", "gptq", "compressed-tensors", "gguf")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in jaxinfer's own form",
        description="""Write a checkpoint in jaxinfer's own form: an Orbax checkpoint with the model's configuration and tokenizer, which
loads on any mesh. Without --dtype and --quantize weights keep the form that they have.
DST appears when it is complete; an interrupted conversion leaves nothing.
With --format the checkpoint is written for other systems: matrices are quantised as --quantize says (int4 and int8 with float inputs, or
any inputs for compressed-tensors), or stay packed as they are stored. Native checkpoints are not exported.""",
        epilog="""examples:
  jaxinfer convert path/to/hf-folder model-bf16 --dtype bfloat16
  jaxinfer convert model.gguf model-int8 --dtype float32 --quantize int8
  jaxinfer convert demo demo-int4 --quantize w4a16-g32 --overwrite
  jaxinfer convert demo demo-q8.gguf --format gguf --quantize w8a16-g32
  jaxinfer convert path/to/hf-folder model-gptq --format gptq --quantize w4a16-g128""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="a folder, a .gguf file, a hub id, or demo")
    parser.add_argument("destination", metavar="DST", help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of the matrices; packed ones are decoded")
    parser.add_argument("--quantize", metavar="SPEC", help=QUANTIZE_HELP)
    parser.add_argument("--format", choices=FORMATS, default="native", help="what is written (default: %(default)s)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a native checkpoint at DST, once the new one is complete"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    start_jax()
    from convert.native import save_native
    from jaxinfer.config import QuantizationConfig
    from jaxinfer.loading import open_source
    from jaxinfer.quantization import attending

    start = time.perf_counter()
    quantization = QuantizationConfig.parse(args.quantize) if args.quantize else None
    if args.format != "native":
        return _export(args, quantization, start)
    with work(f"converting {short_name(args.source)}", f"wrote {args.destination}", in_bytes=True) as progress:
        opened = open_source(args.source, progress)
        tensors = opened.stored_as(dtype=args.dtype, quantization=quantization)
        save_native(
            args.destination,
            config=attending(opened.config, quantization).to_dict(),
            tensors=tensors,
            assets=opened.assets,
            progress=progress,
            overwrite=args.overwrite,
        )
    return _print(args, opened.path, opened.tensors, tensors, start)


def _export(args: argparse.Namespace, quantization, start: float) -> int:
    from convert.export import export_checkpoint
    from convert.load import QuantSpec
    from convert.readers import open_checkpoint
    from jaxinfer.loading import resolve

    if quantization is not None and quantization.attention_bits == 8:
        args.parser.error(f"--quantize {args.quantize}: {args.format} cannot say that attention multiplies integers")
    if quantization is not None and quantization.weight_format == "stored":
        args.parser.error(f"--quantize {args.quantize} rounds no weights; leave it out, packed ones are written as they are")
    if args.dtype or args.overwrite:
        args.parser.error(
            f"--{'dtype' if args.dtype else 'overwrite'} is for the native form; leave it out with --format {args.format}"
        )
    q = quantization
    spec = q and QuantSpec(format=q.format, group=q.group, symmetric=q.symmetric, activation=q.activation)
    with work(f"exporting {short_name(args.source)}", f"wrote {args.destination}", in_bytes=True) as progress:
        checkpoint = open_checkpoint(resolve(args.source, progress))
        tensors = export_checkpoint(args.destination, args.format, checkpoint, spec=spec, progress=progress)
    return _print(args, checkpoint.path, checkpoint.tensors, tensors, start)


def _print(args: argparse.Namespace, path: Path, given, written, start: float) -> int:
    before, after = stored_forms(given.values()), stored_forms(written.values())
    facts = {
        "source": str(path),
        "destination": str(Path(args.destination).expanduser().absolute()),
        "before": before,
        "after": after,
        "seconds": time.perf_counter() - start,
    }
    if args.json:
        print_json(facts)
    else:
        print_fields({"from": _summary(before), "to": _summary(after), "in": facts["destination"]})
    return 0


def _summary(forms: dict[str, dict[str, int]]) -> str:
    total = sum(form["bytes"] for form in forms.values())
    return f"{format_bytes(total)}: " + "; ".join(f"{name} {format_bytes(form['bytes'])}" for name, form in forms.items())
