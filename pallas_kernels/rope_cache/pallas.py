"""Norms of q and k, rotation and the cache write in one launch, for NVIDIA GPUs through Pallas and Triton.

A block has one head of some tokens. The cache is input and output at once: only what is written moves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.kernel_math import of_dtype, power_of_two
from pallas_kernels.launch import NARROWEST_FP8, gpu_refusal, launch
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.tuning import tile_for
from pallas_kernels.value_formats import FP8_MAX

WIDEST = 512  # head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """tokens: of a block. warps: of 32 threads."""

    tokens: int
    warps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadNorm:
    """The norm of every head of q and k. kind: one of `norm.KINDS`; q, k: scales [H]."""

    kind: str
    eps: float
    q: jax.Array
    k: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    tokens: int  # of all sequences
    length: int  # of a sequence
    heads: int
    kv_heads: int
    size: int
    half: int  # of what is rotated
    interleaved: bool
    first: tuple[int, int, int]  # head of q, k and v in their operands
    kind: str | None
    eps: float
    block: int


def supports_rope_cache(target, facts) -> bool | str:
    return gpu_refusal(target) or cache_refusal(target, facts["cache_dtype"]) or _size_refusal(facts) or True


def cache_refusal(target, dtype: str) -> str | None:
    """Why caches of a dtype are not written on a GPU, or None."""
    if "float8" in dtype and target.capability is not None and target.capability < NARROWEST_FP8:
        return f"{target.device_kind} cannot convert to {dtype}"
    return "it does not write int4 caches" if dtype == "uint8" else None


def supports_rope(target, facts) -> bool | str:
    return gpu_refusal(target) or _size_refusal(facts) or True


def _size_refusal(facts) -> str | None:
    if facts["shape"][-1] > WIDEST:
        return f"heads of {facts['shape'][-1]} do not fit the registers of a block, at most {WIDEST} do"
    return "there are no tokens" if 0 in facts["shape"] else None


def rope(x, cos, sin, *, interleaved):
    return _rope(interleaved, x, cos, sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rope(interleaved, x, cos, sin):
    return _run((x,), (0, 0, 0), x.shape[2], 0, cos, sin, None, None, None, None, None, interleaved)[0]


def _rope_forward(interleaved, x, cos, sin):
    return _rope(interleaved, x, cos, sin), (x, cos, sin)


def _rope_backward(interleaved, saved, gradient):
    from pallas_kernels.rope_cache import reference

    return jax.vjp(functools.partial(reference.rope, interleaved=interleaved), *saved)[1](gradient)


_rope.defvjp(_rope_forward, _rope_backward)


def rope_cache(q, k, v, cos, sin, cache, *, rows, positions, write, interleaved):
    return _run((q, k, v), (0, 0, 0), q.shape[2], k.shape[2], cos, sin, None, cache, rows, positions, write, interleaved)


def rope_cache_joined(heads, cos, sin, cache, *, kv_heads, norm: HeadNorm | None, rows, positions, write):
    """`rope_cache` on q, k and v as one array float [B, T, N + 2 K, H], their heads normed first where `norm` is given.

    cache: its arrays, or jax.ShapeDtypeStruct in their place for a new one, of which every token is written. positions: None for the
    tokens' numbers.
    """
    N = heads.shape[2] - 2 * kv_heads
    first = (0, N, N + kv_heads)
    return _run((heads, heads, heads), first, N, kv_heads, cos, sin, norm, cache, rows, positions, write, False)


def _run(operands, first, N, K, cos, sin, norm, cache, rows, positions, write, interleaved):
    B, T, _, H = operands[0].shape
    half = 0 if cos is None else cos.shape[-1]
    default = Tile(tokens=min(8, power_of_two(T)), warps=1 if T == 1 else 4)
    tile = tile_for("rope_cache", default, head_dim=H, decoding=T == 1)
    flat = lambda a: a.reshape(B * T, *a.shape[2:])
    given = dict(zip("qkv", map(flat, operands), strict=False))
    if cos is not None:
        given |= {"cos": flat(cos), "sin": flat(sin)}
    if norm is not None:
        given |= {"q_norm": norm.q, "k_norm": norm.k}
    if cache is not None:
        given |= {} if positions is None else {"positions": flat(positions).astype(jnp.int32)}
        given |= {} if rows is None else {"rows" if rows.ndim == 1 else "tables": rows.astype(jnp.int32)}
        given |= {} if write is None else {"write": flat(write).astype(jnp.int32)}
    out = {"q_out": jax.ShapeDtypeStruct((B * T, N, H), jnp.float32)}
    aliases = {}
    for name in ("k", "v", "k_scale", "v_scale"):
        array = None if cache is None else getattr(cache, name)
        if array is None:
            continue
        if not isinstance(array, jax.ShapeDtypeStruct):
            aliases[len(given)] = len(out)
            given["old_" + name] = array
        out["new_" + name] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    shape = _Shape(
        tokens=B * T,
        length=T,
        heads=N,
        kv_heads=K,
        size=H,
        half=half,
        interleaved=interleaved,
        first=first,
        kind=norm and norm.kind,
        eps=norm.eps if norm is not None else 0.0,
        block=tile.tokens,
    )
    found = launch(
        functools.partial(_kernel, names=(*given, *out), shape=shape),
        *given.values(),
        name="rope_cache",
        out=tuple(out.values()),
        grid=(-(-B * T // tile.tokens), N + K),
        warps=tile.warps,
        aliases=aliases,
    )
    q, *new = found
    names = [name.removeprefix("new_") for name in out if name != "q_out"]
    return q.reshape(B, T, N, H), LayerCache(**dict(zip(names, new, strict=True))) if new else None


def _kernel(*refs, names, shape):
    ref = dict(zip(names, refs, strict=True))
    head = pl.program_id(1)
    tokens = pl.program_id(0) * shape.block + jnp.arange(shape.block)

    @pl.when(head < shape.heads)
    def _():
        parts = _turned(ref, "q", head + shape.first[0], tokens, shape, True)
        for x, columns, inside in parts:
            triton.store(_at(ref["q_out"], columns, tokens, head), x, mask=inside)

    if shape.kv_heads:

        @pl.when(head >= shape.heads)
        def _():
            kv = head - shape.heads
            for name, place, turn in (("k", shape.first[1], True), ("v", shape.first[2], False)):
                _write(ref, name, kv, tokens, shape, _turned(ref, name, kv + place, tokens, shape, turn))


def _at(ref, columns, tokens, head):
    """What lies at [token, head, column], the tokens down and the columns across."""
    tokens = jnp.broadcast_to(tokens[:, None], columns.shape)
    return ref.at[tokens, jnp.broadcast_to(head, columns.shape), columns]


def _pieces(shape, turn):
    """Where the pieces of a head lie, as (first element, step, elements): the two halves that are rotated, and the rest."""
    half = shape.half
    if not turn or half == 0:
        return ((0, 1, shape.size),)
    pairs = ((0, 2, half), (1, 2, half)) if shape.interleaved else ((0, 1, half), (half, 1, half))
    return (*pairs, (2 * half, 1, shape.size - 2 * half))[: 3 if 2 * half < shape.size else 2]


def _turned(ref, name, head, tokens, shape, turn):
    """A head of some tokens, normed and rotated: (float32 values, columns, what lies inside), [block, n] each, by pieces."""
    kept = tokens < shape.tokens
    pieces = []
    for start, step, n in _pieces(shape, turn):
        across = lax.broadcasted_iota(jnp.int32, (shape.block, power_of_two(n)), 1)
        inside = (across < n) & kept[:, None]
        columns = start + step * across
        x = triton.load(_at(ref[name], columns, tokens, head), mask=inside, other=0.0).astype(jnp.float32)
        pieces.append((x, columns, inside))
    if turn and shape.kind is not None:
        pieces = _normed(ref[f"{name}_norm"], pieces, shape)
    if turn and shape.half:
        (a, first, inside), (b, second, _), *rest = pieces
        across = lax.broadcasted_iota(jnp.int32, a.shape, 1)
        places = (jnp.broadcast_to(tokens[:, None], a.shape), across)
        cos = triton.load(ref["cos"].at[places], mask=inside, other=0.0)
        sin = triton.load(ref["sin"].at[places], mask=inside, other=0.0)
        pieces = [(a * cos - b * sin, first, inside), (b * cos + a * sin, second, inside), *rest]
    return pieces


def _normed(scale_ref, pieces, shape):
    total = lambda parts: sum(jnp.sum(p, 1, keepdims=True) for p in parts) / shape.size
    if shape.kind == "layer":
        mean = total([x for x, _, _ in pieces])
        pieces = [(jnp.where(inside, x - mean, 0.0), columns, inside) for x, columns, inside in pieces]
    inverse = lax.rsqrt(total([x * x for x, _, _ in pieces]) + shape.eps)
    out = []
    for x, columns, inside in pieces:
        scale = triton.load(scale_ref.at[columns], mask=inside, other=0.0).astype(jnp.float32)
        out.append((x * inverse * (1 + scale if shape.kind == "rms_offset" else scale), columns, inside))
    return out


def _write(ref, name, head, tokens, shape, pieces):
    cache = ref["new_" + name]
    page = cache.shape[2]
    limit = page * (ref["tables"].shape[1] if "tables" in ref else 1)
    kept = tokens < shape.tokens
    positions = tokens % shape.length
    if "positions" in ref:
        positions = triton.load(ref["positions"].at[tokens], mask=kept, other=-1)
    kept &= (positions >= 0) & (positions < limit)
    if "write" in ref:
        kept &= triton.load(ref["write"].at[tokens], mask=kept, other=0) != 0
    row = tokens // shape.length
    if "rows" in ref:
        row = triton.load(ref["rows"].at[row], mask=kept, other=0)
    if "tables" in ref:
        row = triton.load(ref["tables"].at[row, positions // page], mask=kept, other=0)
        positions = positions % page
    positions = jnp.where(kept, positions, page)  # so that in the interpreter what is not written collides with nothing
    if f"new_{name}_scale" in ref:
        largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), 1) for x, _, _ in pieces])
        top = 127.0 if cache.dtype == jnp.int8 else FP8_MAX
        scale = largest / top
        triton.store(ref[f"new_{name}_scale"].at[row, jnp.broadcast_to(head, row.shape), positions], scale, mask=kept)
        inverse = jnp.where(scale == 0, 1.0, scale)[:, None]
        # what lies beyond the largest fp8 would become NaN
        pieces = [(jnp.clip(x / inverse, -top, top), columns, inside) for x, columns, inside in pieces]
    for x, columns, inside in pieces:
        spread = lambda a, like=columns: jnp.broadcast_to(a[:, None], like.shape)
        places = (spread(row), jnp.broadcast_to(head, columns.shape), spread(positions), columns)
        triton.store(cache.at[places], of_dtype(x, cache.dtype), mask=inside & kept[:, None])
