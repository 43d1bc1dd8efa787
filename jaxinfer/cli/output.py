"""What commands print: results on stdout; progress and remarks on stderr. Bars and colours are for terminals only."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Progress = Callable[[int, int, str], None]

_COLOURS = {"bold": "1", "dim": "2", "red": "1;31", "green": "32", "yellow": "33"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO) -> str:
    """The text in a colour, where the stream is a terminal and the user did not set NO_COLOR."""
    return text if os.environ.get("NO_COLOR") or not is_terminal(stream) else f"\033[{_COLOURS[colour]}m{text}\033[0m"


def visible(text: str, stream: TextIO) -> str:
    """The text, with control characters written out where the stream is a terminal, which would obey them."""
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text) if is_terminal(stream) else text


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any, *, pretty: bool = True) -> None:
    """A JSON value on stdout: over several lines, or as one line of JSON Lines."""
    # ASCII, so that it arrives whatever the encoding of stdout is
    print(json.dumps(value, indent=2 if pretty else None), flush=True)


def print_fields(fields: Mapping[str, Any] | Sequence[tuple[str, Any]], stream: TextIO | None = None) -> None:
    """Labels and values in two columns; further lines of a value are indented below its first."""
    stream = stream or sys.stdout
    pairs = list(fields.items() if isinstance(fields, Mapping) else fields)
    width = max(len(label) for label, _ in pairs) + 2
    for label, value in pairs:
        text = str(value).replace("\n", "\n" + " " * width)
        print(f"{paint(label.ljust(width), 'bold', stream)}{text}", file=stream)


def format_bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, "TB"
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def format_spread(spread: Mapping[str, float], factor: float, digits: int = 2) -> str:
    """The median, with the least and the most, each times a factor."""
    median, least, most = (spread[key] * factor for key in ("median", "min", "max"))
    return f"{median:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    print(f"\n{paint(title, 'bold', sys.stdout)}")
    for line in [heads, *rows]:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def short_name(source: str) -> str:
    """The last part of a path or hub id, which leaves room on the line."""
    return Path(source).name or source


@contextlib.contextmanager
def work(doing: str, done: str | None = None, *, in_bytes: bool = False) -> Iterator[Progress]:
    """Long work, shown on stderr: on a terminal a bar that vanishes at the end, else a line at the start and one at the end.

    Gives progress(done, total, name), which may be called or not. done: what the last line says; without it there are no lines.
    in_bytes: what is counted; a name of "download" always counts bytes.
    """
    if is_terminal(sys.stderr):
        with _bar(doing, in_bytes) as progress:
            yield progress
        return
    start = time.perf_counter()
    if done:
        note(f"{doing} ...")
    yield lambda done, total, name: None
    if done:
        note(f"{done} in {time.perf_counter() - start:.1f} s")


@contextlib.contextmanager
def _bar(doing: str, in_bytes: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(24)]
    columns += [TextColumn("{task.fields[amount]}"), TimeElapsedColumn()]
    # stdout stays as it is: text that is printed meanwhile is the result, not part of the display
    with Bars(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bars:
        task = bars.add_task(doing, total=None, amount="")

        def progress(done: int, total: int, name: str) -> None:
            counts_bytes = in_bytes or name == "download"
            amount = f"{format_bytes(done)} of {format_bytes(total)}" if counts_bytes else f"{done} of {total}"
            description = "downloading" if name == "download" else doing
            bars.update(task, description=description, completed=done, total=total, amount=amount)

        yield progress
