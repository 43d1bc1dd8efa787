"""A request on the host: its tokens, its text so far and why it ended; and the results that users get. Imports no jax."""

import dataclasses
import time

from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text import StopMatcher, StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One chosen token: its log-probability, and the most likely alternatives as {token id: log-probability}."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of wall time. prefill: the call that read this prompt, until its first token. decode: from then to the last token."""

    prefill_seconds: float
    decode_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What a request produced.

    text: without special tokens, cut before a stop string ("" without a tokenizer). token_ids: all new tokens, an end token included.
    finish_reason: "stop" (an end token or a stop string) or "length". logprobs: one entry a token where asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    timings: Timings

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of a stream: text that is final, the tokens that came with it, and in the last piece the whole result."""

    text: str
    token_ids: list[int]
    result: GenerationResult | None


class Request:
    """One sequence from prompt to result. `push` takes new tokens in order and says what became final."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        limit: int,
        stop_tokens: tuple[int, ...],
        tokenizer: Tokenizer | None,
    ):
        self.prompt, self.params, self.limit, self.stop_tokens = prompt, params, limit, stop_tokens
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._logprobs: list[TokenLogprob] = []
        self._pieces: list[str] = []
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._matcher = StopMatcher(params.stop) if params.stop else None
        self.prefill_seconds, self._first, self._last = 0.0, 0.0, 0.0

    def push(self, tokens: list[int], logprobs: list[TokenLogprob]) -> Delta:
        """Take new tokens up to the one that ends the request; later ones are dropped."""
        text, taken = "", []
        for i, token in enumerate(tokens):
            taken.append(token)
            if self.params.logprobs is not None:
                self._logprobs.append(logprobs[i])
            if token in self.stop_tokens:
                self.finish_reason = "stop"
            elif len(self.token_ids) + len(taken) >= self.limit:
                self.finish_reason = "length"
            ended = token in self.stop_tokens
            text += self._advance([] if ended else [token], last=self.finish_reason is not None)
            if self.finish_reason:
                break
        self.token_ids += taken
        self._pieces.append(text)
        self._last = time.perf_counter()
        self._first = self._first or self._last
        return Delta(text=text, token_ids=taken, result=self.result() if self.finish_reason else None)

    def _advance(self, tokens: list[int], last: bool) -> str:
        if self._decoder is None:
            return ""
        text = self._decoder.push(tokens) + (self._decoder.flush() if last else "")
        if self._matcher is None:
            return text
        text, hit = self._matcher.push(text)
        if hit:
            self.finish_reason = "stop"
        elif last:
            text += self._matcher.flush()
        return text

    def result(self) -> GenerationResult:
        return GenerationResult(
            text="".join(self._pieces),
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason or "length",
            prompt_token_ids=list(self.prompt),
            logprobs=list(self._logprobs) if self.params.logprobs is not None else None,
            timings=Timings(prefill_seconds=self.prefill_seconds, decode_seconds=self._last - self._first),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """A scored prompt. logprobs: one per token, None for the first. greedy_token_ids: the most likely token at each place, likewise."""

    token_ids: list[int]
    logprobs: list[float | None]
    greedy_token_ids: list[int | None]

    @property
    def total_logprob(self) -> float:
        """Sum over all tokens but the first."""
        return sum(p for p in self.logprobs if p is not None)
