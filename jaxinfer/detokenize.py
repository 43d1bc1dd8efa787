"""Text from token ids that arrive a few at a time: how the decoders of tokenizer.json are followed incrementally.

Each class takes ids through `push` and gives text that no later id can change; `flush` gives the rest. All that a class gives,
put together, equals decoding all ids at once.
"""

import codecs
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
# Decoders that look at no more than the token at hand, its predecessor, and whether it is the first.
_LOCAL = {"BPEDecoder", "ByteFallback", "Fuse", "Metaspace", "WordPiece"}


class Pieces(Protocol):
    """What StreamDecoder needs of a way to put text together."""

    def push(self, ids: Iterable[int]) -> str: ...
    def flush(self) -> str: ...


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from U+0100 on (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class BytePieces:
    """Byte-level vocabularies: each token is a string of bytes, and text is their UTF-8."""

    def __init__(self, id_to_token: Callable[[int], str | None], skipped: frozenset[int]):
        self._id_to_token, self._skipped = id_to_token, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def _bytes(self, id: int) -> bytes:
        token = self._id_to_token(id) or ""
        try:
            return bytes(_byte_of()[c] for c in token)
        except KeyError:  # an added token in plain text
            return token.encode()

    def push(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(self._bytes(i) for i in ids if i not in self._skipped))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class SegmentPieces:
    """Vocabularies whose tokens are whole text: SentencePiece, WordPiece, BPE with word ends.

    Ids are cut into segments: a token, or a run of byte tokens, which only its end makes final: the library turns a whole run
    into U+FFFD if any of it is not UTF-8. Decoding a segment after the one before it, and dropping that one's text, keeps the
    spaces between words and costs the same at any length.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        id_to_token: Callable[[int], str | None],
        skipped: frozenset[int],
        byte_fallback: bool,
    ):
        self._decode, self._id_to_token, self._skipped = decode, id_to_token, skipped
        self._byte_fallback = byte_fallback
        self._before: list[int] = []
        self._run: list[int] = []

    def _segment(self, segment: list[int]) -> str:
        before, self._before = self._before, segment
        return self._decode(before + segment)[len(self._decode(before)) :]

    def push(self, ids: Iterable[int]) -> str:
        out = []
        for i in ids:
            token = self._id_to_token(i)
            if token is None or i in self._skipped:
                continue  # decoding drops them too; as a predecessor they would hide the real one
            if self._byte_fallback and _BYTE_TOKEN.fullmatch(token):
                self._run.append(i)
            else:
                out.append(self._end_run())
                out.append(self._segment([i]))
        return "".join(out)

    def _end_run(self) -> str:
        run, self._run = self._run, []
        return self._segment(run) if run else ""

    def flush(self) -> str:
        text, self._before = self._end_run(), []
        return text


class WholePieces:
    """Any other decoder: nothing is known to be final before the end."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        self._ids.extend(ids)
        return ""

    def flush(self) -> str:
        ids, self._ids = self._ids, []
        return self._decode(ids)


def choose_pieces(
    decoder: Mapping[str, Any] | None,
    *,
    decode: Callable[[list[int]], str],
    id_to_token: Callable[[int], str | None],
    skipped: frozenset[int],
) -> Pieces:
    """The way to follow a `decoder` entry of tokenizer.json (None where it has none).

    skipped: ids that are left out of the text.
    """
    steps = _flatten(decoder)
    kinds = [step["type"] for step in steps]
    if kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}:
        return BytePieces(id_to_token, skipped)
    if all(_is_local(step, "Fuse" in kinds[:n]) for n, step in enumerate(steps)):
        return SegmentPieces(decode, id_to_token, skipped, "ByteFallback" in kinds)
    return WholePieces(decode)


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flatten(part)]
    return [decoder]


def _is_local(step: Mapping[str, Any], fused: bool) -> bool:
    """Whether a step, after Fuse has joined all tokens or before, leaves earlier text as it was when a token is added."""
    if not fused:
        return step["type"] in _LOCAL or step["type"] in ("Replace", "Strip")
    if step["type"] == "Replace":  # a longer pattern may lie across tokens
        return len(step["pattern"].get("String", "..")) == 1
    if step["type"] == "Strip":  # what is stripped from the end is known at the end only
        return step["start"] <= 1 and step["stop"] == 0
    return step["type"] == "Fuse"
