"""Special tokens in somebody's text, written so that a tokenizer takes them for the text that they are.

A tokenizer looks for special tokens before anything else, so "<|im_end|>" typed by a user would end the user's turn. Here the first
character of each is replaced by a stand-in, a private-use character, and a tokenizer is used whose first normaliser puts the
characters back, which comes after that search. So nothing else changes: no piece is cut differently, and all other ids are exactly
those of the text as it is.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_FIRST, _LAST, _STEP = 0x100000, 0x10FF00, 0x100  # supplementary private use area B


class Disguise:
    """How texts are written for a tokenizer. specials: texts of its special tokens, none empty."""

    def __init__(self, specials: Iterable[str]):
        self._specials = frozenset(specials)
        self.replaced = "".join(sorted({end for text in self._specials for end in (text[0], text[-1])}))
        self._longest = max(map(len, self._specials), default=0)
        self._begins = {text[:n] for text in self._specials for n in range(1, len(text))}
        self._ends = {text[n:] for text in self._specials for n in range(1, len(text))}
        tree = _tree(self._specials)
        self._starts = re.compile("|".join(f"{re.escape(c)}(?={_pattern(rest, shortest=True)})" for c, rest in tree.items()))
        self._whole = re.compile(_pattern(tree, shortest=False))

    def stand_ins(self, texts: Iterable[str]) -> dict[str, str] | None:
        """A character that none of the texts has, for each that is replaced. None where they use all of the private ones."""
        taken = {ord(c) // _STEP for text in texts for c in re.findall(f"[{chr(_FIRST)}-{chr(0x10FFFF)}]", text)}
        for base in range(_FIRST, _LAST, _STEP):
            if base // _STEP not in taken:
                return {c: chr(base + i) for i, c in enumerate(self.replaced)}
        return None

    def places(self, text: str) -> list[int]:
        """Where a character has to be replaced: the first of each special token, and at an edge of the text one of what may be a
        part of a special token, that the neighbouring text might complete."""
        if not self._specials:
            return []
        found = {match.start() for match in self._starts.finditer(text)}
        near = range(1, min(self._longest, len(text) + 1))
        found.update(len(text) - n for n in near if text[len(text) - n :] in self._begins)
        found.update(n - 1 for n in near if text[:n] in self._ends)
        return sorted(found)

    def hide(self, text: str, stand_ins: Mapping[str, str]) -> str:
        places = self.places(text)
        if not places:
            return text
        characters = list(text)
        for place in places:
            characters[place] = stand_ins[characters[place]]
        return "".join(characters)

    def visible(self, text: str) -> int:
        """How many special tokens a tokenizer will find in a text, at most."""
        return sum(1 for _ in self._whole.finditer(text)) if self._specials else 0


def _tree(words: Iterable[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}  # a word ends here
    return tree


def _pattern(tree: Mapping[str, Any], *, shortest: bool) -> str:
    """A regular expression for the words of a tree. shortest: is there any; else the longest of several."""
    ends = "" in tree
    if ends and (shortest or len(tree) == 1):
        return ""
    parts = [re.escape(c) + _pattern(rest, shortest=shortest) for c, rest in tree.items() if c]
    text = parts[0] if len(parts) == 1 and not ends else f"(?:{'|'.join(parts)})"
    return f"{text}?" if ends else text
