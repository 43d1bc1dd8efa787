"""Attention over a cache for NVIDIA GPUs through Pallas and Triton. The scores never leave the registers.

All query heads of a group share one read of their keys and values: the rows of a block are query tokens times heads of a group.
Few queries (decoding) are bound by the read of the cache: the keys that a sequence sees are split over blocks, so that one sequence fills
the GPU too, and a second launch weighs their partial sums. Many (prefill) are bound by the products: each block has its own rows, and
keys that all of them see are not masked. The gradient makes the scores again from the logarithms of their sums.
Source: Dao 2023, arXiv:2307.08691; Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import gpus
from pallas_kernels.attention import pallas_backward, pallas_kernel
from pallas_kernels.attention.pallas_kernel import SMALLEST, Shape
from pallas_kernels.attention.reference import gathered
from pallas_kernels.attention.terms import AttentionTerms, positions_of
from pallas_kernels.errors import BackendError
from pallas_kernels.kernel_math import power_of_two
from pallas_kernels.launch import gpu_refusal, launch
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.target import current_target
from pallas_kernels.tuning import tile_for

FEW = 64  # queries of a kv head, tokens times heads of a group, up to which keys are split and not queries
WIDEST = 256  # head_dim
BLOCKS = 2  # for each processor, of few rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """queries: rows of a block, at least 16. keys: of a step. splits: of the keys of a sequence, 1 for more queries than a block has.
    warps: of 32 threads. stages: of loads that are under way. All but warps and stages are powers of two."""

    queries: int
    keys: int
    splits: int
    warps: int
    stages: int


def heuristic(
    *,
    sequences: int,
    queries: int,
    kv_heads: int,
    tokens: int,
    size: int,
    dtype,
    processors: int,
    relative: bool = False,
    ampere: bool = False,
) -> Tile:
    """Few queries: as many splits as fill the GPU, of at least two steps each, half of them where partial sums of many rows would be more
    than a twentieth of the cache. Exact products take registers: float32 in small steps. fp8 takes 8 warps: a B200 spills it by 4."""
    width, exact, fp8 = power_of_two(size), dtype == jnp.float32, dtype == jnp.float8_e4m3fn
    if queries > FEW:
        # 128 rows of narrower heads spill on a B200, with a relative bias on an A100, wider ones and 8 bits everywhere,
        # and on a B200 int8 in steps of 64 keys, or by 8 warps, and 64 rows of heads below 64, too; on an A100 128 rows with 64 keys
        eight = dtype.itemsize == 1
        rows = 32 if exact or width < 64 or (eight and relative) else 64 if width != 128 or eight or relative else 128
        narrow = eight or width > 128 or (ampere and rows == 128)
        keys = (32 if width == 64 else 16) if exact else 32 if narrow else 64
        return Tile(queries=rows, keys=keys, splits=1, warps=4 if eight and not fp8 and width <= 128 else 8, stages=2)
    # 128 keys of 8 bits spill on an H100, by heads of 64; 64 of them too, by narrower heads in pages
    most = 128 if dtype.itemsize > 1 else 64 if width >= 64 else 32
    keys = min(32, max(SMALLEST, 2048 // width)) if exact else min(most, max(SMALLEST, 8192 // width))
    wide = dtype.itemsize == 1 and width > 64  # int8 of so many elements spills by 4 warps on an H100 and a B200 too
    blocks = BLOCKS if queries <= SMALLEST // 2 else 1
    wanted = power_of_two(blocks * processors // (sequences * kv_heads) // 2 + 1)
    return Tile(
        queries=max(SMALLEST, power_of_two(queries)),
        keys=keys,
        splits=max(1, min(wanted, power_of_two(tokens) // (2 * keys))),
        warps=4 if queries <= SMALLEST and width <= 128 and not fp8 and not wide else 8,
        stages=3,
    )


def supports_attention(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there is nothing to attend"
    if facts["shape"][-1] > WIDEST:
        return f"heads of {facts['shape'][-1]} do not fit the registers of a block, at most {WIDEST} do"
    if facts["cache_dtype"] == "uint8":
        return "it does not take int4 caches"
    return pallas_kernel.cache_refusal(target, facts) or True


def attention(q, cache, *, rows, positions, scale, soft_cap, window, terms, out_dtype):
    positions = None if positions is None else positions.astype(jnp.int32)
    return _attention(scale, soft_cap, out_dtype, q, cache, rows, positions, window, terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(scale, soft_cap, out_dtype, q, cache, rows, positions, window, terms):
    shape = _shape(scale, soft_cap, q, cache, rows, terms)
    tile = shape.tile
    if tile.splits == 1:
        return _launch(q, cache, rows, positions, window, terms, shape=shape, out_dtype=out_dtype, saved=())["out"]
    found = _launch(q, cache, rows, positions, window, terms, shape=shape, out_dtype=out_dtype, saved=())
    if terms.sinks is not None:
        found["sinks"] = terms.sinks
    B, K = q.shape[0], cache.k.shape[1]
    return launch(
        functools.partial(pallas_kernel.reduce, names=(*found, "out"), shape=shape),
        *found.values(),
        name="decode_reduce",
        out=jax.ShapeDtypeStruct(q.shape, out_dtype),
        grid=(B, K, shape.queries * shape.group),
        warps=max(1, tile.splits * shape.width // 1024),
    )


def _shape(scale, soft_cap, q, cache, rows, terms, *, split: bool = True) -> Shape:
    """What to compile. split: whether the keys of few queries may be."""
    B, T, N, H = q.shape
    K, S = cache.k.shape[1:3]
    dtype, G = cache.k.dtype, N // K
    paged = rows is not None and rows.ndim == 2
    tokens = S * rows.shape[1] if paged else S
    sizes = {"sequences": B, "queries": T * G, "kv_heads": K, "tokens": tokens}
    target = current_target()
    # heads with keys of their own take more places of keys, which an A100 spills as it does a bias that is looked up
    ampere = target.capability is not None and target.capability < (9, 0)
    crowded = terms.relative is not None or (G == 1 and ampere)
    processors = gpus.describe(target.device_kind).processors
    default = heuristic(**sizes, size=H, dtype=dtype, processors=processors, relative=crowded, ampere=ampere)
    tile = tile_for("attention", default, **sizes, head_dim=H, dtype=str(dtype))
    if not split:
        tile = dataclasses.replace(tile, splits=1)
    if paged:
        tile = dataclasses.replace(tile, keys=min(tile.keys, S))
    blocks = -(-T * G // tile.queries)
    if blocks > 1 and tile.splits > 1:
        raise BackendError(f"attention: {T * G} queries in blocks of {tile.queries} leave no place for {tile.splits} splits")
    return Shape(
        queries=T,
        group=G,
        size=H,
        tokens=tokens,
        page=S,
        scale=scale,
        soft_cap=soft_cap,
        causal=terms.causal,
        reach=terms.reach,
        width=max(SMALLEST, power_of_two(H)),
        blocks=blocks,
        few=T * G <= FEW,
        tile=tile,
    )


def _launch(q, cache, rows, positions, window, terms, *, shape, out_dtype, saved) -> dict[str, jax.Array]:
    """The first launch: the result and what of it is `saved`, or the partial sums of the splits."""
    B, T, N, H = q.shape
    K, tile = cache.k.shape[1], shape.tile
    given = {"q": q} | shared_operands(positions, window, terms)
    if rows is not None:
        given["rows" if rows.ndim == 1 else "tables"] = rows.astype(jnp.int32)
    given |= {name: a for name in ("k", "v", "k_scale", "v_scale") if (a := getattr(cache, name)) is not None}
    if tile.splits == 1:
        out = {"out": jax.ShapeDtypeStruct((B, T, N, H), out_dtype)}
        out |= {name: jax.ShapeDtypeStruct((B, T, N), jnp.float32) for name in saved}
    else:
        given.pop("sinks", None)
        part = (B, K, tile.splits, T * shape.group)
        out = {name: jax.ShapeDtypeStruct(part, jnp.float32) for name in ("largest", "total")}
        out["sums"] = jax.ShapeDtypeStruct((*part, H), jnp.float32)
    found = launch(
        functools.partial(pallas_kernel.forward, names=(*given, *out), shape=shape),
        *given.values(),
        name="decode_attention" if shape.few else "prefill_attention",
        out=tuple(out.values()),
        grid=(shape.blocks * tile.splits, K, B),
        warps=tile.warps,
        stages=tile.stages,
    )
    return dict(zip(out, found, strict=True))


def shared_operands(positions, window, terms) -> dict[str, jax.Array]:
    """What every kernel takes beside queries, keys and values."""
    given = {} if positions is None else {"positions": positions}
    given |= {} if window is None else {"window": window.astype(jnp.int32).reshape(1)}
    return given | {name: getattr(terms, name) for name in terms.given}


def _forward(scale, soft_cap, out_dtype, q, cache, rows, positions, window, terms):
    shape = _shape(scale, soft_cap, q, cache, rows, terms, split=False)
    found = _launch(q, cache, rows, positions, window, terms, shape=shape, out_dtype=jnp.float32, saved=("lse",))
    return found["out"].astype(out_dtype), (q, cache, rows, positions, window, terms, found)


def _backward(scale, soft_cap, out_dtype, kept, gradient):
    q, cache, rows, positions, window, terms, found = kept

    def floats(cache: LayerCache):
        """Keys and values of each sequence as numbers [B, K, S, H]."""
        own = gathered(cache, rows)
        if own.k_scale is None or own.v_scale is None:
            return own.k, own.v
        return tuple(a.astype(jnp.float32) * s[..., None] for a, s in ((own.k, own.k_scale), (own.v, own.v_scale)))

    (k, v), to_cache = jax.vjp(floats, cache)
    done = pallas_backward.gradients(
        q,
        k,
        v,
        gradient.astype(jnp.float32),
        operands=shared_operands(positions_of(positions, q), window, terms),
        out=found["out"],
        lse=found["lse"],
        scale=scale,
        soft_cap=soft_cap,
        terms=terms,
    )
    of_terms = {name: done[name].astype(getattr(terms, name).dtype) for name in terms.given if name != "lengths"}
    (of_cache,) = to_cache((done["k"].astype(k.dtype), done["v"].astype(v.dtype)))
    return done["q"].astype(q.dtype), of_cache, None, None, None, AttentionTerms(causal=terms.causal, **of_terms)


_attention.defvjp(_forward, _backward)
