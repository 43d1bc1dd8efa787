"""The one decoder: the canonical Flax module that users hold, and the forward pass that it shares with the placed program.

Shapes: B rows, T tokens, D embed, V vocab (of this shard where it is split), R cache rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxinfer.models.blocks import MLP, Attention, matrix, norm_scale, vector
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.experts import MoE, MoESpec, MoEWeights, moe_block
from jaxinfer.models.positions import rope_angles
from pallas_kernels.attention_block import AttentionSpec, AttentionWeights, attention_block
from pallas_kernels.embedding import embedding
from pallas_kernels.errors import ShapeError
from pallas_kernels.head_argmax import ROWS as SKETCHED_ROWS
from pallas_kernels.head_argmax import HeadSketch, head_argmax
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.mlp_block import MLPSpec, MLPWeights, mlp_block
from pallas_kernels.norm import norm
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quant_matmul.fused import Norm, fused_matmul
from pallas_kernels.sampling import VocabShards
from pallas_kernels.shares import share
from sharding.context import ALONE, ParallelContext
from sharding.partition import HeadSplit

# What a layer and a decoder hold beside their blocks, by the names of both module and weights.
POST_NORMS = ("attention_post_norm", "mlp_post_norm")
ENDS = ("embedding", "positions", "norm", "norm_bias", "head")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("attention", "mlp", *POST_NORMS), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """The weights of a layer. Post norms [D] are of the half layers' results, None for none."""

    attention: AttentionWeights
    mlp: MLPWeights | MoEWeights
    attention_post_norm: jax.Array | None = None
    mlp_post_norm: jax.Array | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=("layers", *ENDS, "sketch"), meta_fields=("embed_scale",))
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """The weights of a decoder as the runtime runs on them.

    positions: learned positions [P, D] or None. norm_bias: of a layer norm, else None. head: None where it is the embedding.
    sketch: of the head, or None; see `head_token`. embed_scale: factor on embeddings, fixed when a program is compiled.
    """

    layers: tuple[LayerWeights, ...]
    embedding: jax.Array
    positions: jax.Array | None = None
    norm: jax.Array
    norm_bias: jax.Array | None = None
    head: jax.Array | None
    sketch: HeadSketch | None = None
    embed_scale: float = 1.0

    @property
    def table(self) -> jax.Array:
        """The head [V, D], which may be the embedding."""
        return self.embedding if self.head is None else self.head

    def uses_sketch(self, rows: int) -> bool:
        """Whether the most likely tokens of so many rows come from the sketch."""
        return self.sketch is not None and rows <= SKETCHED_ROWS

    def step_bytes(self, rows: int, *, greedy: bool = True) -> int:
        """Bytes that a decode step of so many rows reads of these arrays, at least: all of the layers and of the head, or of its sketch
        where nothing but the most likely tokens is asked for (greedy). Of an embedding and of learned positions a row reads one row, which
        is not counted."""
        last = self.sketch if greedy and self.uses_sketch(rows) else self.table
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.layers, self.norm, self.norm_bias, last)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What is fixed in a layer when a program is compiled.

    moe: of layers that have experts, or None. heads: which heads each tensor shard holds, where there are several. windows: per layer slot
    the window of each stage's layer, or None for a model without. They are made operands of the layer, so that layers that differ in them
    share its program. jumped: per layer slot, whether stages that leave it empty jump over it; they run it on zeros otherwise, which costs
    nothing where another stage has as much to do. () for none.
    """

    attention: AttentionSpec
    mlp: MLPSpec
    moe: MoESpec | None = None
    heads: HeadSplit | None = None
    windows: tuple[tuple[int, ...], ...] | None = None
    jumped: tuple[bool, ...] = ()

    def kept_in(self, cache_dtype) -> "LayerSpec":
        """The same layer, whose fresh keys and values go into a cache of this dtype; of bytes and nibbles, bfloat16 leaves enough."""
        kept = jnp.dtype(cache_dtype)
        fresh = "bfloat16" if kept.itemsize == 1 else kept.name
        return dataclasses.replace(self, attention=dataclasses.replace(self.attention, fresh=fresh))


ALL_KEYS = 2**31 - 1  # the window of a layer that has none, beside layers that have one


def layer_spec(
    config: ModelConfig,
    heads: HeadSplit | None = None,
    slots: Sequence[Sequence[int]] | None = None,
    experts: tuple[tuple[int, ...], ...] = (),
    jumped: tuple[bool, ...] = (),
) -> LayerSpec:
    """heads: which heads each tensor shard holds; all of them by default. slots: for each layer slot the layers that lie in it, one a
    stage; by default every layer has its own. experts: those that each expert shard holds, see MoESpec. jumped: see LayerSpec."""
    a, m = config.attention, config.mlp
    windows, moe = None, None
    if config.windows:
        slots = [(i,) for i in range(config.layers)] if slots is None else slots
        windows = tuple(tuple(config.windows[i] or ALL_KEYS for i in layers) for layers in slots)
    if config.moe is not None:
        common: dict[str, Any] = {"activation": m.activation, "eps": config.norm_eps, "norm": config.norm}
        moe = MoESpec(used=config.moe.used, normalise=config.moe.normalise, held=experts, **common)
    return LayerSpec(
        attention=AttentionSpec(
            head_dim=a.head_dim,
            group=a.heads // a.kv_heads if heads is None else len(heads.query[0]) // len(heads.kv[0]),
            scale=a.scale,
            eps=config.norm_eps,
            norm=config.norm,
            soft_cap=a.soft_cap,
            integer=a.integer,
        ),
        mlp=MLPSpec(activation=m.activation, gated=m.gated, eps=config.norm_eps, norm=config.norm),
        moe=moe,
        heads=heads if heads is not None and len(heads.kv) > 1 else None,
        windows=windows,
        jumped=jumped,
    )


# What a layer has after its attention, by ModelConfig.kind.
MLP_BLOCKS: dict[str, type[MLP | MoE]] = {"dense": MLP, "moe": MoE}


class Block(nnx.Module):
    """One pre-norm decoder layer, with or without norms of its two results. kind: of ModelConfig.kind."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32, kind: str = "dense"):
        self.attention = Attention(config, rngs, dtype)
        self.mlp = MLP_BLOCKS[kind](config, rngs, dtype)
        if config.post_norms:
            self.attention_post_norm = norm_scale(config, config.embed, "embed")
            self.mlp_post_norm = norm_scale(config, config.embed, "embed")

    def weights(self) -> LayerWeights:
        post = {name: getattr(self, name).get_value() for name in POST_NORMS if hasattr(self, name)}
        return LayerWeights(attention=self.attention.weights(), mlp=self.mlp.weights(), **post)


class Decoder(nnx.Module):
    """The canonical module: L blocks, unpadded, without stage or shard axes; what is trained, saved, quantised and exported.

    config: the architecture. rngs: for random weights, nnx.Rngs(0) by default. dtype: of the matrices; vectors are float32.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None = None, dtype=jnp.float32):
        rngs = rngs or nnx.Rngs(0)
        self.config = config
        self.embedding = matrix(rngs, (config.vocab, config.embed), ("vocab", "embed"), dtype)
        self.blocks = nnx.List([Block(config, rngs, dtype, config.kind(i)) for i in range(config.layers)])
        self.norm = norm_scale(config, config.embed, "embed")
        if config.norm == "layer":
            self.norm_bias = vector(0.0, config.embed, "embed", jnp.float32)
        if not config.tied:
            self.head = matrix(rngs, (config.vocab, config.embed), ("vocab", "embed"), dtype)
        if config.learned_positions:
            self.positions = matrix(rngs, (config.max_positions, config.embed), (None, "embed"), dtype)

    def weights(self) -> DecoderWeights:
        ends: dict[str, Any] = {name: getattr(self, name).get_value() if hasattr(self, name) else None for name in ENDS}
        layers = tuple(block.weights() for block in self.blocks)
        return DecoderWeights(layers=layers, embed_scale=self.config.embed_scale, **ends)

    def __call__(self, input_ids, *, lengths=None):
        """Logits float32 [B, T, V] of int32 tokens [B, T]; rows are padded on the right to T, lengths int32 [B] (T by default).

        Raises ShapeError for more tokens than there are learned positions.
        """
        B, T = input_ids.shape
        limit = self.config.max_positions
        if self.config.learned_positions and limit < T:
            raise ShapeError(f"rows of {T} tokens, but the model has learned {limit} positions; give fewer tokens")
        lengths = jnp.full((B,), T, jnp.int32) if lengths is None else lengths
        weights = self.weights()
        x, _ = prefill_layers(weights.layers, embed(weights, input_ids), lengths, self.config, layer_spec(self.config))
        return head_logits(weights, x, self.config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """What a parameter is before it has a value: its shape [out, in] or [size], or [experts, out, in], and its logical axes, None for one
    never split."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@functools.lru_cache(maxsize=8)
def parameters(config: ModelConfig) -> dict[str, ParameterInfo]:
    """Module path -> ParameterInfo of every parameter of a Decoder. Layers of one kind are alike, so one of each is built, abstractly."""
    kinds = [config.kind(i) for i in range(config.layers)]
    out: dict[str, ParameterInfo] = {}
    for kind in dict.fromkeys(kinds):
        moe = config.moe and dataclasses.replace(config.moe, layers=(0,))
        single = dataclasses.replace(config, layers=1, windows=(), moe=moe if kind == "moe" else None)
        for path, p in nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda single=single: Decoder(single)), nnx.Param)):
            info = ParameterInfo(shape=p.get_value().shape, axes=p.get_metadata("axes"))
            names = [str(part) for part in path]
            if names[0] == "blocks":
                out |= {f"blocks.{i}." + ".".join(names[2:]): info for i, own in enumerate(kinds) if own == kind}
            else:
                out[".".join(names)] = info
    return out


# --- the forward pass, for one shard


def embed(weights: DecoderWeights, ids, ctx: ParallelContext = ALONE, *, positions=None):
    """Embeddings float32 [..., D] of int32 ids; one all-reduce where the vocabulary is split.

    positions: int32 in the shape of ids, read by models with learned positions only; of whole rows [B, T] they are 0..T-1 by default.
    Past the table, where only padding lies, nothing is added.
    """
    with jax.named_scope("embed"):
        first = ctx.vocab_index() * weights.embedding.shape[0]
        x = ctx.leave_vocab(embedding(weights.embedding, ids, first=first))
        if weights.embed_scale != 1.0:
            x = x * weights.embed_scale
        if weights.positions is None:
            return x
        if positions is None:
            if ids.ndim != 2:
                raise ShapeError(f"embed: ids {list(ids.shape)} are no whole rows [B, T]; give their positions")
            positions = jnp.arange(ids.shape[1], dtype=jnp.int32)
        return x + embedding(weights.positions, positions)


def _head(weights: DecoderWeights, config: ModelConfig, ctx: ParallelContext) -> tuple[Any, Norm]:
    """The head [V, D] of this shard, and the norm before it."""
    bias = None if weights.norm_bias is None else ctx.enter_vocab(weights.norm_bias)
    last = Norm(kind=config.norm, eps=config.norm_eps, scale=ctx.enter_vocab(weights.norm), bias=bias)
    return weights.table, last


def head_token(weights: DecoderWeights, x, config: ModelConfig, shards: VocabShards) -> jax.Array:
    """The token int32 [B] of the largest of `head_logits` of x [B, D], without most of them: for weights with a sketch. shards: of the
    vocabulary."""
    assert weights.sketch is not None
    with jax.named_scope("head"):
        table, last = _head(weights, config, ALONE)
        return head_argmax(x, table, norm=last, sketch=weights.sketch, vocab=config.vocab, shards=shards)


def head_logits(weights: DecoderWeights, x, config: ModelConfig, ctx: ParallelContext = ALONE):
    """Logits float32 [..., V] of this shard's part of the vocabulary; entries past the model's vocabulary are -inf."""
    with jax.named_scope("head"):
        table, last = _head(weights, config, ctx)
        logits = fused_matmul(ctx.enter_vocab(x), (table,), norm=last)
        if config.soft_cap is not None:
            logits = config.soft_cap * jnp.tanh(logits / config.soft_cap)
        if not ctx.vocab:
            return logits
        ids = ctx.vocab_index() * logits.shape[-1] + jnp.arange(logits.shape[-1])
        return jnp.where(ids < config.vocab, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("spec", "ctx"))
def layer(weights: LayerWeights, x, cache, angles, positions, rows, window=None, *, spec: LayerSpec, ctx: ParallelContext):
    """One layer: x float32 [B, T, D] -> ([B, T, D], cache). Two all-reduces under tensor parallelism. window: int32 scalar or None.

    Jitted of its own, so that equal layers are traced once. Without post norms the residual goes into the reduction, on one rank;
    with them it is added to the normed sum, which every rank holds whole. Where ctx.split_tokens, x and the result are this shard's tokens
    [B, T / shards, D], and each all-reduce is a reduce-scatter, then an all-gather of what is normed.
    """
    x, cache = attention_half(weights, x, cache, angles, positions, rows, window, spec=spec, ctx=ctx)
    return mlp_half(weights, x, positions.shape[1], spec=spec, ctx=ctx), cache


def attention_half(
    weights: LayerWeights, x, cache, angles, positions, rows, window=None, *, spec: LayerSpec, ctx: ParallelContext
):
    """The attention of a layer with its residual: x -> (x, cache), see `layer`."""
    with jax.named_scope("attention_block"):
        a, post = weights.attention, weights.attention_post_norm
        # what every shard holds and uses for its own heads: its gradient is summed over them
        shared = {name: ctx.enter(getattr(a, name)) for name in ("norm", "norm_bias", "q_norm", "k_norm", "out_bias")}
        own = dataclasses.replace(a, **shared, **_of_shared_heads(a, spec, ctx))
        entered, form = _entered(x, own.norm, own.norm_bias, spec.attention, ctx, positions.shape[1])
        y, cache = attention_block(
            entered,
            own,
            cache,
            spec=form,
            angles=angles,
            positions=positions,
            rows=rows,
            residual=entered if post is None and not form.normed else None,
            lead=ctx.lead,
            window=window,
            max_over_shards=ctx.max_over_tensor,
        )
        return _after(x, y, post, spec.attention, ctx), cache


def _of_shared_heads(a: AttentionWeights, spec: LayerSpec, ctx: ParallelContext) -> dict[str, Any]:
    """Gradient rules of what belongs to heads that no shard has to itself: kv heads that several hold have the sum of their gradients, and
    output columns of padded query heads, which see real values, none."""
    if spec.heads is None:
        return {}
    out: dict[str, Any] = {}
    H, queries = spec.attention.head_dim, len(spec.heads.query[0]) * spec.attention.head_dim
    if (replicas := spec.heads.replicas) > 1:
        for name in ("qkv", "qkv_bias"):
            parts, start = [], 0
            for part in getattr(a, name):
                rows = part.shape[0]
                first = min(max(queries - start, 0), rows)
                plain = isinstance(part, QTensor) or first == rows
                parts.append(part if plain else ctx.same_rows(part, replicas, first))
                start += rows
            out[name] = tuple(parts)
    if not isinstance(a.out, QTensor) and not all(map(all, spec.heads.real)):
        out["out"] = ctx.frozen_columns(a.out, np.repeat(spec.heads.real, H, axis=1))
    return out


def mlp_half(weights: LayerWeights, x, tokens: int | None = None, *, spec: LayerSpec, ctx: ParallelContext):
    """The MLP of a layer, or its experts, with its residual: x -> x, see `layer`. tokens: T of all shards, that of x by default."""
    with jax.named_scope("mlp_block"):
        m, post, tokens = weights.mlp, weights.mlp_post_norm, x.shape[1] if tokens is None else tokens
        if isinstance(m, MoEWeights):
            assert spec.moe is not None
            mine = dataclasses.replace(m, norm=ctx.enter(m.norm), router=ctx.enter(m.router))
            entered, moe = _entered(x, mine.norm, None, spec.moe, ctx, tokens)
            residual = entered if post is None and not moe.normed else None
            y = moe_block(entered, mine, spec=moe, ctx=ctx, residual=share(ctx.lead, residual))
        else:
            shared = {name: ctx.enter(getattr(m, name)) for name in ("norm", "norm_bias", "down_bias")}
            own, shards = dataclasses.replace(m, **shared), {"lead": ctx.lead, "max_over_shards": ctx.max_over_tensor}
            entered, mlp = _entered(x, own.norm, own.norm_bias, spec.mlp, ctx, tokens)
            residual = entered if post is None and not mlp.normed else None
            y = mlp_block(entered, own, spec=mlp, residual=residual, **shards)
        return _after(x, y, post, spec.mlp, ctx)


def _entered[Spec: (AttentionSpec, MLPSpec, MoESpec)](x, scale, bias, spec: Spec, ctx: ParallelContext, tokens: int):
    """(what a half layer reads, its spec): x itself; where tokens are split those of all shards, normed where they lie."""
    if not ctx.split_tokens:
        return ctx.enter(x), spec
    with jax.named_scope("norm"):
        n = norm(x, scale, bias, kind=spec.norm, eps=spec.eps)
    return ctx.gather_tokens(n, tokens), dataclasses.replace(spec, normed=True)


def _after(x, y, post_norm, spec: AttentionSpec | MLPSpec, ctx: ParallelContext):
    """What follows a half layer's partial sum `y`: the sum, which holds the residual unless it is normed first or tokens are split."""
    if not ctx.split_tokens:
        y = ctx.leave(y)
        return y if post_norm is None else x + norm(y, post_norm, kind=spec.norm, eps=spec.eps)
    y = ctx.scatter_tokens(y)
    return x + (y if post_norm is None else norm(y, ctx.enter(post_norm), kind=spec.norm, eps=spec.eps))


def slot_window(spec: LayerSpec, slot: int, ctx: ParallelContext):
    """The window of this stage's layer in a slot, int32 scalar, or None."""
    if spec.windows is None:
        return None
    stages = spec.windows[slot]
    return jnp.int32(stages[0]) if len(set(stages)) == 1 else jnp.asarray(stages, jnp.int32)[ctx.stage_index()]


def _in_slot(run: Callable, x, cache, slot: int, spec: LayerSpec, used):
    """run(x, cache) -> (x, cache) of a slot's layer, where this stage has one there; x passes an empty slot as it is. cache: None where
    run makes a fresh one, of an empty slot nothing is ever read."""
    if used is None:
        return run(x, cache)
    if not spec.jumped or not spec.jumped[slot]:
        y, cache = run(x, cache)
        return jnp.where(used[slot], y, x), cache

    def jump(x, cache):
        made = jax.eval_shape(run, x, cache)[1] if cache is None else None
        return x, cache if made is None else jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), made)

    return lax.cond(used[slot], run, jump, x, cache)


def prefill_layers(
    layers, x, lengths, config: ModelConfig, spec: LayerSpec, ctx: ParallelContext = ALONE, used=None, tokens: int | None = None
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Whole rows through the layers: x float32 [B, T, D] -> ([B, T, D], fresh caches [B, K, T, H]).

    lengths: int32 [B], tokens of each row. used: bool per layer, or None; an unused layer slot passes x on. tokens: T, where x holds this
    shard's tokens only (ctx.split_tokens).
    """
    B, T = x.shape[0], x.shape[1] if tokens is None else tokens
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    angles = config.attention.rope and rope_angles(config.attention.rope, positions, lengths)
    caches = []
    for i, weights in enumerate(layers):
        with jax.named_scope(f"layer_{i}"):
            window = slot_window(spec, i, ctx)

            def run(x, cache, weights=weights, window=window):
                return layer(weights, x, cache, angles, positions, None, window, spec=spec, ctx=ctx)

            x, cache = _in_slot(run, x, None, i, spec, used)
            caches.append(cache)
    return x, tuple(caches)


def cached_layers(
    layers,
    x,
    caches,
    positions,
    config: ModelConfig,
    spec: LayerSpec,
    ctx: ParallelContext = ALONE,
    *,
    rows,
    used=None,
    lengths=None,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """New tokens through the layers: x float32 [B, T, D] at positions int32 [B, T] -> ([B, T, D], caches).

    rows: cache row of each sequence, int32 [B], or None where rows are the batch. used: bool per layer, or None; an unused slot
    passes x on. Every token is written, also those of sequences that have ended and of unused slots: nothing reads these, and what
    comes to a position next writes it first. A masked write would cost copies of the cache.
    lengths: int32 [B], tokens of the whole rows, by default up to the last of x.
    """
    ctx = dataclasses.replace(ctx, split_tokens=False)  # few tokens: one sum is one launch, and there is nothing to save
    lengths = positions[:, -1] + 1 if lengths is None else lengths
    angles = config.attention.rope and rope_angles(config.attention.rope, positions, lengths)
    new = []
    for i, (weights, cache) in enumerate(zip(layers, caches, strict=True)):
        with jax.named_scope(f"layer_{i}"):
            window = slot_window(spec, i, ctx)

            def run(x, cache, weights=weights, window=window):
                return layer(weights, x, cache, angles, positions, rows, window, spec=spec, ctx=ctx)

            x, cache = _in_slot(run, x, cache, i, spec, used)
            new.append(cache)
    return x, tuple(new)
