"""What a user sets about one request: SamplingParams; frozen, checked once."""

import dataclasses
from collections.abc import Iterable

from jaxinfer.config import MAX_TOP_LOGPROBS, is_number
from jaxinfer.errors import SamplingParamsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    max_tokens: new tokens at most; None is as many as inference_max_tokens leaves. temperature: 0 takes the most likely token.
    top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. seed: the same seed draws the same tokens in any batch and on any mesh.
    stop: strings that end the text and are not part of it. stop_token_ids: besides the model's own end tokens. ignore_eos: do not end
    at the model's end tokens. logprobs: alternatives to report per token besides the chosen one; None reports nothing.
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

    def __post_init__(self):
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            several = isinstance(value, Iterable) and not isinstance(value, str)
            object.__setattr__(self, name, tuple(value) if several else (value,))
        checks = {
            "max_tokens": (
                self.max_tokens is None or (type(self.max_tokens) is int and self.max_tokens >= 1),
                "at least 1, or None",
            ),
            "temperature": (is_number(self.temperature) and self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (type(self.top_k) is int and self.top_k >= 0, "0 (off) or more"),
            "top_p": (is_number(self.top_p) and 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            "min_p": (is_number(self.min_p) and 0 <= self.min_p < 1, "0 (off) or more, below 1"),
            "seed": (type(self.seed) is int and 0 <= self.seed < 2**32, "a whole number from 0 to 4294967295"),
            "stop": (all(isinstance(s, str) and s for s in self.stop), "strings that are not empty"),
            "stop_token_ids": (all(type(t) is int and t >= 0 for t in self.stop_token_ids), "token ids"),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "True or False"),
            "logprobs": (
                self.logprobs is None or (type(self.logprobs) is int and 0 <= self.logprobs <= MAX_TOP_LOGPROBS),
                f"None, or 0 to {MAX_TOP_LOGPROBS}",
            ),
        }
        for name, (good, limit) in checks.items():
            if not good:
                raise SamplingParamsError(f"{name} is {getattr(self, name)!r}; give {limit}")
