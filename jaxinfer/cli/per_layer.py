"""`jaxinfer bench --per-layer`: the time of every layer by itself in a decode step, from which pipelines can be balanced.

--json gives an object of this layout. A spread is {"median", "min", "max", "count"}.

    format_version      1
    source, platform, device_kind, mesh {axis: size}
    context             cached tokens of a sequence
    layers              [{"layer", "stage", "kind", "window" (null for none), "sequences", "seconds": spread}]
"""

import argparse
from typing import Any

from jaxinfer.cli.options import engine_config, load_engine, start
from jaxinfer.cli.output import format_spread, print_fields, print_json, print_table, short_name, work

FORMAT_VERSION = 1


def run(args: argparse.Namespace) -> int:
    start(args)
    engine = load_engine(args.source, engine_config(args))
    with work(f"measuring {short_name(args.source)}", f"measured {short_name(args.source)}") as progress:
        facts = {"format_version": FORMAT_VERSION, "source": args.source} | _measure(engine, args, progress)
    print_json(facts) if args.json else _print(facts)
    return 0


def _measure(engine, args: argparse.Namespace, progress) -> dict[str, Any]:
    from jaxinfer.errors import TokenLimitError
    from jaxinfer.measuring import Spread
    from jaxinfer.stages import layer_seconds

    if args.context > (most := engine.config.inference_max_tokens):
        raise TokenLimitError(
            f"--context needs {args.context} tokens, inference_max_tokens is {most}; lower it, or raise --max-length"
        )
    plan, device, layers = engine.plan, engine.mesh.devices.flat[0], []
    sizes = {"context": args.context, "cache_dtype": engine.programs.cache_dtype, "kernels": engine.config.kernels}
    stages = [stage for stage, count in enumerate(plan.counts) for _ in range(count)]
    windows = plan.config.windows or (None,) * plan.config.layers
    batches = list(dict.fromkeys(-(-n // engine.data_shards) for n in args.batch))
    for done, batch in enumerate(batches):
        progress(done, len(batches), "layers")
        times = layer_seconds(plan, engine.mesh, engine.params, batch=batch, repetitions=args.repetitions, **sizes)
        layers += [
            {
                "layer": layer,
                "stage": stages[layer],
                "kind": plan.config.kind(layer),
                "window": windows[layer],
                "sequences": batch * engine.data_shards,
                "seconds": Spread.of(own).to_dict(),
            }
            for layer, own in enumerate(times)
        ]
    progress(len(batches), len(batches), "done")
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "mesh": dict(engine.mesh.shape),
        "context": args.context,
        "layers": layers,
    }


def _print(facts: dict[str, Any]) -> None:
    print_fields({"device": facts["device_kind"], "context": f"{facts['context']} tokens"})
    rows = []
    for entry in facts["layers"]:
        kind = entry["kind"] if entry["window"] is None else f"{entry['kind']}, window {entry['window']}"
        rows.append([*(str(entry[key]) for key in ("layer", "stage")), kind, str(entry["sequences"])])
        rows[-1].append(format_spread(entry["seconds"], 1e6, 0))
    print_table("each layer by itself", ["layer", "stage", "kind", "sequences", "us"], rows)
    print("median (fastest-slowest of the repetitions) of a decode step, the cost of a call of its own with it")
