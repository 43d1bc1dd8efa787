"""Half a layer as one operation: norm, q/k/v, rotary, cache write, attention, output, residual."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from pallas_kernels.attention_block import reference
from pallas_kernels.errors import ShapeError
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.registry import choose, register

register("attention_block", "reference", reference.attention_block)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("norm", "qkv", "qkv_bias", "out", "out_bias"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Weights of the half layer, as arrays or QTensors [out, in].

    norm [D]. qkv: (q [N*H, D], k [K*H, D], v [K*H, D]), or neighbours joined along their outputs down to one array: fewer and larger
    matmuls. qkv_bias: the same parts as vectors, or (). out [D, N*H]; out_bias [D] or None.
    """

    norm: jax.Array
    qkv: tuple
    qkv_bias: tuple
    out: jax.Array
    out_bias: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What is fixed when a program is compiled. group: query heads per kv head on this shard."""

    head_dim: int
    group: int
    scale: float
    eps: float


def attention_block(
    x,
    weights: AttentionWeights,
    cache: LayerCache | None,
    *,
    spec: AttentionSpec,
    angles: tuple[jax.Array, jax.Array],
    positions,
    rows=None,
    write=None,
    residual=None,
    max_over_shards: Callable | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, LayerCache]:
    """The attention half of a pre-norm decoder layer, for one tensor shard.

        y = residual + W_o attention(rope(W_q n), rope(W_k n), W_v n) + b_o,     n = rms_norm(x)

    x: float32 [B, T, D]. cache: what keys and values are written to and attended over, or None: the tokens attend to each other and
    their fresh cache [B, K, T, H] comes back. angles: cos and sin, float32 [B, T, R/2]. positions: int32 [B, T]. rows, write: see
    `rope_cache`. residual: float32 [B, T, D] or None; under tensor parallelism y is a partial sum, so only one shard passes it (and
    out_bias). max_over_shards: see `quant_matmul`. Returns y, float32 [B, T, D], and the cache. Raises ShapeError.
    """
    if x.ndim != 3 or weights.norm.shape != x.shape[-1:]:
        raise ShapeError(
            f"attention_block: x must be [B, T, D] with D as the norm's, got {list(x.shape)} and {list(weights.norm.shape)}"
        )
    rows_qkv = sum(w.shape[0] for w in weights.qkv)
    if rows_qkv % ((spec.group + 2) * spec.head_dim):
        raise ShapeError(
            f"attention_block: {rows_qkv} q, k and v outputs are not made of groups of {spec.group} + 2 heads of {spec.head_dim}"
        )
    run = choose("attention_block", implementation, shape=x.shape, spec=spec, cached=cache is not None)
    return run.function(
        x,
        weights,
        cache,
        spec=spec,
        angles=angles,
        positions=positions,
        rows=rows,
        write=write,
        residual=residual,
        max_over_shards=max_over_shards,
    )
