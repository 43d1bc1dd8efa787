#!/usr/bin/env python
"""One picture of what scripts/gpu_check.sh measured: FOLDER/kernels.json and FOLDER/decode.json become FOLDER/gpu_check.png.

python scripts/bench/gpu_chart.py build/gpu_check
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def chart(kernels: list[dict[str, Any]], decode: dict[str, Any], target: Path) -> None:
    """A PNG: kernels as percent of the card's peak, or times of XLA where no peak is known, and tokens a second of decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = [row for row in kernels if "percent_of_peak" in row]
    rows = known or [row for row in kernels if "xla" in row["beside"]]
    values = [row["percent_of_peak"] if known else row["beside"]["xla"] / row["seconds"] for row in rows]
    height = 1.5 + 0.2 * max(len(rows), 6)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, height), width_ratios=(3, 1), layout="constrained")
    left.barh([f"{row['op']}: {row['case']}" for row in rows], values, color="#3a6ea5")
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=6)
    left.set_xlabel("percent of the data sheet's bandwidth or operations" if known else "times as fast as XLA", fontsize=8)
    bars = right.bar(
        [row["form"] for row in decode["rows"]], [row["tokens_per_second"] for row in decode["rows"]], color="#d1495b"
    )
    right.bar_label(bars, fmt="%.0f", fontsize=8)
    for i, row in enumerate(decode["rows"]):
        if row["ceiling"] is not None:
            right.hlines(row["ceiling"], i - 0.4, i + 0.4, colors="#333333", linestyles="dotted")
    right.set_ylabel("tokens a second, one sequence; dotted: the ceiling", fontsize=8)
    name = f"{decode['device']}, jax {decode['jax']}"
    figure.suptitle(f"dry run on {name}: these numbers say nothing" if decode["dry_run"] else name, fontsize=10)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(arguments).folder
    try:
        kernels, decode = (json.loads((folder / name).read_text()) for name in ("kernels.json", "decode.json"))
    except (OSError, ValueError) as error:
        parser.error(f"{folder} has not what scripts/gpu_check.sh writes: {error}")
    try:
        chart(kernels, decode, folder / "gpu_check.png")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print('no picture is drawn without matplotlib: pip install "jaxinfer[bench]"', file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
