"""`jaxinfer convert`: a checkpoint into the native form, in the dtype or quantisation that it will run in."""

import argparse
import time
from pathlib import Path

from jaxinfer.cli.environment import start_jax
from jaxinfer.cli.info import stored_forms
from jaxinfer.cli.output import format_bytes, print_fields, print_json, short_name, work

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZE_HELP = (
    "quantise matrices while loading: int8, int4, w8a8, w8a16, w4a16 or w4a8 (bits of weights and inputs), "
    "with -g64 (group), -asym (INT4 with a minimum), -token (one input scale a token)"
)


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in jaxinfer's own form",
        description="""Write a checkpoint in jaxinfer's own form: an Orbax checkpoint with the model's configuration and tokenizer, which
loads on any mesh. Without --dtype and --quantize weights keep the form that they have.
DST appears when it is complete; an interrupted conversion leaves nothing.""",
        epilog="""examples:
  jaxinfer convert path/to/hf-folder model-bf16 --dtype bfloat16
  jaxinfer convert model.gguf model-int8 --dtype float32 --quantize int8
  jaxinfer convert demo demo-int4 --quantize w4a16-g32 --overwrite""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="a folder, a .gguf file, a hub id, or demo")
    parser.add_argument("destination", metavar="DST", help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of the matrices; packed ones are decoded")
    parser.add_argument("--quantize", metavar="SPEC", help=QUANTIZE_HELP)
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

    start = time.perf_counter()
    quantization = QuantizationConfig.parse(args.quantize) if args.quantize else None
    with work(f"converting {short_name(args.source)}", f"wrote {args.destination}", in_bytes=True) as progress:
        opened = open_source(args.source, progress)
        tensors = opened.stored_as(dtype=args.dtype, quantization=quantization)
        save_native(
            args.destination,
            config=opened.config.to_dict(),
            tensors=tensors,
            assets=opened.assets,
            progress=progress,
            overwrite=args.overwrite,
        )
    before, after = stored_forms(opened.tensors.values()), stored_forms(tensors.values())
    facts = {
        "source": str(opened.path),
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
