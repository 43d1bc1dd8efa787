"""What a user sets about one request: SamplingParams; frozen, checked once, from Python or from JSON."""

import dataclasses
import difflib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Self

from jaxinfer.config import MAX_TOP_LOGPROBS, is_number
from jaxinfer.errors import SamplingParamsError

# Sizes of arrays, which are the same for every request.
MAX_LOGIT_BIAS = 128  # tokens
MAX_BAD_WORDS = 128  # token sequences; a string is two, with and without a space before it
MAX_BAD_WORD_TOKENS = 16  # of each
MAX_SAMPLES = 128  # of one prompt

_SEED_STEP = (
    0x9E3779B9  # odd, so that 2**32 samples have seeds of their own; near 2**32 over the golden ratio, so that they lie apart
)

LogitsProcessor = Callable[[Any, Any, Any], Any]


class TokenBias(Mapping[int, float]):
    """A mapping token id -> bias that nobody changes any more, and that may be hashed."""

    def __init__(self, values: Mapping[int, float] = {}):
        self._values = dict(values)

    def __getitem__(self, token: int) -> float:
        return self._values[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, when it ends, and what is reported about it.

    Each token comes from the model's logits through these, in this order, that of transformers: repetition_penalty; presence_penalty and
    frequency_penalty; no_repeat_ngram_size; bad_words; min_tokens; logit_bias; logits_processor; temperature; top_k; top_p; min_p.

    repetition_penalty: logits of tokens of the prompt and of the text so far are divided by it where positive, multiplied where negative;
    1 is off. presence_penalty, frequency_penalty: what is taken off the logits of tokens of the text so far, once, and for each time
    that they occur; -2 to 2, 0 is off. no_repeat_ngram_size: no sequence of so many tokens occurs twice in prompt and text; 0 is off.
    bad_words: strings or sequences of token ids that must not occur; the last token of one is forbidden where its others stand. A
    string stands for the tokens that it has with and without a space before it; text that is put together from other tokens is not
    seen. logit_bias: {token id: -100 to 100}, added to logits. logits_processor: a function (logits float32 [V], tokens int32 [S],
    length int32) -> float32 [V] that jax can trace; tokens are those of prompt and text, then V from `length` on; S differs from call
    to call. The function is compiled into the program: keep one and pass it again.

    temperature: 0 takes the most likely token. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. seed: the same seed draws the same
    tokens in any batch and on any mesh. n: samples to report; sample i is drawn with the seed (seed + i * 2654435769) mod 2**32.
    best_of: samples to draw, at least n (by default as many), of which those of the highest mean log-probability are reported, the
    best one first.

    max_tokens: new tokens at most; None is as many as inference_max_tokens leaves. min_tokens: before so many, nothing ends the text.
    stop: strings that end the text and are not part of it. stop_token_ids: besides the model's own end tokens. ignore_eos: do not end
    at the model's end tokens.

    logprobs: alternatives to report per token besides the chosen one; None reports nothing. prompt_logprobs: the same for the tokens
    of the prompt. Log-probabilities are of the model's logits as they are, before all of the above. echo: put the prompt's text and
    tokens before the new ones.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = TokenBias()
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    min_tokens: int = 0
    n: int = 1
    best_of: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self):
        for name in ("stop", "stop_token_ids", "bad_words"):
            value = getattr(self, name)
            several = isinstance(value, Iterable) and not isinstance(value, str)
            self._set(name, tuple(value) if several else (value,))
        self._set("bad_words", tuple(tuple(w) if isinstance(w, list | tuple) else w for w in self.bad_words))
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingParamsError(f"logit_bias is {self.logit_bias!r}; give a dict of token ids and numbers")
        self._set("logit_bias", TokenBias(self.logit_bias))
        self._check_ranges()
        self._check_together()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_ranges(self) -> None:
        def whole(value: Any, low: int, high: int | None = None) -> bool:
            return type(value) is int and low <= value and (high is None or value <= high)

        def number(value: Any, low: float, high: float) -> bool:
            return is_number(value) and low <= value <= high

        most = f"None, or 0 to {MAX_TOP_LOGPROBS}"
        processor = self.logits_processor
        checks = {
            "max_tokens": (self.max_tokens is None or whole(self.max_tokens, 1), "at least 1, or None"),
            "min_tokens": (whole(self.min_tokens, 0), "0 or more"),
            # what float32 divides logits by without reaching infinity or NaN
            "temperature": (
                number(self.temperature, 0, 0) or number(self.temperature, 1e-4, 1e4),
                "0 (greedy) or more, 0.0001 to 10000",
            ),
            "top_k": (whole(self.top_k, 0, 2**31 - 1), "0 (off) or more"),
            "top_p": (is_number(self.top_p) and 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            "min_p": (is_number(self.min_p) and 0 <= self.min_p < 1, "0 (off) or more, below 1"),
            "seed": (whole(self.seed, 0, 2**32 - 1), "a whole number from 0 to 4294967295"),
            "n": (whole(self.n, 1, MAX_SAMPLES), f"1 to {MAX_SAMPLES}"),
            "best_of": (self.best_of is None or whole(self.best_of, 1, MAX_SAMPLES), f"None, or 1 to {MAX_SAMPLES}"),
            "stop": (all(isinstance(s, str) and s for s in self.stop), "strings that are not empty"),
            "stop_token_ids": (all(whole(t, 0) for t in self.stop_token_ids), "token ids"),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "True or False"),
            "echo": (isinstance(self.echo, bool), "True or False"),
            "logprobs": (self.logprobs is None or whole(self.logprobs, 0, MAX_TOP_LOGPROBS), most),
            "prompt_logprobs": (self.prompt_logprobs is None or whole(self.prompt_logprobs, 0, MAX_TOP_LOGPROBS), most),
            "repetition_penalty": (number(self.repetition_penalty, 0.01, 100), "0.01 to 100; 1 is off"),
            "presence_penalty": (number(self.presence_penalty, -2, 2), "-2 to 2; 0 is off"),
            "frequency_penalty": (number(self.frequency_penalty, -2, 2), "-2 to 2; 0 is off"),
            "no_repeat_ngram_size": (whole(self.no_repeat_ngram_size, 0, 2**31 - 1), "0 (off) or more"),
            "logit_bias": (
                all(whole(t, 0) and number(b, -100, 100) for t, b in self.logit_bias.items()),
                "token ids with numbers from -100 to 100",
            ),
            "bad_words": (
                all(w if isinstance(w, str) else w and all(whole(t, 0) for t in w) for w in self._bad_words()),
                "strings and sequences of token ids that are not empty",
            ),
            "logits_processor": (
                processor is None or (callable(processor) and isinstance(processor, Hashable)),
                "a function of logits, tokens and length",
            ),
        }
        for name, (good, limit) in checks.items():
            if not good:
                raise SamplingParamsError(f"{name} is {getattr(self, name)!r}; give {limit}")

    def _bad_words(self) -> Iterator[str | tuple]:
        """What is neither a string nor a sequence comes as an empty one."""
        return (w if isinstance(w, str | tuple) else () for w in self.bad_words)

    def _check_together(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise SamplingParamsError(f"logit_bias has {len(self.logit_bias)} tokens; at most {MAX_LOGIT_BIAS} are possible")
        check_bad_words([word for word in self.bad_words if not isinstance(word, str)])
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                f"min_tokens is {self.min_tokens}, max_tokens is {self.max_tokens}; lower the one or raise the other"
            )
        if self.best_of is not None and self.best_of < self.n:
            raise SamplingParamsError(f"best_of is {self.best_of}, n is {self.n}; draw at least as many as are reported")
        if self.samples > 1 and self.temperature == 0:
            name = "n" if self.n > 1 else "best_of"
            raise SamplingParamsError(
                f"{name} is {getattr(self, name)} at temperature 0, where all samples are the same; raise temperature"
            )

    @property
    def samples(self) -> int:
        """Sequences that are drawn."""
        return self.best_of or self.n

    def sample(self, index: int) -> "SamplingParams":
        """The parameters of one of the samples: a request for one sequence, with a seed of its own.

        The log-probabilities of the prompt are the same for all: the first sample alone reports them.
        """
        return dataclasses.replace(
            self,
            n=1,
            best_of=None,
            seed=(self.seed + index * _SEED_STEP) % 2**32,
            logprobs=0 if self.logprobs is None and self.best_of else self.logprobs,
            prompt_logprobs=None if index else self.prompt_logprobs,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From what JSON holds: lists for tuples, and token ids of logit_bias as strings. Raises SamplingParamsError."""
        if not isinstance(values, Mapping):
            raise SamplingParamsError(f"sampling parameters are a dict or a JSON object, got {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
                raise SamplingParamsError(f"sampling parameters have no {key!r}{hint}")
        values = dict(values)
        if isinstance(bias := values.get("logit_bias"), Mapping):
            values["logit_bias"] = {_token_of(key): value for key, value in bias.items()}
            if len(values["logit_bias"]) < len(bias):
                raise SamplingParamsError(f"logit_bias is {dict(bias)!r}; give each token once")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes, ready for JSON. Raises SamplingParamsError for a logits_processor, which is no data."""
        if self.logits_processor is not None:
            raise SamplingParamsError(
                f"logits_processor is {self.logits_processor!r}: a function has no JSON form; leave it out"
            )
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "stop": list(self.stop),
            "stop_token_ids": list(self.stop_token_ids),
            "bad_words": [word if isinstance(word, str) else list(word) for word in self.bad_words],
            "logit_bias": {str(token): bias for token, bias in self.logit_bias.items()},
        }


def _token_of(key: Any) -> Any:
    """The token id that a JSON key writes; anything else as it is, to be refused."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def check_bad_words(words: list[tuple[int, ...]]) -> None:
    """Raise SamplingParamsError for more sequences, or longer ones, than the arrays hold."""
    if len(words) > MAX_BAD_WORDS:
        raise SamplingParamsError(f"bad_words are {len(words)} token sequences; at most {MAX_BAD_WORDS} are possible")
    if long := next((word for word in words if len(word) > MAX_BAD_WORD_TOKENS), None):
        raise SamplingParamsError(
            f"bad_words holds {list(long)} of {len(long)} tokens; at most {MAX_BAD_WORD_TOKENS} are possible"
        )
