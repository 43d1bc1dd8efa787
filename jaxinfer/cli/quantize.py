"""`jaxinfer quantize`: fewer bits by a method that reads a calibration text, but trains nothing."""

import argparse
import dataclasses
import re
import time
from pathlib import Path
from typing import Any

from jaxinfer.cli.environment import start_jax
from jaxinfer.cli.info import stored_forms
from jaxinfer.cli.output import format_bytes, print_fields, print_json, short_name, work

METHODS = ("rtn", "gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq")
WEIGHT_FORMATS = ("int", "fp8", "nf4", "mxfp4")
FORMATS = ("native", "gptq", "compressed-tensors", "gguf")
AUTO = "auto"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
WORST = 5  # matrices that are named


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "quantize",
        help="fewer bits with calibration: GPTQ, AWQ, SmoothQuant",
        description="""Quantise a checkpoint by a method without training. Layer by layer a calibration text goes through the model: beside
its hidden states, memory holds one layer. Interrupted, the same command goes on where it was.

  rtn           the nearest level of grids that are chosen for the least error; reads a text only to weigh inputs
  gptq          makes up for the error of each input with those that follow
  awq           scales inputs by how large they are, for the least error of the outputs
  smoothquant   moves the range of inputs into the weights, for INT8 inputs; --bits 8 by default
  awq+gptq, smoothquant+gptq   one after the other

--bits auto chooses for every matrix from what its error costs on the text, so that all weights together take at most --budget, or
so that perplexity grows by at most as much, in estimation: --verify measures it.""",
        epilog="""examples:
  jaxinfer quantize demo demo-int4 --bits 4 --group-size 64 --method awq+gptq --calibration text.txt --verify
  jaxinfer quantize path/to/hf-folder model-gptq --bits 4 --group-size 128 --method gptq --calibration text.txt --format gptq
  jaxinfer quantize model.gguf model-w8a8 --method smoothquant --calibration text.txt
  jaxinfer quantize demo demo-auto --bits auto --budget 85MB --method gptq --calibration text.txt
  jaxinfer quantize demo demo-near --bits auto --budget +1% --method gptq --calibration text.txt --verify
  jaxinfer quantize demo demo-mixed --rule '*.mlp.down=w8a16' --skip 'blocks.0.*' --calibration text.txt""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="a folder, a .gguf file, a hub id, or demo")
    parser.add_argument("destination", metavar="DST", help="the folder to write; a file for gguf")
    weights = parser.add_argument_group("weights")
    weights.add_argument("--bits", metavar="N", help="of weights: 4 (by default; 8 for smoothquant), 8, or auto")
    weights.add_argument(
        "--group-size", metavar="N", type=int, help="inputs per scale; 64 by default for 4 bits, 0 (one a channel) for 8"
    )
    weights.add_argument(
        "--weight-format",
        choices=WEIGHT_FORMATS,
        default="int",
        help="int (by default) and fp8 (8 bits); nf4 and mxfp4 with rtn",
    )
    weights.add_argument("--asymmetric", action="store_true", help="a minimum per group (4 bits)")
    weights.add_argument(
        "--activation-bits", metavar="N", type=int, help="of inputs: 8, or 16 (floats); by default 16, 8 for smoothquant"
    )
    weights.add_argument(
        "--static-inputs", action="store_true", help="inputs are rounded at one scale a matrix, which the text fixes"
    )
    rule: dict[str, Any] = {"action": "append", "default": []}
    weights.add_argument(
        "--rule", metavar="PATTERN=FORM", **rule, help="short form or dtype of matrices by module path; repeatable"
    )
    weights.add_argument("--skip", metavar="PATTERN", **rule, help="matrices that stay floats; repeatable")
    weights.add_argument("--head-bits", metavar="N", type=int, default=8, help="of embedding and head: 8 (by default), 4 or 16")
    weights.add_argument(
        "--budget", metavar="SIZE", help="with --bits auto: bytes of all weights, such as 85MB, or +1%% of perplexity"
    )
    weights.add_argument(
        "--forms", metavar="A,B,...", help="short forms and dtypes that --bits auto chooses from, instead of its own"
    )
    how = parser.add_argument_group("method")
    how.add_argument("--method", choices=METHODS, default="gptq", help="(default: %(default)s)")
    how.add_argument("--calibration", metavar="FILE", type=Path, help="a text of the kind that the model is for")
    how.add_argument("--sequences", metavar="N", type=int, default=32, help="that are read of it (default: %(default)s)")
    how.add_argument("--sequence-length", metavar="N", type=int, default=512, help="their tokens (default: %(default)s)")
    how.add_argument(
        "--no-clip", action="store_true", help="grids of the largest weight of each group instead of the least error"
    )
    how.add_argument("--damping", metavar="X", type=float, default=0.01, help="of gptq (default: %(default)s)")
    how.add_argument("--no-act-order", action="store_true", help="gptq takes inputs as they are, not the largest first")
    how.add_argument("--smoothing", metavar="X", type=float, default=0.5, help="of smoothquant, 0 to 1 (default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=FORMATS, default="native", help="what is written (default: %(default)s)")
    output.add_argument(
        "--verify", action="store_true", help="read it again and compare with float32 on text that was kept back"
    )
    output.add_argument(
        "--overwrite", action="store_true", help="replace a native checkpoint at DST, once the new one is complete"
    )
    output.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    if (args.bits == AUTO) != (args.budget is not None):
        args.parser.error("--bits auto and --budget come together")
    if args.forms is not None and args.bits != AUTO:
        args.parser.error("--forms is for --bits auto")
    budget = _budget(args)
    start_jax()
    from jaxinfer.quantization.methods import Method
    from jaxinfer.quantizing import quantize_checkpoint

    start = time.perf_counter()
    quantization = _quantization(args)
    method = Method(
        name=args.method,
        clip=not args.no_clip,
        damping=args.damping,
        act_order=not args.no_act_order,
        strength=args.smoothing,
        static_inputs=args.static_inputs,
    )
    with work(f"quantising {short_name(args.source)}", f"wrote {args.destination}") as progress:
        done = quantize_checkpoint(
            args.source,
            args.destination,
            quantization=quantization,
            method=method,
            calibration=_calibration(args),
            **budget,
            **({} if args.forms is None else {"forms": args.forms.split(",")}),
            form=args.format,
            overwrite=args.overwrite,
            verify=args.verify,
            progress=progress,
        )
    _print(args, done, time.perf_counter() - start)
    return 0


def _budget(args: argparse.Namespace) -> dict[str, Any]:
    """What bits are chosen by: `budget` in bytes, `loss` of perplexity, or nothing."""
    if args.budget is None:
        return {}
    if match := re.fullmatch(r"\+(\d+(?:\.\d+)?)\s*%", args.budget):
        return {"loss": float(match[1]) / 100}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", args.budget.lower())
    if not match:
        args.parser.error(f"--budget {args.budget!r} is no size such as 85MB, and no loss such as +1%")
    assert match  # error() ends the command
    return {"budget": int(float(match[1]) * UNITS[match[2]])}


def _quantization(args: argparse.Namespace):
    """The QuantizationConfig of the options. Raises ConfigError."""
    from jaxinfer.config import QuantizationConfig
    from jaxinfer.errors import ConfigError

    smooth = args.method.startswith("smoothquant")
    bits = args.bits or ("8" if smooth or args.weight_format == "fp8" else "4")
    if bits == AUTO:
        bits = "4"
    if not bits.isdecimal() or bits in ("16", "32"):
        raise ConfigError(f"--bits is {bits!r}; give 4, 8 or auto")
    rules = {}
    for rule in args.rule:
        pattern, separator, form = rule.rpartition("=")
        if not separator or pattern in rules:
            raise ConfigError(f"--rule {rule!r} is not PATTERN=FORM, or its pattern is there twice")
        rules[pattern] = form
    return QuantizationConfig(
        weight_bits=int(bits),
        activation_bits=args.activation_bits or (8 if smooth else 16),
        group_size=args.group_size,
        symmetric=not args.asymmetric,
        weight_format=args.weight_format,
        head_bits=args.head_bits,
        skip=tuple(args.skip),
        rules=rules or None,
    )


def _calibration(args: argparse.Namespace):
    """The Calibration of the options, or None. Raises PromptError for a file that cannot be read."""
    from jaxinfer.errors import PromptError
    from jaxinfer.quantizing import Calibration

    if args.calibration is None:
        return None
    try:
        text = args.calibration.read_text("utf-8")
    except OSError as error:
        raise PromptError(f"the file {args.calibration} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{args.calibration} is not UTF-8 text: {error}") from error
    return Calibration(text=text, sequences=args.sequences, length=args.sequence_length)


def _choice_table(choices) -> list[str]:
    """A line for each layer with the forms of its matrices, and what their errors are estimated to cost."""
    rows: dict[str, list[str]] = {}
    costs: dict[str, float] = {}
    for path, choice in choices.items():
        layer, name = (".".join(path.split(".")[:2]), path.split(".")[-1]) if path.startswith("blocks.") else ("", path)
        rows.setdefault(layer, []).append(f"{name} {choice.form}")
        costs[layer] = costs.get(layer, 0.0) + choice.cost
    return [f"{layer:<10} KL {costs[layer]:.5f}  {', '.join(forms)}" for layer, forms in rows.items()]


def _print(args: argparse.Namespace, done, seconds: float) -> None:
    before, after = (stored_forms(t.values()) for t in (done.source.tensors, done.tensors))
    errors = {f"blocks.{r.layer}.{name}": error for r in done.layers for name, error in r.errors.items()}
    plainly = [path for r in done.layers for path in r.plainly]
    comparison = done.comparison and dataclasses.asdict(done.comparison)
    if args.json:
        facts: dict[str, Any] = {
            "source": str(done.source.path),
            "destination": str(Path(args.destination).expanduser().absolute()),
            "method": args.method,
            "before": before,
            "after": after,
            "relative_errors": errors,
            "rounded_plainly": plainly,
            "choices": {path: dataclasses.asdict(choice) for path, choice in done.choices.items()},
            "verified": comparison,
            "seconds": seconds,
        }
        print_json(facts)
        return
    total = lambda forms: format_bytes(sum(form["bytes"] for form in forms.values()))
    fields = {
        "from": total(before),
        "to": f"{total(after)}: " + "; ".join(f"{n} {format_bytes(f['bytes'])}" for n, f in after.items()),
    }
    fields["in"] = str(Path(args.destination).expanduser().absolute())
    if done.choices:
        fields["chosen"] = "\n".join(_choice_table(done.choices))
    if errors:
        worst = sorted(errors.items(), key=lambda item: -item[1])[:WORST]
        fields["error"] = f"{sum(errors.values()) / len(errors):.2%} of the outputs' mean square; the largest: " + ", ".join(
            f"{path} {error:.2%}" for path, error in worst
        )
    if plainly:
        more = f" and {len(plainly) - WORST} more" if len(plainly) > WORST else ""
        fields["plainly"] = (
            f"rounded to the nearest, because their experts saw too little of the text: {', '.join(plainly[:WORST])}{more}"
        )
    if comparison:
        c = done.comparison
        fields["verified"] = (
            f"perplexity {c.perplexity:.4f}, float32 {c.reference_perplexity:.4f} ({c.perplexity / c.reference_perplexity - 1:+.2%}); "
            f"KL {c.kl:.4f}, same top-1 {c.same_top1:.1%}; {c.tokens} tokens that the method has not seen"
        )
    print_fields(fields)
