"""A pipeline at work: how many of its stage-ticks are busy in a decode, and how long each stage's layers take.

What is counted is what the compiled decode program did: the ticks of its loop, and the tokens that came out. A token of a sequence is the
work of one tick on every stage, so that with B sequences in each micro-batch `tokens / B` stage-ticks of each stage were busy. The first
call fills the pipe, which costs up to stages - 1 ticks; later ones find it full.

    python scripts/bench/pipeline.py demo --stages 2        # a checkpoint, on as many CPU devices
    python scripts/bench/pipeline.py random --stages 4      # made-up weights
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as of jaxinfer.init_inference; random: a small Llama with made-up weights")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6, help="of the random model")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch, of which there are as many as stages")
    parser.add_argument("--tokens", type=int, default=64, help="that every sequence gets in a call")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    facts = measure(args)
    print(json.dumps(facts, indent=2) if args.json else text(facts))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Calls of the decode program with every slot taken, and the stages' report with measured times."""
    import jax

    if jax.config.jax_num_cpu_devices < args.stages * args.tensor:
        jax.config.update("jax_num_cpu_devices", args.stages * args.tensor)
    import jaxinfer
    from jaxinfer.measuring import Runner

    sizes = {"tensor_parallel_size": args.tensor, "pipeline_parallel_size": args.stages}
    length = 16 + args.tokens * args.calls
    config = {"inference_max_tokens": length, "micro_batch_size": args.batch, "engine": sizes}
    engine = jaxinfer.init_inference(random_model(args.layers, length) if args.model == "random" else args.model, config)
    runner = Runner(engine=engine)
    state = runner.state(runner.prefill(runner.sequences(args.batch), 8), length)
    calls = [call for _, call in zip(range(args.calls), decoded(runner, state, args), strict=False)]
    report = engine.stage_report(context=length, batch=args.batch, measure=True)
    return {
        "stages": args.stages,
        "tensor": args.tensor,
        "micro_batches": engine.plan.context.stages,
        "calls": calls,
        "busy": sum(call["busy"] for call in calls) / sum(call["stage_ticks"] for call in calls),
        "report": report.to_dict(),
    }


def decoded(runner, state, args: argparse.Namespace):
    """One call of the decode program after the other: its ticks, and the stage-ticks in which there was a sequence to work on."""
    import jax
    import numpy as np

    stages = args.stages
    while True:
        before, phase = int(np.sum(jax.device_get(state.generated))), int(state.tick)
        state = runner.decode(state, args.tokens)
        tokens = int(np.sum(jax.device_get(state.generated))) - before
        ticks = args.tokens * stages
        assert (phase + ticks - int(state.tick)) % stages == 0  # the loop ended where it was said to
        yield {"tokens": tokens, "ticks": ticks, "stage_ticks": ticks * stages, "busy": tokens // args.batch * stages}


def random_model(layers: int, positions: int):
    """A small Llama."""
    from jaxinfer.models import AttentionConfig, Decoder, MLPConfig, ModelConfig, RopeConfig

    attention = AttentionConfig(heads=8, kv_heads=4, head_dim=32, scale=32**-0.5, rope=RopeConfig(dim=32))
    common = {"family": "llama", "vocab": 512, "norm_eps": 1e-5, "tied": True}
    mlp = MLPConfig(width=768, activation="silu")
    return Decoder(
        ModelConfig(embed=256, layers=layers, attention=attention, mlp=mlp, max_positions=max(positions, 64), **common)
    )


def text(facts: dict[str, Any]) -> str:
    """In Markdown."""
    from jaxinfer.stages import Stage, StageReport

    report = facts["report"]
    stages = tuple(Stage(**stage) for stage in report["stages"])
    names = {field.name for field in dataclasses.fields(StageReport)} - {"stages"}
    lines = [
        f"{facts['stages']} stages of {facts['tensor']} devices, {facts['micro_batches']} micro-batches in flight:",
        "",
        "| call | tokens | ticks | stage-ticks | busy |",
        "|---|---|---|---|---|",
    ]
    for number, call in enumerate(facts["calls"]):
        share = call["busy"] / call["stage_ticks"]
        lines.append(f"| {number} | {call['tokens']} | {call['ticks']} | {call['stage_ticks']} | {share:.1%} |")
    table = StageReport(stages=stages, **{name: report[name] for name in names})
    return "\n".join([*lines, "", f"busy in all: {facts['busy']:.1%}", "", str(table)])


if __name__ == "__main__":
    sys.exit(main())
