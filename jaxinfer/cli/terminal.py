"""Reading what a person types: line editing and history through readline, several lines, Ctrl-C and Ctrl-D."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from jaxinfer.cli.output import is_terminal, paint

QUOTES = '"""'
HISTORY_LINES = 1000
PROMPT, CONTINUED = "> ", ". "

Read = Callable[[str], str]


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # a Python that was built without it: lines are read as the terminal gives them
        return None
    return readline


@contextlib.contextmanager
def line_editing(words: Sequence[str], history: Path | None) -> Iterator[None]:
    """Tab completes `words` at the start of a line; lines of earlier sessions are kept in the file `history`, for its owner only."""
    readline = _readline()
    if readline is None:
        yield
        return
    completions = lambda text, state: [*(w for w in words if text and w.startswith(text)), None][state]
    readline.set_completer(completions)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    readline.set_history_length(HISTORY_LINES)
    if history is not None:
        with contextlib.suppress(OSError):  # none yet, or not readable: a convenience that is missing
            readline.read_history_file(str(history))
    try:
        yield
    finally:
        if history is not None:
            with contextlib.suppress(OSError):
                history.parent.mkdir(parents=True, exist_ok=True)
                history.touch(mode=0o600)
                readline.write_history_file(str(history))


def read_line(prompt: str) -> str:
    """A line, edited where both ends are a terminal. Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
    if is_terminal(sys.stdout):
        bold = paint(prompt, "bold", sys.stdout)
        # \001 and \002 tell readline what takes no room on the line
        return input(bold.replace("\033[1m", "\001\033[1m\002").replace("\033[0m", "\001\033[0m\002") if _readline() else bold)
    print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for answers, which somebody else reads
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def read_turn(read: Read = read_line) -> str:
    """What a person says: a line, lines that end in a backslash with the one after them, or lines between triple quotes."""
    line = read(PROMPT)
    if line.lstrip().startswith(QUOTES):
        lines = [line.lstrip().removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(read(CONTINUED))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(read(CONTINUED))
    return "\n".join(lines)


def agrees(question: str, read: Read = read_line) -> bool:
    """The answer to a yes or no question; no for anything but yes."""
    try:
        return read(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return False


def open_terminal() -> bool:
    """Whether a person types at the other end of stdin."""
    return sys.stdin is not None and sys.stdin.isatty()
