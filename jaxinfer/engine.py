"""The engine: what users call. It checks requests, gives them to its scheduler, and hands out what comes back.

The four calls prefill / insert / decode / free are there for those who schedule themselves.
"""

import asyncio
import itertools
import pickle
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self, overload

import numpy as np
from flax import nnx

from jaxinfer import ahead, hf_generate, replacing
from jaxinfer.config import EngineConfig
from jaxinfer.errors import (
    ConfigError,
    EngineStateError,
    NoTokenizerError,
    PromptError,
    SamplingParamsError,
    TokenLimitError,
)
from jaxinfer.generation import Emitted, Prefix, Scores, State
from jaxinfer.loading import parameter_tensors
from jaxinfer.memory import MemoryPlan, bytes_on_a_device, check_positions, explained, free_bytes
from jaxinfer.models.decoder import Decoder, DecoderWeights, LayerWeights
from jaxinfer.placement import Placed, form_of, place
from jaxinfer.programs import Programs
from jaxinfer.quantization import MemoryReport, memory_report
from jaxinfer.requests import Delta, GenerationResult, Request, ScoreResult, collect, expand, for_model
from jaxinfer.sampling import MAX_STOP_TOKENS, NumberedProcessors, SamplingArrays
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduler import Scheduler, Ticket
from jaxinfer.slots import COLLECTIVES, SMALLEST_BUCKET, Slots, bucket, padded
from jaxinfer.stages import StageReport, stage_report, stage_seconds
from jaxinfer.text import Tokenizer
from pallas_kernels.layer_cache import cache_dtype
from sharding.distributed import Channel, channel, fetch, spans_processes
from sharding.mesh import row_shards

SCORE_ROWS = 4

_numbers = itertools.count()  # of engines that several processes share, which make them in one order

_CLOSED = "the engine is closed; make a new one with jaxinfer.init_inference"

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None
Progress = Callable[[int, int, str], None]


def _as_list(prompt) -> Sequence[Any]:
    """Text as it is; arrays and sequences as lists. Raises PromptError for anything else."""
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(prompt, list | tuple | str):
        raise PromptError(f"got {prompt!r} as a prompt; a prompt is text or a list of token ids")
    return prompt


def _is_token(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


class Engine:
    """A placed model that generates. Made by `jaxinfer.init_inference`.

    params: the weights, DecoderWeights of device arrays: the first argument of the pure calls. tokenizer may be None: prompts are
    token ids then. eos_ids: tokens that end a text, besides the tokenizer's. memory_plan: what it takes of each device's memory. placed may
    hold shapes (`placement.placed_shapes`): what checks, prepares and compiles works at once then, and what runs after `provide`.
    """

    def __init__(
        self,
        placed: Placed,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        *,
        eos_ids: Sequence[int] = (),
        memory_plan: MemoryPlan | None = None,
    ):
        check_positions(placed.plan.config, "inference_max_tokens", config.inference_max_tokens)
        if config.engine.int8_across_hosts:
            placed = placed.with_int8_hosts()
        if config.engine.sequence_parallel:
            placed = placed.with_split_tokens()
        self.config, self.tokenizer, self.plan, self.mesh = config, tokenizer, placed.plan, placed.mesh
        self.memory_plan = memory_plan
        self._params: DecoderWeights | None = placed.weights
        dtype = cache_dtype(config.cache_dtype)
        self.eos_ids = tuple(dict.fromkeys((*eos_ids, *(tokenizer.eos_ids if tokenizer else ()))))
        how: dict[str, Any] = {name: getattr(config, name) for name in ("matmul_precision", "kernels", "prefill_chunk")}
        self._programs: Programs | None = Programs(placed, cache_dtype=dtype, **how)
        weights = lambda: self.params
        self._slots = Slots(self._programs, placed.plan, config, weights, data=self.data_shards, memory=memory_plan)
        self._calls: Channel | None = None  # what is asked, where several processes run this engine
        agree: Callable[[Any], Any] | None = None
        if spans_processes(self.mesh):
            number = next(_numbers)
            self._calls, turns = channel(f"calls of engine {number}"), channel(f"turns of engine {number}")
            agree = lambda mine: turns.exchange(mine, lambda said: said[0])
        self._scheduler = Scheduler(self._slots, agree=agree)

    @property
    def params(self) -> DecoderWeights:
        if self._params is None:
            raise EngineStateError(_CLOSED)
        return self._params

    @property
    def stages(self) -> int:
        return self.plan.context.stages

    @property
    def data_shards(self) -> int:
        return row_shards(self.mesh)

    def close(self) -> None:
        """End what runs, and give weights, caches and programs back. Later calls, and requests that ran, raise EngineStateError."""
        self._scheduler.close(_CLOSED)
        self._slots.drop()
        self._params, self._programs = None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def programs(self) -> Programs:
        return self._running()

    def provide(self, weights: DecoderWeights) -> None:
        """The weights of an engine that was made for their shapes."""
        self._params = weights

    def prepare(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> Future[None]:
        """Compile in the background what `generate` needs for these; nothing is run. The result is there when all of it is under way:
        calls then wait for what they need. Raises what `generate` does."""
        _, requests = self._requests(prompts, params)
        samples = [sample for request in requests for sample in expand(request)]
        return ahead.prepare(self._slots, samples)

    def walk(self, found: Callable[[ahead.Need], None]) -> ahead.Walk:
        """A walk through the programs that this engine will need, each given to `found`."""
        return ahead.Walk(self._slots, found)

    def _running(self) -> Programs:
        if self._programs is None:
            raise EngineStateError(_CLOSED)
        return self._programs

    # --- the four calls

    def prefill(
        self,
        params: DecoderWeights,
        tokens,
        lengths,
        sampling: SamplingArrays,
        *,
        top: int = 0,
        prompt: int | None = None,
        processors: NumberedProcessors = (),
        row=None,
    ) -> Prefix:
        """Read prompts and choose their first tokens.

        tokens: int32 [rows, T], padded on the right, T at most inference_max_tokens. lengths: int32 [rows]. sampling: arrays [rows]; with
        row, int32 [sequences], the prompt that each sequence continues, arrays [sequences], which `insert` then has slots for.
        top: alternatives to report; prompt: likewise of the prompts' own tokens, None reports nothing of them; processors: the functions
        that `sampling` numbers (all three static). One program per (rows, T). With D data shards the first rows / D rows are of the first
        one, and so on; a row is then counted within the shard.
        """
        run = self._running().prefill(top, prompt, processors, row is not None)
        return run(params, tokens, lengths, sampling, *([] if row is None else [np.asarray(row, np.int32)]))

    def insert(self, prefix: Prefix, state: State, slots) -> State:
        """Put the sequences of a prefix into slots, int32 [rows], counted within the row's data shard; -1 leaves one out. `state` is
        donated."""
        return self._running().insert()(prefix, state, slots)

    def decode(
        self, params: DecoderWeights, state: State, steps, *, top: int = 0, processors: NumberedProcessors = ()
    ) -> tuple[State, Emitted]:
        """Up to `steps` tokens (an array: one program for any number) for every active slot. `state` is donated.

        top, processors: see `prefill`.
        """
        return self._running().decode(top, processors)(params, state, np.int32(steps))

    def free(self, state: State, slots) -> State:
        """Stop the sequence in a slot: an int, or with D data shards int32 [D], -1 where a shard stops none. `state` is donated."""
        return self._running().free()(state, np.atleast_1d(np.asarray(slots, np.int32)))

    def init_state(self, batch: int, tokens: int | None = None) -> State:
        """A state of `batch` sequences per micro-batch and data shard, so batch * stages slots a shard, all free, each of `tokens` tokens.

        tokens: inference_max_tokens by default. Fewer are faster: attention reads a whole row and masks what is not there yet.
        """
        most = self.config.inference_max_tokens
        tokens = most if tokens is None else tokens
        if not 1 <= batch <= self.config.micro_batch_size:
            raise EngineStateError(f"batch {batch}: micro_batch_size allows 1 to {self.config.micro_batch_size}")
        if not 1 <= tokens <= most:
            raise EngineStateError(f"room for {tokens} tokens: inference_max_tokens allows 1 to {most}")
        return self._running().state(batch, tokens)()

    # --- generation

    @overload
    def generate(self, prompts: str, params: Params = None) -> GenerationResult: ...  # type: ignore[overload-overlap]

    @overload
    def generate(self, prompts: Sequence[int], params: Params = None) -> GenerationResult: ...

    @overload
    def generate(self, prompts: Sequence[Prompt], params: Params = None) -> list[GenerationResult]: ...

    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None
    ) -> list[GenerationResult] | GenerationResult: ...

    @overload
    def generate(self, prompts: Any = None, *, input_ids: Any = None, **keywords: Any) -> Any: ...

    def generate(self, prompts: Any = None, params: Any = None, *, input_ids: Any = None, **keywords: Any) -> Any:
        """Generate for one prompt or a list; strings or token ids. A list gives a list of results in its order.

        With input_ids, or with keywords such as max_new_tokens, as Hugging Face's models do it: see `jaxinfer.hf_generate.generate`.

        params: one for all, or one each. Calls from several threads share the slots. Ctrl-C ends the call and its requests, and leaves the
        engine usable. Raises PromptError, TokenLimitError, SamplingParamsError before anything is compiled.

        Where the mesh has devices of several processes, each of them calls this, and each gets the same tokens and text. The prompts are
        given on all, or on process 0 only and None on the others; what they say otherwise is refused on all.
        """
        if keywords or input_ids is not None:
            if params is not None or (prompts is None) == (input_ids is None):
                raise PromptError(
                    "give prompts and SamplingParams, or input_ids and keywords as transformers has them; not both"
                )
            return hf_generate.generate(self, input_ids if prompts is None else prompts, **keywords)
        single, requests = self._requests(*self._shared(prompts, params))
        arrived: queue.SimpleQueue[Delta | BaseException] = queue.SimpleQueue()
        samples = [expand(request) for request in requests]
        tickets = [Ticket(request=sample, deliver=arrived.put) for part in samples for sample in part]
        try:
            self._scheduler.submit(tickets)
            for _ in tickets:
                _delta(arrived.get())
        finally:
            self._scheduler.cancel(tickets)
        results = [collect(part) for part in samples]
        return results[0] if single else results

    @property
    def module(self) -> Self:
        """The engine itself, for scripts that reach for the module that DeepSpeed's engine wraps."""
        return self

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> hf_generate.ModelOutput:
        """Logits float32 [B, T, V] of whole rows [B, T], padded on either side: `engine(input_ids).logits`.

        attention_mask: 0 where a row is padded. Raises PromptError and TokenLimitError.
        """
        return hf_generate.forward(self._logits, input_ids, attention_mask)

    def _logits(self, prompts: Sequence[list[int]]) -> np.ndarray:
        """float32 [rows, T, V], in sizes that few programs serve."""
        _, ids = self._prompt_ids(prompts)
        rows = bucket(-(-len(ids) // self.data_shards), 1, 1 << 30) * self.data_shards
        tokens, lengths = padded(dict(enumerate(ids)), rows, self._slots.prompt_bucket)
        with self._scheduler.paused(), explained(self.memory_plan):
            return fetch(self._running().forward()(self.params, tokens, lengths))

    def stream(self, prompt: Prompt | None, params: SamplingParams | None = None, *, every: int = 1) -> Iterator[Delta]:
        """Generate for one prompt and give text as it becomes final: whole characters, nothing that a stop string would cut.

        every: tokens decoded between two pieces, at most. Closing the iterator ends the request.
        """
        ticket, arrived = self._ticket(prompt, params, every), queue.SimpleQueue[Delta | BaseException]()
        ticket.deliver = arrived.put
        return self._pieces(ticket, arrived)

    def _pieces(self, ticket: Ticket, arrived: "queue.SimpleQueue[Delta | BaseException]") -> Iterator[Delta]:
        try:
            self._scheduler.submit([ticket])
            delta = None
            while delta is None or delta.result is None:
                delta = _delta(arrived.get())
                yield delta
        finally:
            self._scheduler.cancel([ticket])

    @overload
    async def agenerate(self, prompts: str, params: Params = None) -> GenerationResult: ...  # type: ignore[overload-overlap]

    @overload
    async def agenerate(self, prompts: Sequence[int], params: Params = None) -> GenerationResult: ...

    @overload
    async def agenerate(self, prompts: Sequence[Prompt], params: Params = None) -> list[GenerationResult]: ...

    async def agenerate(self, prompts: Any, params: Params = None) -> list[GenerationResult] | GenerationResult:
        """`generate` for asyncio: many calls run side by side in the engine's slots. Cancelling the task ends its requests."""
        single, requests = self._requests(*self._shared(prompts, params))
        deliver, arrived = _mailbox()
        samples = [expand(request) for request in requests]
        tickets = [Ticket(request=sample, deliver=deliver) for part in samples for sample in part]
        try:
            self._scheduler.submit(tickets)
            for _ in tickets:
                _delta(await arrived.get())
        finally:
            self._scheduler.cancel(tickets)
        results = [collect(part) for part in samples]
        return results[0] if single else results

    def astream(self, prompt: Prompt | None, params: SamplingParams | None = None, *, every: int = 1) -> AsyncIterator[Delta]:
        """`stream` for asyncio. Leaving the loop over it, or cancelling the task, ends the request."""
        return self._apieces(self._ticket(prompt, params, every))

    async def _apieces(self, ticket: Ticket) -> AsyncIterator[Delta]:
        ticket.deliver, arrived = _mailbox()
        try:
            self._scheduler.submit([ticket])
            delta = None
            while delta is None or delta.result is None:
                delta = _delta(await arrived.get())
                yield delta
        finally:
            self._scheduler.cancel([ticket])

    def _ticket(self, prompt: Prompt | None, params: SamplingParams | None, every: int) -> Ticket:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every is {every!r}; give at least 1 token")
        _, [request] = self._requests(*self._shared(None if prompt is None else [prompt], params))
        if request.params.samples > 1:
            raise SamplingParamsError(
                f"n is {request.params.n} and {request.params.samples} samples are drawn; a stream is one of them: use generate"
            )
        [sample] = expand(request)
        return Ticket(request=sample, deliver=lambda _: None, every=every)

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template, ready for the answer.

        messages: dicts with "role" and "content", as OpenAI's. tools: JSON schemas of functions, for templates that know them.
        Raises NoTokenizerError, NoChatTemplateError, ChatTemplateError.
        """
        if self.tokenizer is None:
            raise NoTokenizerError(
                "the checkpoint has no tokenizer, and messages are text; pass one to init_inference, or token ids"
            )
        return self.tokenizer.chat_prompt(messages, tools=tools)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> GenerationResult:
        """The model's answer to a conversation, see `chat_prompt`; to stream it: engine.stream(engine.chat_prompt(messages))."""
        return self.generate([self.chat_prompt(messages, tools=tools)], params)[0]

    def check(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> None:
        """Raise what `generate` would refuse of these, without running anything."""
        self._requests(prompts, params)

    def update_params(self, model: Decoder | nnx.State | Mapping[str, Any]) -> None:
        """Go on with other weights of the same shapes, between two turns of the device; nothing is compiled again.

        model: a Decoder, its nnx.State, or {module path: array or QTensor}. Where devices have room for both, requests go on until the new
        ones are in place; else they wait while layers are replaced one by one. Requests that are running go on with the new weights.
        Raises MissingTensorError or UnexpectedTensorError for other parameters, and TensorShapeError for shapes or formats that are not
        those of the engine, which then keeps what it has; OutOfMemoryError where even that does not fit, and closes the engine.
        """
        config = self.plan.config
        tensors = parameter_tensors(model, config)
        form = form_of(self.params)
        replacing.check_alike(tensors, self.mesh, self.plan, self.params)
        if free_bytes(self.mesh) >= bytes_on_a_device(self.params):
            new = place(tensors, self.mesh, config=config, plan=self.plan, **form).weights
            with self._scheduler.paused():
                self._params = new
            return
        try:
            with self._scheduler.paused(), explained(self.memory_plan):
                layers: list[LayerWeights | None] = [*self.params.layers]
                self._params = None
                self._params = replacing.replaced(tensors, self.mesh, self.plan, layers, form)
        except BaseException:
            self.close()  # some of its layers are gone
            raise

    def stage_report(
        self,
        *,
        context: int | None = None,
        batch: int | None = None,
        layer_seconds: Sequence[float] | None = None,
        measure: bool = False,
    ) -> StageReport:
        """Which layers each stage of the pipeline has, what a decode tick of theirs costs, how far the stages differ, and what memory they
        take.

        context: cached tokens of a sequence, inference_max_tokens by default. batch: sequences of a tick, micro_batch_size by default.
        layer_seconds: measured times of all layers, to be compared instead of the counted bytes. measure: take the time of every stage's
        layers, one stage after the other, while no request runs; compiles a program for each. Raises ConfigError where both are given, and
        for measuring on several processes.
        """
        if measure and layer_seconds is not None:
            raise ConfigError("stages have measured times by layer_seconds or by measure; give one of them")
        batch = self.config.micro_batch_size if batch is None else batch
        context = self.config.inference_max_tokens if context is None else context
        kept, seconds = cache_dtype(self.config.cache_dtype), None
        if measure:
            sizes: dict[str, Any] = {"batch": batch, "context": context, "cache_dtype": kept, "kernels": self.config.kernels}
            with self._scheduler.paused(), COLLECTIVES:
                seconds = stage_seconds(self.plan, self.mesh, self.params, **sizes)
        return stage_report(
            self.plan,
            self.params,
            batch=batch,
            context=context,
            item=np.dtype(kept).itemsize,
            layer_seconds=layer_seconds,
            seconds=seconds,
            memory=self.memory_plan,
        )

    def memory_report(self) -> MemoryReport:
        """Bytes of the weights on this process's devices, by kind of tensor and form."""
        return memory_report(self.params)

    @overload
    def score(self, prompts: str) -> ScoreResult: ...  # type: ignore[overload-overlap]

    @overload
    def score(self, prompts: Sequence[int]) -> ScoreResult: ...

    @overload
    def score(self, prompts: Sequence[Prompt]) -> list[ScoreResult]: ...

    def score(self, prompts: Any) -> list[ScoreResult] | ScoreResult:
        """Log-probability of every token of the prompts given those before it."""
        single, ids = self._prompt_ids(self._shared(prompts, None)[0])
        results = []
        run = self._running().score()
        rows = SCORE_ROWS * self.data_shards
        for start in range(0, len(ids), rows):
            part = ids[start : start + rows]
            many = bucket(-(-len(part) // self.data_shards), 1, SCORE_ROWS) * self.data_shards
            tokens, lengths = padded(dict(enumerate(part)), many, lambda n: max(2, self._slots.prompt_bucket(n)))
            with self._scheduler.paused(), explained(self.memory_plan):
                scores: Scores = fetch(run(self.params, tokens, lengths))
            for row, prompt in enumerate(part):
                n = len(prompt)
                logprobs, greedy = scores.logprobs[row, 1:n].tolist(), scores.greedy[row, 1:n].tolist()
                results.append(ScoreResult(token_ids=prompt, logprobs=[None, *logprobs], greedy_token_ids=[None, *greedy]))
        return results[0] if single else results

    def warmup(
        self,
        *,
        prompt_tokens: Sequence[int] = (SMALLEST_BUCKET,),
        batches: Sequence[int] = (1,),
        progress: Progress | None = None,
    ):
        """Compile, and run once, what requests of these prompt lengths and batch sizes need."""
        work = [(n, b) for b in batches for n in prompt_tokens]
        for done, (tokens, batch) in enumerate(work):
            if progress:
                progress(done, len(work), f"{batch} x {tokens} tokens")
            most = self.config.inference_max_tokens
            prompt = [0] * min(tokens, most - 1)
            self.generate([prompt] * batch, SamplingParams(max_tokens=min(2, most - len(prompt)), ignore_eos=True))
        if progress:
            progress(len(work), len(work), "ready")

    def _shared(self, prompts, params) -> tuple[Any, Any]:
        """Prompts and parameters as process 0 has them, where several processes call together; text as token ids then.

        Raises everywhere what process 0 would refuse, and PromptError where another process was given something else.
        """
        if self._calls is None:
            return prompts, params
        mine: Any = None
        if prompts is not None or self._calls.process == 0:
            try:
                single, ids = self._prompt_ids(prompts)
                pickle.dumps(params)
                mine = ids[0] if single else ids, params
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                mine = SamplingParamsError(
                    f"several processes need parameters that can be pickled, functions of a module: {error}"
                )
            except Exception as error:
                mine = error

        def decide(said: list[Any]) -> Any:
            first = said[0]
            if isinstance(first, Exception):
                raise first
            self._requests(*first)
            for i, other in enumerate(said):
                if other is not None and other != first:
                    raise PromptError(
                        f"process {i} was given other prompts or parameters than process 0; give the same on all, or None there"
                    )
            return first

        return self._calls.exchange(mine, decide)

    def _prompt_ids(self, prompts) -> tuple[bool, list[list[int]]]:
        self._running()
        prompts = _as_list(prompts)
        single = isinstance(prompts, str) or not prompts or _is_token(prompts[0])
        return single, [self._ids(i, prompt) for i, prompt in enumerate([prompts] if single else prompts)]

    def _ids(self, index: int, prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError(f"prompt {index} is text, and the checkpoint has no tokenizer; give token ids")
            prompt = self.tokenizer.encode(prompt) if prompt else []
        ids = _as_list(prompt)
        wrong = [t for t in ids if not _is_token(t)]
        if wrong:
            raise PromptError(f"prompt {index} holds {wrong[0]!r}; a prompt is text or a list of token ids")
        if not ids:
            raise PromptError(f"prompt {index} is empty; give at least one token")
        vocab, limit = self.plan.config.vocab, self.config.inference_max_tokens
        outside = [t for t in ids if not 0 <= t < vocab]
        if outside:
            raise PromptError(f"prompt {index} holds token {outside[0]}; the vocabulary has 0 to {vocab - 1}")
        if len(ids) > limit:
            raise TokenLimitError(
                f"prompt {index} has {len(ids)} tokens, inference_max_tokens is {limit}; "
                "shorten it or raise the limit in the configuration"
            )
        return [int(t) for t in ids]

    def _requests(self, prompts, params) -> tuple[bool, list[Request]]:
        single, ids = self._prompt_ids(prompts)
        each = list(params) if isinstance(params, list | tuple) else [SamplingParams() if params is None else params] * len(ids)
        if len(each) != len(ids):
            raise SamplingParamsError(f"{len(each)} SamplingParams for {len(ids)} prompts; give one for all, or one each")
        if strange := [p for p in each if not isinstance(p, SamplingParams)]:
            raise SamplingParamsError(f"parameters are SamplingParams, got {type(strange[0]).__name__}")
        return single, [self._request(i, p, s) for i, (p, s) in enumerate(zip(ids, each, strict=True))]

    def _request(self, index: int, prompt: list[int], params: SamplingParams) -> Request:
        room = self.config.inference_max_tokens - len(prompt)
        limit = room if params.max_tokens is None else params.max_tokens
        if limit > room or room < 1:
            raise TokenLimitError(
                f"prompt {index} has {len(prompt)} tokens and asks for {max(limit, 1)} new ones, inference_max_tokens is "
                f"{self.config.inference_max_tokens}; lower max_tokens to {max(room, 0)}, or raise the limit in the configuration"
            )
        if params.min_tokens > limit:
            raise SamplingParamsError(
                f"min_tokens is {params.min_tokens}, and prompt {index} leaves room for {limit} new ones; lower it"
            )
        vocab = self.plan.config.vocab
        params = for_model(params, vocab=vocab, tokenizer=self.tokenizer, max_logprobs=self.config.max_logprobs)
        own = params.logits_processor
        held = None if own is None else self._slots.processors.hold(own)
        stops = (() if params.ignore_eos else self.eos_ids) + params.stop_token_ids
        if len(stops) > MAX_STOP_TOKENS:
            raise SamplingParamsError(
                f"{len(stops)} stop tokens, the model's own included; at most {MAX_STOP_TOKENS} are possible"
            )
        return Request(prompt, params, limit=limit, stop_tokens=stops, tokenizer=self.tokenizer, held=held)


def _delta(arrived: Delta | BaseException) -> Delta:
    if isinstance(arrived, BaseException):
        raise arrived
    return arrived


def _mailbox() -> tuple[Callable[[Delta | BaseException], None], "asyncio.Queue[Delta | BaseException]"]:
    """(deliver, queue): what another thread delivers is in the queue of the running event loop."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Delta | BaseException]()

    def deliver(item: Delta | BaseException) -> None:
        loop.call_soon_threadsafe(arrived.put_nowait, item)

    return deliver, arrived
