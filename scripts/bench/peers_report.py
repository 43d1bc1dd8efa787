"""What cpu_peers.py makes of its measurements: rows with ratios, text and Markdown tables, a chart.

The JSON file of `cpu_peers.py --json FILE` is one object. Layout, version 1; a version changes when a key changes its meaning or goes:

    version      1
    machine      {processor, cores, system}
    settings     {model, threads, rounds, tokens, workloads [names]}
    runs         {system: [what its worker printed in round 1, 2, ...]}; see worker.py
    rows         one object for each system, in the order they were asked for:
        name             ENGINE:PRECISION, with +CACHE where the cache was chosen
        engine, precision, cache, group
                         rows of the same group are compared: "float32", "bfloat16", "int8", "int4"
        system, kernels  versions, and the path of the hot operations, as the worker says
        baseline         name of jaxinfer's row on the same file, else its first one of the group, or null
        workloads        {name: {tokens_per_second SPREAD, ratio SPREAD or null}}; ratio: how many times the row's speed the
                         baseline has, taken within each round; null for the baseline itself and without one
        megabytes_per_token, gb_per_second SPREAD, bandwidth_gb_per_second SPREAD, bandwidth_share SPREAD
                         weights read for a token; times the decode workload's tokens a second; what the same process could read;
                         their quotient. The second and the last are null where decode was not run
        first_start_seconds, start_seconds SPREAD or null
                         from the start of a process to its first token: in round 1, when nothing compiled was there yet, and later
        import_seconds, load_seconds, peak_memory_megabytes
                         SPREAD each
        same_tokens, compared_tokens
                         of the first 16 greedy tokens, so many start as those of `text_reference`, of so many that both have; null
                         where decode was not run
    text_reference  name of the row that texts are compared to, or null
    fastest      [{group, workload, baseline, peer, ratio SPREAD}]: jaxinfer against the fastest peer of each group
    left_out     {system: why it was not run}
    failed       {system: what its worker said}

A SPREAD is {median, min, max} over the rounds.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from worker import IDS_SHOWN, WORKLOADS

VERSION = 1
GROUPS = ("float32", "bfloat16", "int8", "int4")
OURS = "jaxinfer"
OURS_ON_XLA = "jaxinfer-xla"  # without native kernels: for comparison, and no peer

Run = Mapping[str, Any]
Spread = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """One row: whose engine, at which precision; cache: of keys and values, None for the engine's own choice. group: of the rows that
    it is compared with."""

    engine: str
    precision: str
    cache: str | None = None
    group: str

    @property
    def name(self) -> str:
        return f"{self.engine}:{self.precision}" + (f"+{self.cache}" if self.cache else "")


def spread(values: Sequence[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _rates(runs: Sequence[Run], workload: str) -> list[float]:
    return [run["workloads"][workload]["tokens_per_second"] for run in runs]


def _ratio(baseline: Sequence[Run], runs: Sequence[Run], workload: str) -> Spread:
    """Round by round, and only then the median: a machine's speed changes between rounds."""
    return spread([a / b for a, b in zip(_rates(baseline, workload), _rates(runs, workload), strict=True)])


def _common_start(pairs: Sequence[tuple[int, int]]) -> int:
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _first_ids(runs: Sequence[Run]) -> Sequence[int]:
    return runs[0]["workloads"]["decode"]["ids"]


def _own(system: System, systems: Sequence[System]) -> str | None:
    """jaxinfer's row that a row is compared with: a peer's with the one on the same file, else with the first one of the group."""
    ours = [s for s in systems if s.engine == OURS]
    same = [s for s in ours if system.engine != OURS and s.precision == system.precision]
    return next((s.name for s in (*same, *ours) if s.group == system.group), None)


def summarise(systems: Sequence[System], runs: Mapping[str, Sequence[Run]], workloads: Sequence[str]) -> dict[str, Any]:
    """ "rows", "text_reference" and "fastest" of the JSON layout, for the systems that have runs: as many rounds each."""
    systems = [s for s in systems if runs.get(s.name)]
    by_text = ("transformers:float32", f"{OURS}:float32", *(s.name for s in systems))
    reference = next((name for name in by_text if runs.get(name)), None) if "decode" in workloads else None
    rows = [_row(s, runs, workloads, _own(s, systems), reference) for s in systems]
    fastest = []
    for group in dict.fromkeys(s.group for s in systems if s.engine == OURS):
        peers = [s for s in systems if s.group == group and s.engine not in (OURS, OURS_ON_XLA)]
        for workload in workloads if peers else ():
            peer = max(peers, key=lambda s: statistics.median(_rates(runs[s.name], workload)))
            baseline = _own(peer, systems)
            assert baseline is not None, "the group has a row of jaxinfer's"
            ratio = _ratio(runs[baseline], runs[peer.name], workload)
            fastest.append({"group": group, "workload": workload, "baseline": baseline, "peer": peer.name, "ratio": ratio})
    return {"rows": rows, "text_reference": reference, "fastest": sorted(fastest, key=lambda f: _group_order(f["group"]))}


def _row(
    system: System,
    runs: Mapping[str, Sequence[Run]],
    workloads: Sequence[str],
    baseline: str | None,
    reference: str | None,
) -> dict[str, Any]:
    own = runs[system.name]
    decoded = "decode" in workloads
    reached = [r["bytes_per_token"] * rate / 1e9 for r, rate in zip(own, _rates(own, "decode"), strict=True)] if decoded else []
    bandwidth = [run["bandwidth_gb_per_second"] for run in own]
    texts = list(zip(_first_ids(own), _first_ids(runs[reference]), strict=False)) if reference is not None else []
    compared = runs[baseline] if baseline is not None and baseline != system.name else None
    return {
        "name": system.name,
        "engine": system.engine,
        "precision": system.precision,
        "cache": own[0]["cache"],
        "group": system.group,
        "system": own[0]["system"],
        "kernels": own[0]["kernels"],
        "baseline": baseline,
        "workloads": {
            workload: {
                "tokens_per_second": spread(_rates(own, workload)),
                "ratio": _ratio(compared, own, workload) if compared else None,
            }
            for workload in workloads
        },
        "megabytes_per_token": own[0]["bytes_per_token"] / 1e6,
        "gb_per_second": spread(reached) if decoded else None,
        "bandwidth_gb_per_second": spread(bandwidth),
        "bandwidth_share": spread([a / b for a, b in zip(reached, bandwidth, strict=True)]) if decoded else None,
        "first_start_seconds": own[0]["first_token_seconds"],
        "start_seconds": spread([run["first_token_seconds"] for run in own[1:]]) if own[1:] else None,
        "import_seconds": spread([run["import_seconds"] for run in own]),
        "load_seconds": spread([run["load_seconds"] for run in own]),
        "peak_memory_megabytes": spread([run["peak_memory_bytes"] / 1e6 for run in own]),
        "same_tokens": _common_start(texts) if decoded else None,
        "compared_tokens": len(texts) if decoded else None,
    }


def _group_order(group: str) -> int:
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def _digits(value: float) -> str:
    """Three figures, and no more than the value has before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cell(values: Spread | None, written: Callable[[float], str] = _digits, unit: str = "") -> str:
    """median (smallest-largest); one figure where they are the same, as with one round."""
    if values is None:
        return "-"
    median, low, high = (written(values[key]) for key in ("median", "min", "max"))
    return f"{median}{unit}" + (f" ({low}-{high})" if low != high else "")


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _label(row: Mapping[str, Any]) -> str:
    """Such as "llama.cpp Q8_0, cache q8_0"; packed weights as a file holds them are named by what they are."""
    name = row["name"].replace(":stored", f":{row['group']} as stored", 1)  # with -a8 behind it where inputs are INT8
    return name.replace(":", " ", 1).replace("+", ", cache ")


def _grid(heads: Sequence[str], cells: Sequence[Sequence[str]], markdown: bool) -> str:
    if markdown:
        lines = [heads, ["---"] * len(heads), *cells]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in [heads, *cells]
    )


def _speeds(rows: Sequence[Mapping[str, Any]], workloads: Sequence[str], markdown: bool, *, text: bool) -> str:
    heads = ["tokens a second"]
    for workload in workloads:
        heads += [WORKLOADS[workload].title, "jaxinfer is"]
    cells = []
    for row in rows:
        line = [_label(row)]
        for workload in workloads:
            values = row["workloads"][workload]
            ours = "1" if row["baseline"] == row["name"] else _cell(values["ratio"], lambda v: f"{v:.2f}", "x")
            line += [_cell(values["tokens_per_second"]), ours]
        if text:
            line.append(_text(row["same_tokens"], row["compared_tokens"]))
        cells.append(line)
    return _grid(heads + ["text"] * text, cells, markdown)


def _text(same: int, compared: int) -> str:
    return "the same" if same == compared else f"other from token {same + 1}"


def _resources(rows: Sequence[Mapping[str, Any]], markdown: bool) -> str:
    heads = ["start and memory", "first start s", "start s", "peak MB", "MB a token", "GB/s", "of", "share"]
    cells = [
        [
            _label(row),
            _digits(row["first_start_seconds"]),
            _cell(row["start_seconds"]),
            _cell(row["peak_memory_megabytes"]),
            _digits(row["megabytes_per_token"]),
            _cell(row["gb_per_second"]),
            _cell(row["bandwidth_gb_per_second"]),
            _cell(row["bandwidth_share"], _percent),
        ]
        for row in rows
    ]
    return _grid(heads, cells, markdown)


def heading(report: Mapping[str, Any]) -> str:
    machine, settings = report["machine"], report["settings"]
    threads, rounds = (f"{settings[key]} {key if settings[key] != 1 else key[:-1]}" for key in ("threads", "rounds"))
    return f"{Path(settings['model']).name} on {threads} of {machine['processor']}, {rounds} of fresh processes in turn"


def tables(report: Mapping[str, Any], *, markdown: bool = False) -> str:
    """Everything as text: what was measured on what, speeds and ratios, start and memory, the fastest peers, what is missing."""
    rows, chosen = sorted(report["rows"], key=lambda row: _group_order(row["group"])), report["settings"]["workloads"]
    parts = [heading(report)]
    for kind in ("decode", "total", "prefill"):
        if names := [name for name in chosen if WORKLOADS[name].rate == kind]:
            parts.append(_speeds(rows, names, markdown, text="decode" in names))
    parts.append(_resources(rows, markdown))
    if report["fastest"]:
        cells = [
            [
                f["group"],
                WORKLOADS[f["workload"]].title,
                f["peer"].replace(":", " ", 1),
                _cell(f["ratio"], lambda v: f"{v:.2f}", "x"),
            ]
            for f in report["fastest"]
        ]
        parts.append(_grid(["against the fastest peer", "workload", "peer", "jaxinfer is"], cells, markdown))
    parts.append("\n".join(_notes(report, rows)))
    return "\n\n".join(parts)


def _notes(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    new = {name: min(WORKLOADS[name].new, report["settings"]["tokens"]) for name in report["settings"]["workloads"]}
    lengths = [f"{WORKLOADS[name].title}: {count}" for name, count in new.items() if count > 1]
    notes = [
        "Median (smallest-largest) over the rounds. 'jaxinfer is': its row on the same file, or else of the same precision, as a multiple "
        "of this row's speed."
    ]
    if lengths:
        notes.append(
            f"New tokens of each sequence: {', '.join(lengths)}; batches count all of a call, its short prompts included."
        )
    notes.append("First start: process start to first token in round 1, nothing compiled before; start: in later rounds.")
    notes.append(
        "Peak MB: above what importing took. Share: of the bandwidth ('of') that the same process measured for reading memory."
    )
    if report["text_reference"]:
        notes.append(f"Text: the first {IDS_SHOWN} greedy tokens, beside those of {report['text_reference']}.")
    versions = dict.fromkeys(row["system"] for row in rows)
    notes.append(f"Versions: {'; '.join(versions)}.")
    for kernels in dict.fromkeys(row["kernels"] for row in rows if row["engine"] in (OURS, OURS_ON_XLA)):
        names = [_label(row) for row in rows if row["kernels"] == kernels]
        notes.append(f"Kernels of {', '.join(names)}: {kernels}.")
    notes += [f"Left out: {name}: {why}" for name, why in report["left_out"].items()]
    notes += [f"Failed: {name}: {why.splitlines()[0]}" for name, why in report["failed"].items()]
    return notes


def chart(report: Mapping[str, Any], target: Path) -> None:
    """A PNG: a panel for each workload, a bar for each system, grouped by precision; lines span the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(report["rows"], key=lambda row: _group_order(row["group"]))
    workloads = report["settings"]["workloads"]
    engines = list(dict.fromkeys([OURS, *(row["engine"] for row in rows)]))
    palette = ["#d1495b", "#8d99ae", "#3a6ea5", "#83a95c", "#edae49"]
    colours = {engine: palette[i % len(palette)] for i, engine in enumerate(engines)}
    at, place, ticks = [], 0.0, []
    for i, row in enumerate(rows):
        place += 1.0 if i == 0 or row["group"] == rows[i - 1]["group"] else 1.6  # a gap between precisions
        at.append(place)
        ticks.append(_label(row))
    columns = min(4, len(workloads))
    lines = -(-len(workloads) // columns)
    size = (2.2 + 2.7 * columns, (0.9 + 0.27 * place) * lines + 0.4)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, workload in zip(axes.flat, workloads, strict=False):
        values = [row["workloads"][workload]["tokens_per_second"] for row in rows]
        medians = [v["median"] for v in values]
        errors = [[v["median"] - v["min"] for v in values], [v["max"] - v["median"] for v in values]]
        bars = axis.barh(
            at,
            medians,
            height=0.8,
            color=[colours[row["engine"]] for row in rows],
            xerr=errors,
            error_kw={"lw": 1, "ecolor": "#333333"},
        )
        for bar, value in zip(bars, values, strict=True):
            axis.text(value["max"], bar.get_y() + bar.get_height() / 2, f" {_digits(value['median'])}", va="center", fontsize=7)
        axis.set_title(WORKLOADS[workload].title, fontsize=10)
        axis.set_xlim(0, 1.22 * max(v["max"] for v in values))
        axis.set_yticks(at, ticks, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("tokens a second", fontsize=8)
    axes[0][0].invert_yaxis()  # shared: one turns all
    for axis in axes.flat[len(workloads) :]:
        axis.set_visible(False)
    figure.suptitle(heading(report).replace(", ", "\n" if columns == 1 else ", "), fontsize=9)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)
