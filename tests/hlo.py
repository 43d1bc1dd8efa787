"""Reading compiled programs: which collectives they hold, in their loops and outside of them, and which large arrays they copy."""

import re
from collections import Counter
from collections.abc import Container, Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
COLLECTIVES += ("ragged-all-to-all",)
_COPY = re.compile(r"= \(?\w+\[([\d,]*)\]\S* copy(?:-start)?\(")
_GATHER = re.compile(r"= \(?(?:\w+\[[\d,]*\]\S* )*?\w+\[([\d,]*)\]\S*\)? all-gather(?:-start)?\(.*dimensions=\{(\d+)\}")
_NAMED = re.compile(rf"= .*? ({'|'.join(sorted(COLLECTIVES, key=len, reverse=True))})(?:-start)?\(")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")
_LOOP = re.compile(r" while\(.*")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.-]+))")


def collectives(text: str) -> dict[str, int]:
    """Counts by HLO name; an asynchronous one is counted at its start."""
    return dict(Counter(found[1] for line in text.splitlines() if (found := _NAMED.search(line))))


def placed_collectives(text: str) -> tuple[dict[str, int], dict[str, int]]:
    """(in the loops, outside of them): counts by HLO name. A loop is the body and the condition of every `while` with all that they call,
    each counted once."""
    computations, entry = _computations(text)
    loops: set[str] = set()
    for lines in computations.values():
        for line in lines:
            if loop := _LOOP.search(line):
                loops |= _reached(computations, _called(loop[0]))
    # what is called from both sides would be counted on one only
    outside = _reached(computations, [entry], without=loops)
    count = lambda names: collectives("\n".join(line for name in names for line in computations[name]))
    return count(loops), count(outside)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the first one that runs."""
    out: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = out[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line == "}":
            lines = None
        elif lines is not None:
            lines.append(line)
    assert entry, "a module has an entry computation"
    return out, entry


def _called(line: str) -> Iterator[str]:
    for found in _CALLED.finditer(line):
        yield from (name.strip().lstrip("%") for name in (found[1] or found[2]).split(","))


def _reached(computations: dict[str, list[str]], names, without: Container[str] = ()) -> set[str]:
    """These computations and those that they call, directly or not."""
    found: set[str] = set()
    border = list(names)
    while border:
        name = border.pop()
        if name not in found and name not in without:
            found.add(name)
            border += [called for line in computations[name] for called in _called(line)]
    return found


def copies(text: str, shapes: Container[tuple[int, ...]]) -> list[str]:
    """Lines that copy an array of one of these shapes."""
    found = []
    for line in text.splitlines():
        copied = _COPY.search(line)
        if copied and tuple(int(n) for n in copied[1].split(",") if n) in shapes:
            found.append(line.strip())
    return found


def gathered(text: str, shapes: Container[tuple[int, ...]]) -> list[str]:
    """Lines that gather arrays of one of these shapes, one from each device, along one of their dimensions or a new one."""
    found = []
    for line in text.splitlines():
        if gather := _GATHER.search(line):
            whole, axis = [int(n) for n in gather[1].split(",") if n], int(gather[2])
            before, after = tuple(whole[:axis]), tuple(whole[axis + 1 :])
            parts = {(*before, part, *after) for part in range(1, whole[axis]) if whole[axis] % part == 0}
            if any(part in shapes for part in parts | {before + after}):
                found.append(line.strip())
    return found
