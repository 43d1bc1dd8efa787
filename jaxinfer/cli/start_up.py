"""`jaxinfer bench --start`: how long a start takes until its first token, in fresh processes; and a second engine in such a process.

--json gives an object of this layout. A spread is {"median", "min", "max", "count"}.

    format_version      1
    source
    first_start_seconds         of the process before those that count: it compiles what the cache does not have, and fetches
    first_token_seconds         from the start of a process to its first token, a spread
    load_seconds                of it, from the call of init_inference until it is back, a spread
    second_engine_seconds       from the call of a second init_inference in the same process to that engine's first token, a spread
    second_engine_programs      that were traced or compiled for it, the most of any process
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxinfer.cli.options import engine_config, load_engine, start
from jaxinfer.cli.output import print_fields, print_json, short_name, work

FORMAT_VERSION = 1
PROMPT, TOKENS = [1, 2, 3, 4, 5], 16
# what jax says when it makes a program, be it out of its cache
MADE = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration")
PROGRAMS = ("state", "prefill", "insert", "decode")


def once(args: argparse.Namespace) -> int:
    """In a process of its own: start, say a token, do it again, and print what it took."""
    start(args)
    import jax

    from jaxinfer.cli.stats import process_age
    from jaxinfer.sampling_params import SamplingParams

    made: list[str] = []

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event in MADE and any(name in str(details.get("fun_name")) for name in PROGRAMS):
            made.append(str(details.get("fun_name")))

    config, params = engine_config(args), SamplingParams(max_tokens=TOKENS, ignore_eos=True)

    begin = time.perf_counter()
    with load_engine(args.source, config, expect=(PROMPT, params)) as engine:
        loaded = time.perf_counter() - begin
        stream = engine.stream(PROMPT, params)
        next(stream)
        age = process_age()
        list(stream)  # its programs are compiled before others are counted
        jax.monitoring.register_event_duration_secs_listener(listen)
        begin = time.perf_counter()
        with load_engine(args.source, config, expect=(PROMPT, params)) as second:
            stream = second.stream(PROMPT, params)
            next(stream)
            seconds = time.perf_counter() - begin
            list(stream)
    print(json.dumps({"first_token": age, "load": loaded, "second_engine": seconds, "programs": len(made)}))
    return 0


def run(args: argparse.Namespace) -> int:
    """Measure in processes one after the other. Gives the status of one that failed, which said why."""
    config, found = engine_config(args), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config.to_dict()), "utf-8")
        command = [sys.executable, "-m", "jaxinfer", "bench", args.source, "--config", str(path), "--start-once"]
        if args.cpu_devices is not None:
            command += ["--cpu-devices", str(args.cpu_devices)]
        with work(f"starting {short_name(args.source)}", f"started {short_name(args.source)}") as progress:
            for number in range(args.repetitions + 1):
                progress(number, args.repetitions + 1, "start")
                # what a child says about its own progress is nothing to see; what is wrong with the source shows in the first
                child = subprocess.run(command, capture_output=True, text=True, check=False)
                if child.returncode:
                    sys.stderr.write(child.stderr)
                    return child.returncode
                found.append(json.loads(child.stdout.splitlines()[-1]))
    facts = {"format_version": FORMAT_VERSION, "source": args.source} | _facts(found)
    print_json(facts) if args.json else _print(facts)
    return 0


def _facts(found: list[dict[str, Any]]) -> dict[str, Any]:
    from jaxinfer.measuring import Spread

    first, *others = found
    spread = lambda name: Spread.of([entry[name] for entry in others]).to_dict()
    return {
        "first_start_seconds": first["first_token"],
        "first_token_seconds": spread("first_token"),
        "load_seconds": spread("load"),
        "second_engine_seconds": spread("second_engine"),
        "second_engine_programs": max(entry["programs"] for entry in others),
    }


def _print(facts: dict[str, Any]) -> None:
    written = lambda s: f"{s['median']:.2f} s ({s['min']:.2f}-{s['max']:.2f}, {s['count']} times)"
    print_fields(
        {
            "first start": f"{facts['first_start_seconds']:.2f} s to the first token, with what it compiled",
            "start": f"{written(facts['first_token_seconds'])} from the start of the process to the first token",
            "loading": f"{written(facts['load_seconds'])} of it in init_inference",
            "second engine": f"{written(facts['second_engine_seconds'])} to its first token in the same process, "
            f"{facts['second_engine_programs'] or 'no'} programs traced or compiled",
        }
    )
