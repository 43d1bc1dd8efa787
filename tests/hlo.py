"""Reading compiled programs: which collectives they hold, and which large arrays they copy."""

import re
from collections.abc import Container

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
COLLECTIVES += ("ragged-all-to-all",)
_COPY = re.compile(r"= \(?\w+\[([\d,]*)\]\S* copy(?:-start)?\(")


def collectives(text: str) -> dict[str, int]:
    """Counts by HLO name; an asynchronous one is counted at its start."""
    counts = {name: len(re.findall(rf"= .*? {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {name: n for name, n in counts.items() if n}


def copies(text: str, shapes: Container[tuple[int, ...]]) -> list[str]:
    """Lines that copy an array of one of these shapes."""
    found = []
    for line in text.splitlines():
        copied = _COPY.search(line)
        if copied and tuple(int(n) for n in copied[1].split(",") if n) in shapes:
            found.append(line.strip())
    return found
