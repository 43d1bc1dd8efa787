"""`jaxinfer info`: what a checkpoint holds, without reading its weights; or what this machine has."""

import argparse
import math
from collections.abc import Iterable
from typing import Any

from jaxinfer.cli.environment import start_jax
from jaxinfer.cli.output import format_bytes, print_fields, print_json, short_name, work

CACHE_DTYPES = ("float32", "bfloat16", "int8", "fp8", "int4")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="what a checkpoint holds, or what this machine has",
        description="Print what a checkpoint holds (no weight is read), or with --system what jax finds on this machine.",
        epilog="""examples:
  jaxinfer info demo
  jaxinfer info path/to/model.gguf --json
  jaxinfer info --system""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="a folder, a .gguf file, a hub id, or demo")
    parser.add_argument(
        "--system", action="store_true", help="versions, devices, and which implementation of each operation is used, and why"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    if bool(args.source) == args.system:
        args.parser.error("give a SOURCE, or --system")
    start_jax()
    if args.system:
        from jaxinfer.cli.system import print_system, system_facts

        facts = system_facts()
        print_json(facts) if args.json else print_system(facts)
    else:
        facts = source_facts(args.source)
        print_json(facts) if args.json else _print_source(facts)
    return 0


def stored_forms(tensors: Iterable[Any]) -> dict[str, dict[str, int]]:
    """LazyTensors by the form they have when read: {"int4, group 32": {"tensors", "parameters", "bytes"}}, largest first."""
    forms: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        form = forms.setdefault(_form(tensor), {"tensors": 0, "parameters": 0, "bytes": 0})
        form["tensors"] += 1
        form["parameters"] += math.prod(tensor.shape)
        form["bytes"] += tensor.nbytes
    return dict(sorted(forms.items(), key=lambda item: -item[1]["bytes"]))


def _not_native(tensor) -> str | None:
    """Why the native CPU kernels do not multiply a packed tensor, or None."""
    from pallas_kernels.cpu.operands import refusal_of

    if tensor.packed is None or len(tensor.shape) != 2:
        return None
    p = tensor.packed
    return refusal_of(
        format=p.format,
        group=p.group,
        layout="canonical",
        activation=p.activation,
        scales=p.scale_dtype.name,
        zeros=p.zeros_dtype and p.zeros_dtype.name,
    )


def _form(tensor) -> str:
    from jaxinfer.quantization.report import inputs_of

    packed = tensor.packed
    if packed is None:
        return tensor.dtype.name
    parts = [packed.format, f"group {packed.group}" if packed.group else "per channel"]
    if packed.zeros_dtype is not None:
        parts.append("with minimum" if packed.zeros_dtype.kind == "f" else "with zero point")
    if packed.activation:
        parts.append(inputs_of(packed.activation))
    return ", ".join(parts)


def cache_bytes(config, dtype: str) -> int:
    """Bytes of keys and values that a token takes in the whole model, scales included."""
    from pallas_kernels.layer_cache import token_bytes

    return config.layers * config.attention.kv_heads * token_bytes(dtype, config.attention.head_dim)


def source_facts(source: str) -> dict[str, Any]:
    """All that `info SOURCE` prints, as JSON values."""
    from jaxinfer.loading import open_source
    from jaxinfer.text import NoTokenizerError, Tokenizer

    with work(f"reading {short_name(source)}") as progress:
        opened = open_source(source, progress)
        try:
            tokenizer: Tokenizer | None = Tokenizer.from_assets(opened.assets)
        except NoTokenizerError:
            if opened.assets.tokenizer_json is not None:  # there is one, and it is damaged
                raise
            tokenizer = None
    config = opened.config
    forms = stored_forms(opened.tensors.values())
    reasons = {_form(tensor): reason for tensor in opened.tensors.values() if (reason := _not_native(tensor))}
    return {
        "source": source,
        "path": str(opened.path),
        "format": opened.format,
        "architecture": config.to_dict(),
        "parameters": sum(form["parameters"] for form in forms.values()),
        "bytes": sum(form["bytes"] for form in forms.values()),
        "stored": forms,
        "not_native": reasons,
        "cache_bytes_per_token": {dtype: cache_bytes(config, dtype) for dtype in CACHE_DTYPES},
        "tokenizer": tokenizer
        and {
            "vocabulary": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_ids": list(tokenizer.eos_ids),
            "chat_template": bool(opened.assets.config.get("chat_template")),
        },
    }


def _print_source(facts: dict[str, Any]) -> None:
    a = facts["architecture"]
    attention, mlp, moe = a["attention"], a["mlp"], a["moe"]
    tokenizer = facts["tokenizer"]
    lines = [f"{name}: {form['tensors']} tensors, {format_bytes(form['bytes'])}" for name, form in facts["stored"].items()]
    caches = [f"{dtype} {format_bytes(size)}" for dtype, size in facts["cache_bytes_per_token"].items()]
    text = "none: prompts are token ids"
    if tokenizer:
        template = "a chat template" if tokenizer["chat_template"] else "no chat template"
        text = f"{tokenizer['vocabulary']} entries, ends at {tokenizer['eos_ids']}, {template}"
    lines += [f"{name}: not through the native CPU kernels, because {why}" for name, why in facts["not_native"].items()]
    biases = [name for name, there in (("q, k, v", attention["bias"]), ("output", attention["output_bias"])) if there]
    print_fields(
        {
            "source": f"{facts['path']} ({facts['format']})",
            "family": a["family"],
            "layers": f"{a['layers']} of width {a['embed']}",
            "attention": f"{attention['heads']} heads of {attention['head_dim']}, {attention['kv_heads']} for keys and values"
            + (f"; biases on {' and '.join(biases)}" if biases else ""),
            "mlp": f"width {mlp['width']}, {'gated ' if mlp['gated'] else ''}{mlp['activation']}{', biases' * mlp['bias']}",
            **({"experts": _experts(moe, a["layers"])} if moe else {}),
            "rope": _rope(attention["rope"]),
            "context": f"{a['max_positions']} tokens",
            "vocabulary": f"{a['vocab']}, the head {'is the embedding' if a['tied'] else 'has weights of its own'}",
            "tokenizer": text,
            "parameters": f"{facts['parameters']:,}",
            "weights": format_bytes(facts["bytes"]) + "\n" + "\n".join(lines),
            "cache": "a token takes " + ", ".join(caches),
        }
    )


def _experts(moe: dict[str, Any], layers: int) -> str:
    where = "every layer" if len(moe["layers"]) == layers else f"{len(moe['layers'])} of {layers} layers"
    return f"{moe['experts']} of width {moe['width']} in {where}, {moe['used']} for a token"


def _rope(rope: dict[str, Any]) -> str:
    text = f"theta {rope['theta']:g} over {rope['dim']} dimensions"
    if rope["kind"] == "default":
        return text
    factor = f" by {rope['factor']:g}" if rope["factor"] != 1 else ""
    origin = f" from {rope['original_positions']} tokens" if rope["original_positions"] else ""
    return f"{text}, {rope['kind']} scaling{factor}{origin}"
