"""The one decoder: the canonical Flax module that users hold, and the forward pass that it shares with the placed program.

Shapes: B rows, T tokens, D embed, V vocab (of this shard where it is split), R cache rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.blocks import MLP, Attention, matrix, vector
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.positions import rope_angles
from pallas_kernels.attention_block import AttentionSpec, AttentionWeights, attention_block
from pallas_kernels.embedding import embedding
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.mlp_block import MLPSpec, MLPWeights, mlp_block
from pallas_kernels.norm import rms_norm
from pallas_kernels.quant_matmul import quant_matmul
from sharding.context import ALONE, ParallelContext


@functools.partial(jax.tree_util.register_dataclass, data_fields=("attention", "mlp"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeights:
    attention: AttentionWeights
    mlp: MLPWeights


@functools.partial(jax.tree_util.register_dataclass, data_fields=("layers", "embedding", "norm", "head"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """The weights of a decoder as the runtime runs on them. head is None where it is the embedding."""

    layers: tuple[LayerWeights, ...]
    embedding: jax.Array
    norm: jax.Array
    head: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What is fixed in a layer when a program is compiled."""

    attention: AttentionSpec
    mlp: MLPSpec


def layer_spec(config: ModelConfig, group: int | None = None) -> LayerSpec:
    """group: query heads per kv head on a shard; the model's own by default."""
    a, m = config.attention, config.mlp
    return LayerSpec(
        attention=AttentionSpec(head_dim=a.head_dim, group=group or a.heads // a.kv_heads, scale=a.scale, eps=config.norm_eps),
        mlp=MLPSpec(activation=m.activation, gated=m.gated, eps=config.norm_eps),
    )


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32):
        self.attention = Attention(config, rngs, dtype)
        self.mlp = MLP(config, rngs, dtype)

    def weights(self) -> LayerWeights:
        return LayerWeights(attention=self.attention.weights(), mlp=self.mlp.weights())


class Decoder(nnx.Module):
    """The canonical module: L blocks, unpadded, without stage or shard axes; what is trained, saved, quantised and exported.

    config: the architecture. rngs: for random weights, nnx.Rngs(0) by default. dtype: of the matrices; vectors are float32.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None = None, dtype=jnp.float32):
        rngs = rngs or nnx.Rngs(0)
        self.config = config
        self.embedding = matrix(rngs, (config.vocab, config.embed), ("vocab", "embed"), dtype)
        self.blocks = nnx.List([Block(config, rngs, dtype) for _ in range(config.layers)])
        self.norm = vector(1.0, config.embed, "embed", jnp.float32)
        if not config.tied:
            self.head = matrix(rngs, (config.vocab, config.embed), ("vocab", "embed"), dtype)

    def weights(self) -> DecoderWeights:
        head = None if self.config.tied else self.head.get_value()
        return DecoderWeights(
            layers=tuple(block.weights() for block in self.blocks),
            embedding=self.embedding.get_value(),
            norm=self.norm.get_value(),
            head=head,
        )

    def __call__(self, input_ids, *, lengths=None):
        """Logits float32 [B, T, V] of int32 tokens [B, T]; rows are padded on the right to T, lengths int32 [B] (T by default)."""
        B, T = input_ids.shape
        lengths = jnp.full((B,), T, jnp.int32) if lengths is None else lengths
        weights = self.weights()
        x, _ = prefill_layers(weights.layers, embed(weights, input_ids), lengths, self.config, layer_spec(self.config))
        return head_logits(weights, x, self.config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """What a parameter is before it has a value: its shape [out, in] or [size], and its logical axes."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


@functools.lru_cache(maxsize=8)
def parameters(config: ModelConfig) -> dict[str, ParameterInfo]:
    """Module path -> ParameterInfo of every parameter of a Decoder. All layers are alike, so one is built, abstractly."""
    one = nnx.eval_shape(lambda: Decoder(dataclasses.replace(config, layers=1)))
    out: dict[str, ParameterInfo] = {}
    for path, p in nnx.to_flat_state(nnx.state(one, nnx.Param)):
        info = ParameterInfo(shape=p.get_value().shape, axes=p.get_metadata("axes"))
        names = [str(part) for part in path]
        if names[0] == "blocks":
            out |= {f"blocks.{i}." + ".".join(names[2:]): info for i in range(config.layers)}
        else:
            out[".".join(names)] = info
    return out


# --- the forward pass, for one shard


def embed(weights: DecoderWeights, ids, ctx: ParallelContext = ALONE):
    """Embeddings float32 [..., D] of int32 ids; one all-reduce where the vocabulary is split."""
    with jax.named_scope("embed"):
        first = ctx.vocab_index() * weights.embedding.shape[0]
        return ctx.leave_vocab(embedding(weights.embedding, ids, first=first))


def head_logits(weights: DecoderWeights, x, config: ModelConfig, ctx: ParallelContext = ALONE):
    """Logits float32 [..., V] of this shard's part of the vocabulary; entries past the model's vocabulary are -inf."""
    with jax.named_scope("head"):
        table = weights.embedding if weights.head is None else weights.head
        n = rms_norm(ctx.enter_vocab(x), ctx.enter_vocab(weights.norm), eps=config.norm_eps)
        logits = quant_matmul(n, table)
        if not ctx.vocab:
            return logits
        ids = ctx.vocab_index() * logits.shape[-1] + jnp.arange(logits.shape[-1])
        return jnp.where(ids < config.vocab, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("spec", "ctx"))
def layer(weights: LayerWeights, x, cache, angles, positions, rows, *, spec: LayerSpec, ctx: ParallelContext):
    """One layer: x float32 [B, T, D] -> ([B, T, D], cache). Two all-reduces under tensor parallelism.

    Jitted of its own, so that equal layers are traced once.
    """
    with jax.named_scope("attention_block"):
        a, entered = weights.attention, ctx.enter(x)
        own = dataclasses.replace(a, norm=ctx.enter(a.norm), out_bias=ctx.on_first_rank(ctx.enter(a.out_bias)))
        y, cache = attention_block(
            entered,
            own,
            cache,
            spec=spec.attention,
            angles=angles,
            positions=positions,
            rows=rows,
            residual=ctx.on_first_rank(entered),
            max_over_shards=ctx.max_over_tensor,
        )
        x = ctx.leave(y)
    with jax.named_scope("mlp_block"):
        m, entered = weights.mlp, ctx.enter(x)
        mine = dataclasses.replace(m, norm=ctx.enter(m.norm), down_bias=ctx.on_first_rank(ctx.enter(m.down_bias)))
        residual = ctx.on_first_rank(entered)
        x = ctx.leave(mlp_block(entered, mine, spec=spec.mlp, residual=residual, max_over_shards=ctx.max_over_tensor))
    return x, cache


def prefill_layers(
    layers, x, lengths, config: ModelConfig, spec: LayerSpec, ctx: ParallelContext = ALONE, used=None
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Whole rows through the layers: x float32 [B, T, D] -> ([B, T, D], fresh caches [B, K, T, H]).

    lengths: int32 [B], tokens of each row. used: bool per layer, or None; an unused layer slot passes x on.
    """
    B, T, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    angles = rope_angles(config.attention.rope, positions, lengths)
    caches = []
    for i, weights in enumerate(layers):
        with jax.named_scope(f"layer_{i}"):
            y, cache = layer(weights, x, None, angles, positions, None, spec=spec, ctx=ctx)
            x = y if used is None else jnp.where(used[i], y, x)
            caches.append(cache)
    return x, tuple(caches)


def cached_layers(
    layers, x, caches, positions, config: ModelConfig, spec: LayerSpec, ctx: ParallelContext = ALONE, *, rows, used=None
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """New tokens through the layers: x float32 [B, T, D] at positions int32 [B, T] -> ([B, T, D], caches).

    rows: cache row of each sequence, int32 [B], or None where rows are the batch. used: bool per layer, or None; an unused slot
    passes x on. Every token is written, also those of sequences that have ended and of unused slots: nothing reads these, and what
    comes to a position next writes it first. A masked write would cost copies of the cache.
    """
    angles = rope_angles(config.attention.rope, positions, positions[:, -1] + 1)
    new = []
    for i, (weights, cache) in enumerate(zip(layers, caches, strict=True)):
        with jax.named_scope(f"layer_{i}"):
            y, cache = layer(weights, x, cache, angles, positions, rows, spec=spec, ctx=ctx)
            x = y if used is None else jnp.where(used[i], y, x)
            new.append(cache)
    return x, tuple(new)
