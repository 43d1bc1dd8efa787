"""Half a layer as one operation: norm, q/k/v, norms of q and k, rotary, cache write, attention, output, residual."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.attention.terms import PLAIN, AttentionTerms, check_terms
from pallas_kernels.attention_block import reference
from pallas_kernels.cpu import operations as native
from pallas_kernels.errors import ShapeError
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.norm import KINDS
from pallas_kernels.registry import choose, register, register_file
from pallas_kernels.target import Target

register("attention_block", "reference", reference.attention_block)


def _supports_native(target: Target, facts: Mapping[str, Any]) -> bool | str:
    if facts["spec"].normed:
        return "it has the norm in it; what is normed already runs through its parts"
    if facts["spec"].integer:
        return "it multiplies floats; integer attention runs through XLA"
    if facts["paged"]:
        return "it reads and writes rows of a cache, not block tables"
    return native.supports_attention_block(target, facts)


register("attention_block", "native", native.attention_block, supports=_supports_native, priority=native.PRIORITY)
register_file("attention_block", "pallas", "pallas_kernels.attention_block.pallas")


_FIELDS = ("norm", "norm_bias", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_FIELDS, meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Weights of the half layer, as arrays or QTensors [out, in].

    norm [D]; norm_bias [D] or None, of a layer norm. qkv: (q [N*H, D], k [K*H, D], v [K*H, D]), or neighbours joined along their
    outputs down to one array: fewer and larger matmuls. qkv_bias: the same parts as vectors, or (). q_norm, k_norm: [H], scales of the
    norm of every head of q and k, or None for neither. out [D, N*H]; out_bias [D] or None.
    """

    norm: jax.Array
    norm_bias: jax.Array | None = None
    qkv: tuple
    qkv_bias: tuple
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None
    out: jax.Array
    out_bias: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What is fixed when a program is compiled. group: query heads per kv head on this shard. scale, soft_cap: of the scores, see
    `attention`. norm: one of `norm.KINDS`, of x and of the heads of q and k alike; eps: theirs. integer: products of queries and keys, and
    of weights and values, are of 8-bit levels, see `integer_attention`. fresh: what keys and values of a fresh cache may be rounded to
    before they are attended, because their caller keeps no more of them; devices that multiply it faster than float32 do. normed: x comes
    normed, and the block's own norm is left out."""

    head_dim: int
    group: int
    scale: float
    eps: float
    norm: str = "rms"
    soft_cap: float | None = None
    integer: bool = False
    fresh: str = "float32"
    normed: bool = False


def attention_block(
    x,
    weights: AttentionWeights,
    cache: LayerCache | None,
    *,
    spec: AttentionSpec,
    angles: tuple[jax.Array, jax.Array] | None,
    positions,
    rows=None,
    write=None,
    residual=None,
    lead: jax.Array | None = None,
    window: jax.Array | None = None,
    terms: AttentionTerms = PLAIN,
    max_over_shards: Callable | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, LayerCache]:
    """The attention half of a pre-norm layer, for one tensor shard.

        y = residual + W_o attention(rope(norm(W_q n + b_q)), rope(norm(W_k n + b_k)), W_v n + b_v) + b_o,     n = norm(x)

    x: float32 [B, T, D]. cache: what keys and values are written to and attended over, or None: the tokens attend to each other and their
    fresh cache [B, K, T, H] comes back, in float32 or spec.fresh. angles: cos and sin, float32 [B, T, R/2], or None for no rotation.
    positions: int32 [B, T]. rows, write: see `rope_cache`. residual: float32 [B, T, D] or None. lead: bool scalar, whether residual and
    out_bias go into this shard's y, a partial sum under tensor parallelism; None: they do. In a layer whose halves read the same x, as in
    GPT-NeoX and Falcon, the residual of the second half is the first one's result. window: int32 scalar or None, and terms: see
    `attention`. max_over_shards: see `quant_matmul`.
    Returns y, float32 [B, T, D], and the cache. Raises ShapeError.
    """
    if spec.norm not in KINDS:
        raise ShapeError(f"attention_block: norm {spec.norm!r} is not one of {KINDS}")
    if x.ndim != 3 or weights.norm.shape != x.shape[-1:]:
        raise ShapeError(
            f"attention_block: x must be [B, T, D] with D as the norm's, got {list(x.shape)} and {list(weights.norm.shape)}"
        )
    rows_qkv = sum(w.shape[0] for w in weights.qkv)
    if rows_qkv % ((spec.group + 2) * spec.head_dim):
        raise ShapeError(
            f"attention_block: {rows_qkv} q, k and v outputs are not made of groups of {spec.group} + 2 heads of {spec.head_dim}"
        )
    if (weights.q_norm is None) != (weights.k_norm is None):
        raise ShapeError("attention_block: q_norm and k_norm come together; give both, or neither")
    check_terms(terms, x.shape[0], rows_qkv // ((spec.group + 2) * spec.head_dim) * spec.group)
    if spec.integer and (terms.given or not terms.causal):
        raise ShapeError("attention_block: integer attention is causal and has no further terms; leave `integer`, or the terms")
    windowed = window is not None
    run = choose(
        "attention_block",
        implementation,
        shape=x.shape,
        spec=spec,
        cached=cache is not None,
        windowed=windowed,
        weights=weights,
        cache=cache,
        paged=rows is not None and rows.ndim == 2,
        causal=terms.causal,
        terms=terms.given,
        max_over_shards=max_over_shards,
    )
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
        lead=lead,
        window=window,
        terms=terms,
        max_over_shards=max_over_shards,
    )
