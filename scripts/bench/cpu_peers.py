"""jaxinfer beside its peers on a CPU: the same model, the same threads, in turn.

Every figure comes from a fresh process; the systems take turns, each round in another order, since a machine's speed may change between
processes. Ratios are taken within a round. Peers run in environments of their own, made by scripts/bench/peers_env.sh; those that are
not there are left out and named. What other formats a GGUF file has to be turned into is made once and kept in the user's cache folder.

    python scripts/bench/cpu_peers.py MODEL.gguf --quick
    python scripts/bench/cpu_peers.py MODEL.gguf --workloads all --json run.json --chart run.png --markdown
    python scripts/bench/cpu_peers.py MODEL.gguf --systems jaxinfer:int8+bfloat16 llama.cpp:Q8_0+q8_0 --workloads decode_4k --rounds 5
    python scripts/bench/cpu_peers.py --from run.json --chart run.png --markdown

A system is ENGINE:PRECISION, or ENGINE:PRECISION+CACHE to choose the format of keys and values; --list prints those that are run by
default. jaxinfer:Q4_0 and jaxinfer:Q8_0 run as stored-a8 on the file that llama.cpp has of that name. jaxinfer-xla is jaxinfer without its
native kernels. The layout of the JSON file is described in peers_report.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peers_report import OURS, OURS_ON_XLA, VERSION, System, chart, summarise, tables
from worker import WORKLOADS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxinfer"  # as scripts/env.sh has it

DEFAULT_WORKLOADS = ("decode", "decode_1k", "batch_8", "prefill_512")
QUICK_WORKLOADS = ("decode", "prefill_512")


class BenchmarkError(RuntimeError):
    """Something about the whole run is wrong."""


class LeftOutError(RuntimeError):
    """One system cannot be run, and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """script: its worker. python: of its environment in CACHE, None for the one that runs this. environment: its name for
    peers_env.sh. precisions: {precision: group}; empty: any. caches: what may stand after a +. options: more words for the worker."""

    script: str
    python: str | None
    environment: str | None
    precisions: Mapping[str, str]
    caches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


FILES = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}  # that llama.cpp quantises, and others read
_JAXINFER = Engine(
    script="worker_jaxinfer.py",
    python=None,
    environment=None,
    precisions={},
    caches=("float32", "bfloat16", "int8", "fp8", "int4"),
)
ENGINES = {
    OURS: _JAXINFER,
    OURS_ON_XLA: dataclasses.replace(_JAXINFER, options=("--kernels", "xla")),
    "transformers": Engine(
        script="peer_transformers.py",
        python="oracle/bin/python",
        environment="transformers",
        precisions={"float32": "float32", "bfloat16": "bfloat16"},
    ),
    "llama.cpp": Engine(
        script="peer_llama_cpp.py",
        python="peers/llama-cpp-python/bin/python",
        environment="llama-cpp-python",
        precisions={"BF16": "bfloat16", **FILES},
        caches=("f16", "bf16", "q8_0", "f32"),
    ),
    "ctranslate2": Engine(
        script="peer_ctranslate2.py",
        python="peers/ctranslate2/bin/python",
        environment="ctranslate2",
        precisions={"float32": "float32", "int8": "int8"},
    ),
    "openvino": Engine(
        script="peer_openvino.py",
        python="peers/openvino-genai/bin/python",
        environment="openvino-genai",
        precisions=FILES,
        caches=("u8", "bf16", "f16", "f32"),
    ),
}
STORED = {"ALL_F32": "float32", "MOSTLY_BF16": "bfloat16", "MOSTLY_Q8_0": "int8", "MOSTLY_Q4_0": "int4", "MOSTLY_Q4_1": "int4"}
DEFAULT_SYSTEMS = (
    "jaxinfer:float32",
    "transformers:float32",
    "ctranslate2:float32",
    "jaxinfer:bfloat16",
    "transformers:bfloat16",
    "llama.cpp:BF16",
    "jaxinfer:int8",
    "ctranslate2:int8",
    "llama.cpp:Q8_0",
    "openvino:Q8_0",
    "jaxinfer:stored-a8",
    "jaxinfer:stored",
    "jaxinfer:Q4_0",
    "llama.cpp:Q4_1",
    "llama.cpp:Q4_0",
    "openvino:Q4_1",
)


def parse_system(text: str, file_type: str | None) -> System:
    """A System from ENGINE:PRECISION[+CACHE]. file_type: that of the GGUF file, which "stored" and "stored-a8" stand for.

    Raises BenchmarkError.
    """
    engine, _, rest = text.partition(":")
    precision, _, cache = rest.partition("+")
    known = ENGINES.get(engine)
    if known is None or not precision:
        raise BenchmarkError(f"{text!r} is no system: write ENGINE:PRECISION; engines are {', '.join(ENGINES)}")
    if cache and cache not in known.caches:
        raise BenchmarkError(
            f"{text!r}: {engine} has no choice {cache!r} of a cache; it has {', '.join(known.caches) or 'none'}"
        )
    if known.precisions:
        if precision not in known.precisions:
            raise BenchmarkError(f"{text!r}: {engine} runs at {', '.join(known.precisions)} here, not at {precision!r}")
        group = known.precisions[precision]
    elif precision in ("stored", "stored-a8"):
        group = STORED.get(file_type or "", file_type or "stored")
    elif precision in FILES:
        group = FILES[precision]
    else:
        group = (
            "int8" if precision.startswith(("int8", "w8")) else "int4" if precision.startswith(("int4", "w4")) else precision
        )
    return System(engine=engine, precision=precision, cache=cache or None, group=group)


def gguf_file_type(path: Path) -> str | None:
    """Such as MOSTLY_Q4_1; None for a folder."""
    if path.suffix != ".gguf":
        return None
    import gguf

    field = gguf.GGUFReader(path).fields.get(gguf.Keys.General.FILE_TYPE)
    return None if field is None else gguf.LlamaFileType(field.contents()).name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The forms of one model. source: a GGUF file or a folder; file_type: see gguf_file_type. pythons: of engines, where set."""

    source: Path
    file_type: str | None
    threads: int
    pythons: Mapping[str, Path]

    @property
    def folder(self) -> Path:
        """Where what is made of this very file lies."""
        stat = self.source.stat()
        key = hashlib.sha256(f"{self.source.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
        return CACHE / "peers" / "models" / f"{self.source.stem}-{key}"

    def python(self, engine: str) -> Path:
        """Raises LeftOutError where the engine's environment is not there."""
        known = ENGINES[engine]
        if known.python is None:
            return Path(sys.executable)
        path = self.pythons.get(engine, CACHE / known.python)
        if not path.exists():
            raise LeftOutError(f"it is not installed: scripts/bench/peers_env.sh {known.environment}")
        return path

    def path(self, system: System) -> Path:
        """The model in the form that a system reads, made where it is not there. Raises LeftOutError."""
        self.python(system.engine)
        if system.engine in (OURS, OURS_ON_XLA, "transformers") and system.precision not in FILES:
            return self.source
        if self.file_type is None:
            raise LeftOutError("it is made from a .gguf file only")
        if system.engine == "ctranslate2":
            return self._made(f"ctranslate2-{system.precision}", "ctranslate2", "--convert", system.precision)
        if self.file_type == f"MOSTLY_{system.precision}":
            return self.source
        return self._made(f"{system.precision}.gguf", "llama.cpp", "--quantize", system.precision)

    def _made(self, name: str, engine: str, option: str, precision: str) -> Path:
        """A form that the engine's own worker writes from float32."""
        target, plain = self.folder / name, self.folder / "float32.gguf"
        if not target.exists():
            worker = [str(self.python(engine)), str(HERE / ENGINES[engine].script)]
            target.parent.mkdir(parents=True, exist_ok=True)
            if not plain.exists():
                self._run([sys.executable, str(HERE / "dequantize_gguf.py"), str(self.source), str(plain)])
            self._run([*worker, str(plain), option, str(target), "--precision", precision, "--threads", str(self.threads)])
        return target

    def _run(self, command: list[str]) -> None:
        print(f"making {command[3] if command[2].startswith('-') else command[-1]} ...", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LeftOutError(f"its model could not be made: {' '.join(command)}: {_tail(done.stderr)}")


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def run_worker(system: System, model: Path, models: Models, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The JSON line of one fresh process. Raises LeftOutError with its last words where there is none."""
    command = [str(models.python(system.engine)), str(HERE / ENGINES[system.engine].script), str(model)]
    ours = system.engine in (OURS, OURS_ON_XLA)
    precision = "stored-a8" if ours and system.precision in FILES else system.precision
    command += ["--precision", precision, "--threads", str(args.threads), "--tokens", str(args.tokens)]
    command += ["--folder", str(folder), "--workloads", *args.workloads]
    command += ["--cache", system.cache] if system.cache else []
    command += ENGINES[system.engine].options
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a first start finds nothing compiled
    if ours:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=args.timeout)
    except subprocess.TimeoutExpired as error:
        raise LeftOutError(f"no result after {args.timeout} s (--timeout)") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = _tail(done.stderr)
        said = words.splitlines()[-1] if words else "it said nothing"
        raise LeftOutError(f"ended with code {done.returncode}: {said}\n{' '.join(command)}\n{words}")
    return json.loads(lines[-1])


def order(systems: Sequence[System], turn: int) -> list[System]:
    """Each round starts with another system, and every other one goes on backwards."""
    start = turn % len(systems)
    first, *others = [*systems[start:], *systems[:start]]
    return [first, *(others[::-1] if turn % 2 else others)]


def measure(
    systems: Sequence[System], rounds: int, worker: Callable[[System], dict[str, Any]]
) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """{name: a result for each round} and {name: why it failed}; what failed once is not run again, and has no results.

    Ctrl-C ends it with the rounds that are whole; in the first one it is raised.
    """
    runs: dict[str, list[dict]] = {system.name: [] for system in systems}
    failed: dict[str, str] = {}
    for turn in range(rounds):
        for system in order(systems, turn):
            if system.name in failed:
                continue
            try:
                runs[system.name].append(worker(system))
            except KeyboardInterrupt:
                if not turn:
                    raise
                print(f"interrupted: {turn} of {rounds} rounds are whole", file=sys.stderr, flush=True)
                return {name: results[:turn] for name, results in runs.items() if name not in failed}, failed
            except LeftOutError as error:
                failed[system.name] = str(error)
                print(f"{system.name}: {error}", file=sys.stderr, flush=True)
                continue
            speeds = {name: w["tokens_per_second"] for name, w in runs[system.name][-1]["workloads"].items()}
            written = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
            print(f"round {turn + 1}/{rounds} {system.name}: {written}", file=sys.stderr, flush=True)
    return {name: results for name, results in runs.items() if name not in failed}, failed


def limit_cores(threads: int) -> None:
    """Keeps this process and its children on `threads` cores, so that no system takes more than its peers."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise BenchmarkError(f"--threads {threads}, but this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[:threads])


def processor() -> str:
    """The processor's name, for the heading."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report, as its JSON layout has it."""
    source = Path(args.model)
    if not source.exists():
        raise BenchmarkError(f"{source}: there is no such file or folder")
    file_type = gguf_file_type(source)
    systems = [parse_system(text, file_type) for text in args.systems]
    pythons = {engine: Path(path) for engine, path in args.python}
    models = Models(source=source, file_type=file_type, threads=args.threads, pythons=pythons)
    limit_cores(args.threads)
    paths: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for system in systems:
        try:
            paths[system.name] = models.path(system)
        except LeftOutError as error:
            left_out[system.name] = str(error)
            print(f"{system.name} is left out: {error}", file=sys.stderr, flush=True)
    ready = [system for system in systems if system.name in paths]
    if not ready:
        raise BenchmarkError("nothing can be run")
    with tempfile.TemporaryDirectory(prefix="cpu-peers-") as folder:
        worker = lambda system: run_worker(system, paths[system.name], models, args, Path(folder))
        runs, failed = measure(ready, args.rounds, worker)
    return {
        "version": VERSION,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "settings": {
            "model": str(source),
            "threads": args.threads,
            "rounds": max(map(len, runs.values()), default=0),
            "tokens": args.tokens,
            "workloads": list(args.workloads),
        },
        **summarise(ready, runs, args.workloads),
        "left_out": left_out,
        "failed": failed,
        "runs": runs,
    }


def read_report(path: Path) -> dict[str, Any]:
    report = json.loads(path.read_text())
    if report.get("version") != VERSION:
        raise BenchmarkError(f"{path} has layout {report.get('version')!r}, this script reads {VERSION}")
    return report


def _python(text: str) -> tuple[str, str]:
    engine, _, path = text.partition("=")
    if engine not in ENGINES or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not ENGINE=PYTHON with an engine of {', '.join(ENGINES)}")
    return engine, path


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a .gguf file; a Hugging Face folder for jaxinfer and transformers alone")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="default: all of --list")
    parser.add_argument(
        "--workloads", nargs="+", metavar="NAME", choices=("all", *WORKLOADS), help=f"default: {' '.join(DEFAULT_WORKLOADS)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"1 round of {' and '.join(QUICK_WORKLOADS)}, unless they are given"
    )
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores of this process")
    parser.add_argument(
        "--tokens", type=int, default=128, help="new tokens of a sequence, at most; fewer only to try things out"
    )
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a process may take (default 900)")
    parser.add_argument(
        "--python", type=_python, action="append", default=[], metavar="ENGINE=PYTHON", help="another environment"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured and computed; see peers_report.py")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="a PNG bar chart; needs matplotlib (the extra bench)")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="print the report of an earlier --json, run nothing"
    )
    parser.add_argument("--list", action="store_true", help="print the names of systems and workloads")
    args = parser.parse_args(argv)
    if not (args.list or args.source or args.model):
        parser.error("give a MODEL, --from FILE or --list")
    args.rounds = (1 if args.quick else 3) if args.rounds is None else args.rounds
    if args.rounds < 1 or args.tokens < 2 or args.threads < 1:
        parser.error("--rounds and --threads are at least 1, --tokens at least 2")
    chosen = args.workloads or (QUICK_WORKLOADS if args.quick else DEFAULT_WORKLOADS)
    args.workloads = tuple(name for name in WORKLOADS if name in chosen or "all" in chosen)
    args.systems = tuple(dict.fromkeys(args.systems or DEFAULT_SYSTEMS))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.list:
        print("systems:", *DEFAULT_SYSTEMS, "workloads:", *WORKLOADS, sep="\n  ")
        return 0
    try:
        if args.chart:
            import matplotlib  # noqa: F401  before minutes of measuring, not after
        report = read_report(args.source) if args.source else run(args)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print('error: --chart needs matplotlib: pip install "jaxinfer[bench]"', file=sys.stderr)
        return 2
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before a round was whole", file=sys.stderr)
        return 130
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(tables(report, markdown=args.markdown))
    if args.chart and report["rows"]:
        chart(report, args.chart)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
