"""Text to token ids and back: the tokenizer of a checkpoint, decoding while tokens arrive, and stop strings.

Runs on the host and imports no jax.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxinfer.chat import ChatTemplate
from jaxinfer.detokenize import Pieces
from jaxinfer.errors import InvalidTextError, NoTokenizerError, TextError
from jaxinfer.tokenizing import Backend, Fast, Slow, from_transformers

if TYPE_CHECKING:
    from convert.readers.base import TokenizerAssets

__all__ = ["NoTokenizerError", "StopMatcher", "StreamDecoder", "Tokenizer"]

# The keys of tokenizer_config.json that name one token each.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _content(token: object) -> str | None:
    """The text of a special token as configs write it: a string, or a dict with "content"."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


class Tokenizer:
    """The text side of a checkpoint: ids, special tokens and the chat template.

    vocab_size: one more than the largest id that text can become. bos_id: the id that opens a text, or None.
    eos_ids: every id that ends a text, of generation_config.json and of tokenizer_config.json.
    """

    def __init__(self, backend: Backend, config: Mapping[str, Any], generation_config: Mapping[str, Any]):
        self._backend = backend
        named = {key: text for key in _NAMED_TOKENS if (text := _content(config.get(key))) is not None}
        self.vocab_size = backend.size
        self.bos_id = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
        eos = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
        self.eos_ids = self._ending_ids(generation_config.get("eos_token_id"), named.get("eos_token"), eos)
        self._set_special_rule(config, eos)
        self._chat = ChatTemplate(config.get("chat_template"), named)

    @classmethod
    def from_assets(cls, assets: "TokenizerAssets") -> "Tokenizer":
        """Build the tokenizer that a checkpoint brings.

        Reads tokenizer.json where there is one, else lets transformers try the other files of the folder.
        Raises NoTokenizerError where neither works.
        """
        config = dict(assets.config)
        if assets.tokenizer_json is not None:
            return cls(Fast(assets.tokenizer_json, _special_tokens(config)), config, assets.generation_config)
        other = from_transformers(assets.folder)
        config = {**{key: getattr(other, key, None) for key in (*_NAMED_TOKENS, "chat_template")}, **config}
        fast = getattr(other, "backend_tokenizer", None)
        backend = Slow(other) if fast is None else Fast(fast.to_str(), _special_tokens(config))
        return cls(backend, config, assets.generation_config)

    @staticmethod
    def _ending_ids(generation: int | Sequence[int] | None, eos_token: str | None, eos: int | None) -> tuple[int, ...]:
        several = [generation] if isinstance(generation, int) else list(generation or ())
        if eos is not None:
            several.append(eos)
        if eos_token is not None and not several:
            raise TextError(
                f"eos_token {eos_token!r} is not in the vocabulary, so that no text would ever end; "
                "correct tokenizer_config.json, or give eos_token_id in generation_config.json"
            )
        return tuple(dict.fromkeys(several))

    def _set_special_rule(self, config: Mapping[str, Any], eos: int | None) -> None:
        """Decide the ids before and after a text, or that the backend adds its own.

        A stated add_bos_token or add_eos_token decides, as in transformers; what adds other tokens ([CLS], [SEP]) is kept.
        """
        first, last = config.get("add_bos_token"), config.get("add_eos_token")
        own = self._backend.encode("", True)
        self._own_special = (first is None and last is None) or not set(own) <= {self.bos_id, eos}
        self._prefix = [self.bos_id] if not self._own_special and first and self.bos_id is not None else []
        self._suffix = [eos] if not self._own_special and last and eos is not None else []

    def encode(self, text: str, add_special: bool = True, *, special_as_text: bool = False) -> list[int]:
        """Token ids of a text, with the model's own first and last tokens unless add_special is False.

        Never cut, never padded. The text of a special token in `text` becomes that token, or with special_as_text what its characters
        are otherwise. Raises TextError, and InvalidTextError for what is not Unicode.
        """
        if not isinstance(text, str):
            raise TextError(f"a text must be a str, not {type(text).__name__}; token ids need no encoding")
        _check_unicode(text)
        encode = self._backend.encode_as_text if special_as_text else self._backend.encode
        ids = encode(text, add_special and self._own_special)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids; incomplete UTF-8 becomes U+FFFD, ids beyond the vocabulary become nothing.

        Differs from transformers where a config sets clean_up_tokenization_spaces: text is given as the tokens say it.
        """
        ids = [int(i) for i in ids]
        if any(i < 0 for i in ids):
            raise TextError(f"token id {min(ids)} is negative; ids run from 0 to {self.vocab_size - 1}")
        return self._backend.decode(ids, skip_special)

    def chat_text(
        self, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, tools: Sequence[Mapping] | None = None
    ) -> str:
        """A conversation as the text that the model was trained on; see ChatTemplate.checked for messages and tools."""
        return self._chat.render(self._chat.checked(messages, tools), add_generation_prompt=add_generation_prompt)

    def chat_prompt(
        self, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, tools: Sequence[Mapping] | None = None
    ) -> list[int]:
        """Token ids of a conversation. The template writes its own special tokens: none are added a second time.

        The ids are those of `chat_text`, but for special tokens in the words of messages and tools (their strings, roles aside), which
        stay text: "<|im_end|>" in a message ends no turn. Only tokens that the tokenizer calls special are control tokens; others of
        its added ones (such as <think> where that is one) are read in messages too, because models write them.
        Raises NoChatTemplateError, ChatTemplateError or InvalidTextError.
        """
        conversation = self._chat.checked(messages, tools)
        texts = [*conversation.texts()]
        for text in texts:
            _check_unicode(text)
        hidden = self._backend.hidden(texts)
        if hidden is None:
            text = self._chat.render(conversation, add_generation_prompt=add_generation_prompt)
            return self.encode(text, add_special=False)
        text = self._chat.render(conversation.rewritten(hidden.hide), add_generation_prompt=add_generation_prompt)
        _check_unicode(text)
        return hidden.encode(text)

    def pieces(self, skip_special: bool = True) -> Pieces:
        """A fresh state for decoding ids while they arrive; StreamDecoder is its front."""
        return self._backend.pieces(skip_special)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a UTF-16 surrogate pair has no UTF-8 form
        near = text[max(0, error.start - 10) : error.start + 10]
        raise InvalidTextError(
            f"the text is not valid Unicode: it has half of a surrogate pair, {text[error.start]!a}, at {error.start:,} ({near!a}); "
            "decode it with errors='replace', or leave it out"
        ) from error


def _special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Texts of all tokens that a tokenizer_config.json declares special."""
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
    extra = extra.values() if isinstance(extra, Mapping) else extra
    texts = [_content(token) for token in (*(config.get(key) for key in _NAMED_TOKENS), *extra)]
    return [text for text in texts if text is not None]


class StreamDecoder:
    """Decodes ids while they arrive: the texts of all pushes and the flush, put together, are decode(all ids).

    What push gives never changes any more and ends in whole characters. Cost per token does not grow with the text.
    Byte-fallback tokens of SentencePiece vocabularies are given when their run ends; tokenizers without a `tokenizers` form
    give their text at the flush.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._pieces = tokenizer.pieces(skip_special)

    def push(self, ids: Iterable[int]) -> str:
        """Text that became final with these ids; often empty."""
        return self._pieces.push(int(i) for i in ids)

    def flush(self) -> str:
        """The rest, incomplete UTF-8 as U+FFFD. Ends the text: a later push begins a new one."""
        return self._pieces.flush()


class StopMatcher:
    """Cuts a text at the stop string that is complete first (of several at once the longest), however the text is divided.

    stops: one string or several, none empty. `hit` is the stop that was found, or None.
    """

    def __init__(self, stops: str | Iterable[str]):
        self._stops = (stops,) if isinstance(stops, str) else tuple(dict.fromkeys(stops))
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise TextError(f"a stop must be a string of one character or more, not {stop!r}; leave it out")
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that surely comes before any stop, the stop if it was found). After a stop nothing more is given."""
        if self.hit is not None:
            return "", self.hit
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.hit = min(ends)
            self._held = ""
            return text[:at], self.hit
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def flush(self) -> str:
        """What was held back because a stop might have begun; the text has ended."""
        held, self._held = self._held, ""
        return held
