"""The choice of a token in two launches, for NVIDIA GPUs through Pallas and Triton: without top-k, top-p and min-p, whose launches are in
`pallas_threshold`, the logits are read once.

Blocks of a row draw their noise and keep their best token; a second launch compares the blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.kernel_math import masked_slice, power_of_two
from pallas_kernels.launch import gpu_refusal, launch
from pallas_kernels.sampling.pallas_threshold import least_kept
from pallas_kernels.sampling.random import gumbel
from pallas_kernels.tuning import tile_for

LAST_ID = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """tokens: of a block. warps: of 32 threads."""

    tokens: int
    warps: int


def supports_argmax(target, facts) -> bool | str:
    return gpu_refusal(target) or True


supports_sample = supports_argmax


def argmax(logits, *, shards):
    return _choose({"logits": lax.stop_gradient(logits)}, shards)


def sample(logits, *, temperature, top_k, top_p, min_p, seeds, steps, shards):
    logits = lax.stop_gradient(logits).astype(jnp.float32)
    sampled = temperature > 0

    def threshold():
        return least_kept(
            logits,
            temperature=jnp.where(sampled, temperature, 1),
            top_k=jnp.where(sampled, top_k, 0),
            top_p=jnp.where(sampled, top_p, 1),
            min_p=min_p,
            shards=shards,
        )

    # without top_k, top_p and min_p, or without a sampled row, the logits are read once
    cut = jnp.any(sampled & ((top_k > 0) | (top_p < 1) | (min_p > 0)))
    least = lax.cond(cut, threshold, lambda: jnp.full(temperature.shape, -jnp.inf, jnp.float32))
    offset = jnp.asarray(shards.offset, jnp.int32).reshape(1)
    knobs = {"temperature": temperature, "least": least, "seeds": seeds.astype(jnp.uint32), "steps": steps.astype(jnp.int32)}
    return _choose({"logits": logits, **knobs, "offset": offset}, shards)


def _choose(given, shards):
    """The id of the largest, with noise where knobs are given: the lowest one on ties, over all shards."""
    B, V = given["logits"].shape
    tile = tile_for("argmax", Tile(tokens=min(4096, power_of_two(V)), warps=4), rows=B, vocab=V)
    blocks = -(-V // tile.tokens)
    ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    values = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = functools.partial(_best_of_block, names=(*given, "id", "value"), vocab=V, tokens=tile.tokens)
    parts = launch(
        kernel, *given.values(), name="choose", out=(ids(B, blocks), values(B, blocks)), grid=(B, blocks), warps=tile.warps
    )
    kernel = functools.partial(_best_of_row, blocks=blocks)
    best, value = launch(kernel, *parts, name="choose_of_blocks", out=(ids(B), values(B)), grid=(B,), warps=1)
    # on the shards that do not hold the largest an id past every other one
    return shards.min(jnp.where(value < shards.max(value), jnp.int32(LAST_ID), best + shards.offset))


def _best(values, ids):
    largest = jnp.max(values, 0)
    # "not less" rather than "equal" gives an id of the vocabulary for a row of NaN too
    return jnp.min(jnp.where(values < largest, LAST_ID, ids), 0), largest


def _best_of_block(*refs, names, vocab, tokens):
    ref = dict(zip(names, refs, strict=True))
    b, block = pl.program_id(0), pl.program_id(1)
    first = block * tokens
    ids = first + jnp.arange(tokens)
    inside = ids < vocab
    z = triton.load(ref["logits"].at[b, pl.ds(first, tokens)], mask=inside, other=-jnp.inf).astype(jnp.float32)
    if "temperature" in ref:
        temperature = ref["temperature"][b]

        def noisy(z):
            one = lambda name: ref[name][pl.ds(b, 1)]
            noise = gumbel(one("seeds"), one("steps"), ids + ref["offset"][0]).reshape(tokens)
            return jnp.where(z < ref["least"][b], -jnp.inf, z / temperature + noise)

        z = lax.cond(temperature > 0, noisy, lambda z: z, z)
    best, largest = _best(z, jnp.where(inside, ids, LAST_ID))
    ref["id"][b, block] = best
    ref["value"][b, block] = largest


def _best_of_row(id_ref, value_ref, best_ref, largest_ref, *, blocks):
    b, places = pl.program_id(0), masked_slice(0, power_of_two(blocks))
    inside = jnp.arange(power_of_two(blocks)) < blocks
    values = triton.load(value_ref.at[b, places], mask=inside, other=-jnp.inf)
    ids = triton.load(id_ref.at[b, places], mask=inside, other=LAST_ID)
    best_ref[b], largest_ref[b] = _best(values, ids)
