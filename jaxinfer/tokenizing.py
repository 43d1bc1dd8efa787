"""The two libraries behind a Tokenizer: `tokenizers`, and transformers for what has no form for it. Imports no jax."""

import functools
import json
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from jaxinfer.detokenize import Pieces, WholePieces, choose_pieces
from jaxinfer.disguise import Disguise
from jaxinfer.errors import NoTokenizerError, TextError

# Files of vocabularies that transformers knows to read where there is no tokenizer.json.
_VOCABULARIES = ("*.model", "vocab.*", "*.tiktoken", "merges.txt", "tokenizer_config.json")


class Backend(Protocol):
    """What the two libraries behind a Tokenizer have in common."""

    size: int

    def encode(self, text: str, add_special: bool) -> list[int]: ...
    def encode_as_text(self, text: str, add_special: bool) -> list[int]: ...
    def hidden(self, texts: Sequence[str]) -> "Hidden | None": ...
    def decode(self, ids: list[int], skip_special: bool) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def pieces(self, skip_special: bool) -> Pieces: ...


class Hidden(Protocol):
    """Texts that hold special tokens, written so that those are encoded as the text that they are."""

    def hide(self, text: str) -> str: ...
    def encode(self, text: str) -> list[int]: ...


class Fast:
    """A `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer_json: str, special: Iterable[str]):
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception for everything
            raise NoTokenizerError(f"tokenizer.json cannot be read: {error}; download it again or convert anew") from error
        # Sentence encoders ship files that cut at 128 tokens and pad to it: a prompt is never cut or padded here.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._mark_special(special)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._special = [token for token in added.values() if token.special and token.content]
        decoder = self.tokenizer.decoder
        self._decoder = None if decoder is None else json.loads(decoder.__getstate__())
        self._lock = threading.Lock()
        self._last_hidden: HiddenFast | None = None
        self.size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def _mark_special(self, special: Iterable[str]) -> None:
        """Make the tokens that the config names special where tokenizer.json forgot to, keeping how they match."""
        added = {token.content: token for token in self.tokenizer.get_added_tokens_decoder().values()}
        for content in special:
            token = added.get(content)
            if self.tokenizer.token_to_id(content) is None or (token is not None and token.special):
                continue
            token = token or tokenizers.AddedToken(content, normalized=False)
            token.special = True
            self.tokenizer.add_special_tokens([token])

    def encode(self, text: str, add_special: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special).ids

    def encode_as_text(self, text: str, add_special: bool) -> list[int]:
        hidden = self.hidden([text])
        return self.encode(text, add_special) if hidden is None else hidden.encode(hidden.hide(text), add_special)

    @functools.cached_property
    def disguise(self) -> Disguise:
        return Disguise(token.content for token in self._special)

    def hidden(self, texts: Sequence[str]) -> "HiddenFast | None":
        """A way to write these texts, or None where none of them holds a special token: then they are encoded as they are."""
        if not any(self.disguise.places(text) or self._appears(text) for text in texts):
            return None
        stand_ins = self.disguise.stand_ins(texts)
        if stand_ins is None:
            raise TextError(
                "a text uses every private-use character from U+100000 to U+10FFFF beside special tokens; leave them out"
            )
        with self._lock:
            if self._last_hidden is None or self._last_hidden.stand_ins != stand_ins:
                self._last_hidden = HiddenFast(self, stand_ins)
            return self._last_hidden

    def _appears(self, text: str) -> bool:
        """Whether normalising a text brings out a special token that the library looks for after it."""
        late = any(token.normalized for token in self._special) and self.tokenizer.normalizer is not None
        return late and bool(self.disguise.places(self.tokenizer.normalizer.normalize_str(text)))

    def uncover(self, stand_ins: Mapping[str, str]) -> tokenizers.Tokenizer:
        """The same tokenizer for texts with stand-ins; it finds special tokens in the text as given only."""
        out = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        steps = [tokenizers.normalizers.Replace(stand_in, character) for character, stand_in in stand_ins.items()]
        own = out.normalizer
        out.normalizer = tokenizers.normalizers.Sequence([*steps, *([own] if own else [])])
        flags = lambda t: {"single_word": t.single_word, "lstrip": t.lstrip, "rstrip": t.rstrip, "normalized": False}
        out.add_special_tokens([tokenizers.AddedToken(t.content, **flags(t)) for t in self._special if t.normalized])
        return out

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def pieces(self, skip_special: bool) -> Pieces:
        return choose_pieces(
            self._decoder,
            decode=lambda ids: self.decode(ids, skip_special),
            id_to_token=self.tokenizer.id_to_token,
            skipped=self.special_ids if skip_special else frozenset(),
        )


class HiddenFast:
    """Texts for one set of stand-ins, see `Disguise`."""

    def __init__(self, backend: Fast, stand_ins: Mapping[str, str]):
        self.stand_ins = stand_ins
        self._disguise, self._tokenizer = backend.disguise, backend.uncover(stand_ins)
        model = json.loads(self._tokenizer.model.__getstate__())
        unknown = backend.token_to_id(model.get("unk_token") or "")
        self._counted = backend.special_ids - {model.get("unk_id"), unknown}  # what ordinary text may become

    def hide(self, text: str) -> str:
        return self._disguise.hide(text, self.stand_ins)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of a text in which some special tokens are hidden. Raises TextError where the vocabulary finds them nevertheless."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if sum(i in self._counted for i in ids) > self._disguise.visible(text):
            raise TextError("a text holds a special token, and this tokenizer cannot write it as plain text; leave it out")
        return self._tokenizer.encode(text, add_special_tokens=True).ids if add_special else ids


class Slow:
    """A tokenizer that transformers runs in Python and that has no `tokenizers` form."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.size = len(tokenizer)

    def encode(self, text: str, add_special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special))

    def encode_as_text(self, text: str, add_special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special, split_special_tokens=True))

    def hidden(self, texts: Sequence[str]) -> None:
        for token in self.tokenizer.all_special_tokens:
            if any(token in text for text in texts):
                raise TextError(
                    f"a message holds the special token {token!r}, and this tokenizer cannot write it as plain text; leave it out"
                )

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.get_vocab().get(token)

    def pieces(self, skip_special: bool) -> Pieces:
        return WholePieces(lambda ids: self.decode(ids, skip_special))


def from_transformers(folder: Path | None) -> Any:
    """Let transformers read a folder that has vocabulary files of another kind than tokenizer.json."""
    if folder is None or not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        raise NoTokenizerError("the checkpoint has no tokenizer; convert it from a source that has one, or pass token ids")
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice is for users of transformers
        try:
            return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # a missing package, file or class: each raises another type
            raise NoTokenizerError(
                f"{folder} has no tokenizer.json and transformers cannot build a tokenizer from its other files: {error}"
            ) from error
