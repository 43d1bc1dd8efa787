"""The least logit that may be drawn under top-k, top-p and min-p, for NVIDIA GPUs through Pallas and Triton: without a sort or a loop whose
end the host must wait for.

Floats in their order are whole numbers of 32 bits, here called keys. A launch looks at the next six bits: it counts the tokens of each of
their values, among those whose key begins as the one that is looked for, and adds up their probabilities. The next launch begins with
these sums, takes the largest value from which on tokens are enough, and goes on with the bits below. Six launches find the k-th largest
logit, six the last one that top-p keeps of what that leaves. Logits and not quotients by the temperature are compared, which have the same
order, so that no rounding of a division decides.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import gpus
from pallas_kernels.kernel_math import power_of_two
from pallas_kernels.launch import launch
from pallas_kernels.sampling.shards import WHOLE_VOCAB
from pallas_kernels.target import current_target
from pallas_kernels.tuning import tile_for

BITS = 6
SHIFTS = (30, 24, 18, 12, 6, 0)  # of the bits of each launch; the first has two
BINS = 1 << BITS
CHUNK = 128  # tokens that are compared with all values of the bits at once
ALL = np.int32(2**31 - 1)  # more tokens than there are
_TOP_BIT = np.uint32(1 << 31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """tokens: of a block. step: tokens that are asked for at once, CHUNK or more. Powers of two. warps: of 32 threads."""

    tokens: int
    step: int
    warps: int


def heuristic(rows: int, vocab: int, processors: int) -> Tile:
    """Few blocks for each processor, since each reads what all of its row wrote before."""
    wanted = power_of_two(rows * vocab // (4 * processors))
    tokens = min(max(1024, wanted), 8192, max(CHUNK, power_of_two(vocab)))
    return Tile(tokens=tokens, step=min(1024, tokens), warps=8)


def least_kept(logits, *, temperature, top_k, top_p, min_p, shards):
    """float32 [B]: see `reference.kept_from`, of logits that were not divided by the temperature. temperature: positive."""
    B, V = logits.shape
    processors = gpus.describe(current_target().device_kind).processors
    tile = tile_for("threshold", heuristic(B, V, processors), rows=B, vocab=V)
    blocks = -(-V // tile.tokens)
    shared = {"logits": logits, "largest": shards.max(jnp.max(logits, -1)), "temperature": temperature}
    knobs = {"top_k": top_k.astype(jnp.int32), "top_p": top_p}
    row = lambda dtype: jax.ShapeDtypeStruct((B,), dtype)
    sums = lambda dtype: jax.ShapeDtypeStruct((B, blocks, BINS), dtype)
    state: dict[str, jax.Array] = {}
    before = None
    for kind in ("count", "mass"):
        for last, shift in zip((0, *SHIFTS), SHIFTS, strict=False):
            # where to look is an operand, so that launches share a kernel
            given = shared | knobs | state | {"last": jnp.full(1, last, jnp.uint32), "next": jnp.full(1, shift, jnp.uint32)}
            out = {"low": row(jnp.uint32), "mass": row(jnp.float32), "masses": sums(jnp.float32)}
            if kind == "count":
                out |= {"count": row(jnp.int32), "counts": sums(jnp.int32)}
            elif before == "count":
                out |= {"from_k": row(jnp.uint32), "wanted": row(jnp.float32)}
            kernel = functools.partial(
                _look, names=(*given, *(f"new_{name}" for name in out)), tile=tile, vocab=V, kind=kind, before=before
            )
            made = launch(
                kernel, *given.values(), name="threshold", out=tuple(out.values()), grid=(B, blocks), warps=tile.warps
            )
            found = dict(zip(out, made, strict=True))
            for name in ("masses", "counts"):
                if name in found and shards.sum is not WHOLE_VOCAB.sum:
                    found[name] = shards.sum(jnp.sum(found[name], 1, keepdims=True))
            kept = {name: state[name] for name in ("from_k", "wanted") if name in state}
            state, before = kept | found, kind
    given = {name: shared[name] for name in ("largest", "temperature")} | knobs | state | {"min_p": min_p}
    given["last"] = jnp.zeros(1, jnp.uint32)
    kernel = functools.partial(_finish, names=(*given, "new_least"))
    return launch(kernel, *given.values(), name="threshold_of_sums", out=row(jnp.float32), grid=(B,), warps=8)


def _look(*refs, names, tile, vocab, kind, before):
    """Sums for each value of the next bits. kind: what is looked for, the k-th largest ("count") or the last that top-p keeps ("mass");
    before: the same of the launch whose sums are given, or None."""
    ref = dict(zip(names, refs, strict=True))
    b, block = pl.program_id(0), pl.program_id(1)
    shift = ref["next"][0]
    if before == kind:
        found, _ = _narrowed(ref, b, kind)
    else:
        found = {"low": jnp.uint32(0), "mass": jnp.float32(0)} | ({"count": jnp.int32(0)} if kind == "count" else {})
        found |= {} if before is None else _found_k(ref, b)
    for name, value in found.items():  # every block of a row writes the same
        ref[f"new_{name}"][b] = value
    low = found["low"]
    largest, temperature = ref["largest"][b], ref["temperature"][b]
    bins = jnp.arange(BINS)[:, None]
    sums = {"masses": jnp.zeros((BINS, CHUNK), jnp.float32)}
    if kind == "count":
        sums["counts"] = jnp.zeros((BINS, CHUNK), jnp.int32)

    def step(i, sums):
        sums = dict(sums)
        for chunk in range(tile.step // CHUNK):
            at = block * tile.tokens + i * tile.step + chunk * CHUNK + jnp.arange(CHUNK)
            inside = at < vocab
            z = triton.load(ref["logits"].at[b, at], mask=inside, other=0.0)
            bits = keys_of(z) >> shift
            if before == kind:
                inside = inside & ((bits >> np.uint32(BITS)) == ((low >> shift) >> np.uint32(BITS)))
            value = (bits & np.uint32(BINS - 1)).astype(jnp.int32)
            weight = jnp.exp((z - largest) / temperature)
            hit = (value[None] == bins) & inside[None]
            sums["masses"] += jnp.where(hit, weight[None], 0.0)
            if kind == "count":
                sums["counts"] += hit.astype(jnp.int32)
        return sums

    sums = lax.fori_loop(0, tile.tokens // tile.step, step, sums)
    for name, value in sums.items():
        ref[f"new_{name}"][b, block, pl.ds(0, BINS)] = jnp.sum(value, 1)


def _narrowed(ref, b, kind):
    """The key so far, with the bits of the sums that are given, and what of the tokens lies above all that begin so; and the probabilities
    from there on."""
    bins = jnp.arange(BINS)
    low, mass, masses = ref["low"][b], ref["mass"][b], _from_value_on(ref["masses"], b)
    if kind == "count":
        count, counts = ref["count"][b], _from_value_on(ref["counts"], b)
        top_k = ref["top_k"][b]
        enough = count + counts >= jnp.where(top_k > 0, top_k, ALL)
    else:
        enough = mass + masses >= ref["wanted"][b]
    value = jnp.maximum(jnp.sum(enough.astype(jnp.int32)) - 1, 0)
    at = lambda a, value: jnp.sum(jnp.where(bins == value, a, jnp.zeros((), a.dtype)))
    found = {"low": low | (value.astype(jnp.uint32) << ref["last"][0]), "mass": mass + at(masses, value + 1)}
    if kind == "count":
        found["count"] = count + at(counts, value + 1)
    return found, mass + at(masses, value)


def _found_k(ref, b):
    """The key of the k-th largest, and how much of the probabilities from it on top-p wants."""
    found, total = _narrowed(ref, b, "count")
    top_p = ref["top_p"][b]
    # at least one token is kept, whatever top_p is
    return {"from_k": found["low"], "wanted": jnp.where(top_p < 1, jnp.maximum(top_p, 1e-30) * total, jnp.inf)}


def _from_value_on(sums_ref, b):
    """[BINS]: sums of the tokens whose bits have this value or a larger one, of all blocks of a row."""
    blocks, bins = sums_ref.shape[1], jnp.arange(BINS)
    parts = min(64, power_of_two(blocks))
    shape = (parts, BINS)

    def add(i, total):
        block = i * parts + jnp.arange(parts)
        place = (jnp.broadcast_to(block[:, None], shape), jnp.broadcast_to(bins[None], shape))
        kept = jnp.broadcast_to((block < blocks)[:, None], shape)
        return total + jnp.sum(triton.load(sums_ref.at[b, *place], mask=kept, other=0), 0)

    total = lax.fori_loop(0, math.ceil(blocks / parts), add, jnp.zeros(BINS, sums_ref.dtype))
    return jnp.sum(jnp.where(bins[None] >= bins[:, None], total[None], jnp.zeros((), total.dtype)), 1)


def _finish(*refs, names):
    ref = dict(zip(names, refs, strict=True))
    b = pl.program_id(0)
    key = jnp.maximum(ref["from_k"][b], _narrowed(ref, b, "mass")[0]["low"])
    least = ref["largest"][b] + ref["temperature"][b] * jnp.log(ref["min_p"][b])
    ref["new_least"][b] = jnp.maximum(value_of(key), least)


def keys_of(z):
    """uint32 in the order of float32."""
    bits = lax.bitcast_convert_type(z, jnp.uint32)
    return jnp.where(bits < _TOP_BIT, bits | _TOP_BIT, ~bits)


def value_of(key):
    """The float32 of a key; what is below that of minus infinity is minus infinity."""
    bits = jnp.where(key < _TOP_BIT, ~key, key ^ _TOP_BIT)
    z = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(z == z, z, -jnp.inf)
