"""A request on the host: its tokens, its text so far and why it ended; and the results that users get. Imports no jax."""

import dataclasses
import time
from collections.abc import Iterable, Sequence

from jaxinfer.errors import SamplingParamsError
from jaxinfer.sampling_params import SamplingParams, check_bad_words
from jaxinfer.text import StopMatcher, StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One token: its log-probability, and the most likely alternatives as {token id: log-probability}."""

    token_id: int
    logprob: float
    top: dict[int, float]


def token_logprobs(choices, wanted: int | None) -> list[TokenLogprob]:
    """What a request reports of its tokens. choices: a Choice of numpy arrays [n] and [n, top]. wanted: alternatives, None for nothing."""
    if wanted is None:
        return []
    return [
        TokenLogprob(
            token_id=int(token),
            logprob=float(choices.logprob[i]),
            top={int(t): float(p) for t, p in zip(choices.top_ids[i, :wanted], choices.top_logprobs[i, :wanted], strict=True)},
        )
        for i, token in enumerate(choices.token)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of wall time. prefill: the call that read this prompt, until its first token. decode: from then to the last token."""

    prefill_seconds: float
    decode_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What a request produced.

    text: without special tokens, cut before a stop string ("" without a tokenizer). token_ids: all new tokens, an end token included;
    with echo, those of the prompt before them, and its text before the new one. finish_reason: "stop" (an end token or a stop string) or
    "length". logprobs: one entry a new token where asked for. prompt_logprobs: one a token of the prompt where asked for, None for the
    first. cumulative_logprob: sum over the new tokens, where logprobs or best_of was asked for. alternatives: the other n - 1 samples, in
    the order of their seeds, or with best_of from the best to the worst; what is said of the prompt is said in the first result only.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    timings: Timings
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cumulative_logprob: float | None = None
    alternatives: "list[GenerationResult]" = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of a stream: text that is final, the tokens that came with it, and in the last piece the whole result."""

    text: str
    token_ids: list[int]
    result: GenerationResult | None


class Request:
    """One sequence from prompt to result. `push` takes new tokens in order and says what became final.

    params: of this sequence, see `for_model`. limit: new tokens at most. stop_tokens: that end it. asked: what the user asked for, where
    this is one of several samples. source: the request that this is a sample of; those of one may share what was read. held: kept for as
    long as the request is there. prompt_logprobs: to be set by whoever read the prompt, where asked for.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        limit: int,
        stop_tokens: tuple[int, ...],
        tokenizer: Tokenizer | None,
        asked: SamplingParams | None = None,
        source: "Request | None" = None,
        held: object = None,
    ):
        self.prompt, self.params, self.limit, self.stop_tokens = prompt, params, limit, stop_tokens
        self.tokenizer, self.asked, self.source, self.held = tokenizer, asked or params, source, held
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self._logprobs: list[TokenLogprob] = []
        self._pieces: list[str] = []
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._matcher = StopMatcher(params.stop) if params.stop else None
        self.prefill_seconds, self._first, self._last = 0.0, 0.0, 0.0

    def push(self, tokens: list[int], logprobs: list[TokenLogprob]) -> Delta:
        """Take new tokens up to the one that ends the request; later ones are dropped."""
        echo = self.prompt if self.params.echo and not self.token_ids else []
        # read by the decoder that goes on with the new tokens: a character may begin in the prompt and end in the text
        text = self._decoder.push(echo) if self._decoder else ""
        taken: list[int] = []
        for i, token in enumerate(tokens):
            taken.append(token)
            if self.params.logprobs is not None:
                self._logprobs.append(logprobs[i])
            if token in self.stop_tokens:
                self.finish_reason = "stop"
            elif len(self.token_ids) + len(taken) >= self.limit:
                self.finish_reason = "length"
            ended = token in self.stop_tokens
            text += self._advance(
                [] if ended else [token], len(self.token_ids) + len(taken), last=self.finish_reason is not None
            )
            if self.finish_reason:
                break
        self.token_ids += taken
        self._pieces.append(text)
        self._last = time.perf_counter()
        self._first = self._first or self._last
        return Delta(text=text, token_ids=[*echo, *taken], result=self.result() if self.finish_reason else None)

    def _advance(self, tokens: list[int], count: int, last: bool) -> str:
        """What became final with new tokens, up to the one of number `count`."""
        if self._decoder is None:
            return ""
        text = self._decoder.push(tokens) + (self._decoder.flush() if last else "")
        if self._matcher is None or count <= self.params.min_tokens:
            return text
        text, hit = self._matcher.push(text)
        if hit:
            self.finish_reason = "stop"
        elif last:
            text += self._matcher.flush()
        return text

    @property
    def mean_logprob(self) -> float:
        """Of the new tokens; 0 where their log-probabilities are not known."""
        return sum(entry.logprob for entry in self._logprobs) / max(1, len(self._logprobs))

    def result(self) -> GenerationResult:
        known = self.params.logprobs is not None
        return GenerationResult(
            text="".join(self._pieces),
            token_ids=[*(self.prompt if self.params.echo else ()), *self.token_ids],
            finish_reason=self.finish_reason or "length",
            prompt_token_ids=list(self.prompt),
            logprobs=list(self._logprobs) if self.asked.logprobs is not None else None,
            timings=Timings(prefill_seconds=self.prefill_seconds, decode_seconds=self._last - self._first),
            prompt_logprobs=self.prompt_logprobs,
            cumulative_logprob=sum(entry.logprob for entry in self._logprobs) if known else None,
        )


def expand(request: Request) -> list[Request]:
    """The sequences that a request stands for: itself, or one for each sample of n or best_of, to be run in any order."""
    params = request.params
    if params.samples == 1 and params.best_of is None:
        return [request]
    return [
        Request(
            request.prompt,
            params.sample(i),
            limit=request.limit,
            stop_tokens=request.stop_tokens,
            tokenizer=request.tokenizer,
            asked=params,
            source=request,
            held=request.held,
        )
        for i in range(params.samples)
    ]


def collect(requests: Sequence[Request]) -> GenerationResult:
    """The result of a request from those of its sequences, in the order of `expand`."""
    asked, prompt = requests[0].asked, requests[0].prompt_logprobs
    if asked.best_of is not None:
        requests = sorted(requests, key=lambda request: request.mean_logprob, reverse=True)[: asked.n]
    best, *others = (dataclasses.replace(request.result(), prompt_logprobs=None) for request in requests)
    return dataclasses.replace(best, prompt_logprobs=prompt, alternatives=others)


def for_model(params: SamplingParams, *, vocab: int, tokenizer: Tokenizer | None, max_logprobs: int) -> SamplingParams:
    """The same parameters with bad words as token ids. Raises SamplingParamsError for what this model or engine cannot do."""
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > max_logprobs:
            raise SamplingParamsError(
                f"{name} is {getattr(params, name)}, the engine's max_logprobs is {max_logprobs}; ask for fewer, or raise it "
                "in the configuration"
            )
    if params.stop and tokenizer is None:
        raise SamplingParamsError("stop strings need a tokenizer; use stop_token_ids")
    words = _bad_word_ids(params.bad_words, tokenizer)
    _check_vocab("stop token {} never comes", params.stop_token_ids, vocab)
    _check_vocab("logit_bias holds token {}", params.logit_bias, vocab)
    _check_vocab("bad_words holds token {}", (token for word in words for token in word), vocab)
    return dataclasses.replace(params, bad_words=words)


def _check_vocab(what: str, tokens: Iterable[int], vocab: int) -> None:
    for token in tokens:
        if token >= vocab:
            raise SamplingParamsError(f"{what.format(token)}; the vocabulary has 0 to {vocab - 1}")


def _bad_word_ids(words: Sequence[str | tuple[int, ...]], tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """Each word once; a string as the tokens that it has alone and those that it has after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if isinstance(word, str):
            if tokenizer is None:
                raise SamplingParamsError(f"bad_words holds {word!r}, and the checkpoint has no tokenizer; give token ids")
            bare = word.removeprefix(" ")
            forms = [tuple(tokenizer.encode(text, add_special=False)) for text in (bare, f" {bare}")]
            found |= dict.fromkeys(form for form in forms if form)
        else:
            found[word] = None
    check_bad_words(list(found))
    return tuple(found)


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
