"""Attention of many queries on Hopper, through Pallas and Mosaic GPU: two warpgroups attend, 64 queries of a head each, a third fetches.

Scores stay in registers, from one product to the next; while one warpgroup takes its softmax, the other has the tensor cores. What a query
sees is a range of keys, `low` to `last`: a step of keys that all queries of a block see is not masked, one that none sees is not read.
Source: Shah et al. 2024, FlashAttention-3, arXiv:2407.08608; jax's own example, jax.experimental.pallas.ops.gpu.attention_mgpu, which has
no lengths, windows, caps or offsets.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import pallas as through_triton
from pallas_kernels.attention.terms import last_keys, positions_of
from pallas_kernels.errors import BackendError
from pallas_kernels.hopper import PRODUCER_REGISTERS, ROWS, SHARED, STORED, WARPGROUPS, hopper_refusal, transforms
from pallas_kernels.kernel_math import LOG2_E
from pallas_kernels.target import interpreted
from pallas_kernels.tuning import tile_for

UNIT = 64  # what head_dim and the keys of a step are multiples of
WIDEST = 256  # head_dim
NOTHING = -1e30  # the largest score before there was one; finite, so that it can be subtracted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """keys: of a step. stages: steps whose keys and values are under way."""

    keys: int
    stages: int


def heuristic(tokens: int, size: int) -> Tile:
    """Scores [64, keys] and sums [64, size] of a warpgroup share its registers: 128 keys for heads of 128."""
    tile = Tile(keys=128 if tokens % 128 == 0 and size <= 128 else UNIT, stages=4)
    while tile.stages > 2 and _shared(tile, size) > SHARED:
        tile = dataclasses.replace(tile, stages=tile.stages - 1)
    return tile


def _shared(tile: Tile, size: int) -> int:
    return 2 * WARPGROUPS * ROWS * size + 4 * tile.stages * tile.keys * size + 4 * WARPGROUPS * ROWS * STORED


def supports_attention(target, facts) -> bool | str:
    if reason := hopper_refusal(target):
        return reason
    size, dtype, queries = facts["shape"][-1], facts["cache_dtype"], facts["shape"][1]
    if 0 in facts["shape"] or not facts["tokens"]:
        return "there is nothing to attend"
    if queries < ROWS:
        return f"it takes {ROWS} queries of a sequence or more, not {queries}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes keys and values in bfloat16 or float16, not in {dtype}"
    if size % UNIT or size > WIDEST:
        return f"it takes heads of 64, 128, 192 and 256 elements, not of {size}"
    refused = {"block tables": facts["paged"]} | {name: name in facts["terms"] for name in ("sinks", "slopes", "relative")}
    if found := [what for what, there in refused.items() if there]:
        return f"it does not take {', '.join(found)}"
    return True


def attention(q, cache, *, rows, positions, scale, soft_cap, window, terms, out_dtype):
    return _attention(scale, soft_cap, out_dtype, q, cache, rows, positions, window, terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(scale, soft_cap, out_dtype, q, cache, rows, positions, window, terms):
    B, T, N, H = q.shape
    K, S = cache.k.shape[1:3]
    dtype = cache.k.dtype
    tile = tile_for("attention_mosaic", heuristic(S, H), queries=T, tokens=S, head_dim=H)
    _check(tile, H)
    per_block = WARPGROUPS * ROWS
    padded = [(0, 0), (0, -T % per_block)]
    low, last = visible(positions_of(positions, q), window, terms, S)
    spans = _spans(low, last, B if rows is None else rows, tile.keys, per_block)
    low, last = jnp.pad(low, padded), jnp.pad(last, padded, constant_values=-1)
    factor = scale * (1.0 if soft_cap is not None else LOG2_E)
    q = jnp.pad((q.astype(jnp.float32) * factor).astype(dtype), [*padded, (0, 0), (0, 0)])
    # of a cache that no step divides, a copy with more keys, which nobody sees
    k, v = (jnp.pad(a, [(0, 0), (0, 0), (0, -S % tile.keys), (0, 0)]) for a in (cache.k, cache.v))
    out = plgpu.kernel(
        functools.partial(_kernel, tile=tile, group=N // K, soft_cap=soft_cap, blocks=spans.shape[1]),
        out_type=jax.ShapeDtypeStruct(q.shape, out_dtype),
        scratch_types={
            "q_buffer": plgpu.SMEM((WARPGROUPS, ROWS, H), dtype, transforms=transforms(H, dtype)),
            "stored": plgpu.SMEM((WARPGROUPS, ROWS, STORED), out_dtype, transforms=transforms(STORED, out_dtype)),
            "arrived": plgpu.Barrier(num_barriers=WARPGROUPS),
            "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
        grid=(N, spans.shape[1], B),
        grid_names=("head", "block", "sequence"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpreted() else None,
    )(q, k, v, low, last, spans)
    return out[:, :T]


def visible(at, window, terms, tokens: int) -> tuple[jax.Array, jax.Array]:
    """The first and the last key that queries at int32 [B, T] see, int32 [B, T] both; none where the last comes before the first."""
    last, low = last_keys(terms, at, tokens), jnp.zeros_like(at)
    if window is not None:
        reach = jnp.minimum(window.astype(jnp.int32), tokens) - 1  # so that sums stay in int32
        low = jnp.maximum(at - reach, 0)
        last = last if terms.causal else jnp.minimum(last, at + reach)
    return low, last


def _spans(low, last, rows, keys: int, queries: int) -> jax.Array:
    """For each block of queries: the row of the cache, its first step of keys, the steps, and from which to which of these all of its
    queries see every key. int32 [B, blocks, 5]. rows: int32 [B], or their number where they are the batch."""
    B, T = low.shape
    blocks = -(-T // queries)
    more = [(0, 0), (0, blocks * queries - T)]
    cut = lambda a, other: jnp.pad(a, more, constant_values=other).reshape(B, blocks, queries)
    far = jnp.int32(1 << 30)
    sees = last >= low
    first = jnp.min(cut(jnp.where(sees, low, far), far), -1) // keys
    end = jnp.max(cut(jnp.where(sees, last, -1), -1), -1) // keys + 1
    steps = jnp.maximum(end - first, 0)
    # padded queries are cut off and may see anything
    whole = -(-jnp.max(cut(low, 0), -1) // keys) - first
    until = (jnp.min(cut(last, far), -1) + 1) // keys - first
    rows = jnp.arange(B, dtype=jnp.int32) if isinstance(rows, int) else rows.astype(jnp.int32)
    rows = jnp.broadcast_to(rows[:, None], (B, blocks))
    return jnp.stack([rows, jnp.where(steps > 0, first, 0), steps, whole, jnp.minimum(until, steps)], -1).astype(jnp.int32)


def _check(tile: Tile, size: int) -> None:
    if tile.keys % UNIT or tile.keys < UNIT or tile.stages < 2 or _shared(tile, size) > SHARED:
        raise BackendError(
            f"attention: a step has multiples of {UNIT} keys, of which 2 and more are under way within {SHARED} bytes, not {tile}"
        )


def _forward(scale, soft_cap, out_dtype, *operands):
    return _attention(scale, soft_cap, out_dtype, *operands), operands


def _backward(scale, soft_cap, out_dtype, operands, gradient):
    # the gradient needs the logarithms of the sums, which its own forward pass makes
    rows, positions, window = operands[2:5]

    def run(q, cache, terms):
        return through_triton.attention(
            q,
            cache,
            rows=rows,
            positions=positions,
            scale=scale,
            soft_cap=soft_cap,
            window=window,
            terms=terms,
            out_dtype=out_dtype,
        )

    q, cache, terms = jax.vjp(run, operands[0], operands[1], operands[5])[1](gradient)
    return q, cache, None, None, None, terms


_attention.defvjp(_forward, _backward)


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    low_ref,
    last_ref,
    spans_ref,
    out_ref,
    *,
    tile,
    group,
    soft_cap,
    blocks,
    q_buffer,
    stored,
    arrived,
    turn,
):
    head, b, warpgroup = lax.axis_index("head"), lax.axis_index("sequence"), lax.axis_index("warpgroup")
    block = blocks - 1 - lax.axis_index("block")  # those that see most keys start first
    size, keys = q_ref.shape[-1], tile.keys
    row, begin, steps, whole, until = (spans_ref[b, block, i] for i in range(5))
    mine = pl.ds(block * (WARPGROUPS * ROWS) + warpgroup * ROWS, ROWS)
    down = lambda a, width: lax.broadcast_in_dim(a, (ROWS, width), (0,))

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def attend(index, k_buffer, v_buffer, k_read, v_read, carry):
        (step,) = index
        sums, largest, total, low, last = carry

        def of_queries(scores):
            plgpu.wgmma(scores, q_buffer.at[warpgroup], k_buffer.transpose((1, 0)))
            take_turns()
            return scores[...]

        scores = pl.run_scoped(of_queries, plgpu.ACC((ROWS, keys), jnp.float32))
        plgpu.barrier_arrive(k_read)
        if soft_cap is not None:
            scores = jnp.tanh(scores / soft_cap) * (soft_cap * LOG2_E)

        def masked(scores):
            key = lax.broadcasted_iota(jnp.int32, (ROWS, keys), 1) + (begin + step) * keys
            return jnp.where((key >= down(low, keys)) & (key <= down(last, keys)), scores, -jnp.inf)

        scores = lax.cond((step >= whole) & (step < until), lambda s: s, masked, scores)
        new = jnp.maximum(largest, jnp.max(scores, 1))
        shrink = jnp.exp2(largest - new)
        weights = jnp.exp2(scores - down(new, keys))
        total = total * shrink + jnp.sum(weights, 1)
        sums = sums * down(shrink, size)
        take_turns()
        sums = _added(sums, weights.astype(v_buffer.dtype), v_buffer)
        plgpu.barrier_arrive(v_read)
        return sums, new, total, low, last

    def around(pipeline):
        plgpu.copy_gmem_to_smem(q_ref.at[b, mine, head], q_buffer.at[warpgroup], arrived.at[warpgroup])
        plgpu.barrier_wait(arrived.at[warpgroup])
        number = lambda ref: plgpu.load(ref.at[b, mine], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        start = (
            jnp.full((ROWS, size), 0.0, jnp.float32),
            jnp.full((ROWS,), NOTHING, jnp.float32),
            jnp.full((ROWS,), 0.0, jnp.float32),
        )
        # the second warpgroup is half a step behind the first
        pl.when(warpgroup == 1)(take_turns)
        sums, _, total, _, _ = pipeline((*start, number(low_ref), number(last_ref)))
        pl.when(warpgroup == 0)(take_turns)
        sums = sums / down(jnp.where(total == 0, 1.0, total), size)
        for first in range(0, size, STORED):
            stored.at[warpgroup][...] = sums[:, first : first + STORED].astype(out_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stored.at[warpgroup], out_ref.at[b, mine, head, pl.ds(first, STORED)])
            plgpu.wait_smem_to_gmem(0)

    spec = lambda a: plgpu.BlockSpec((keys, size), lambda i: (begin + i, 0), transforms=transforms(size, a.dtype))
    kv_head = lax.div(head, jnp.int32(group))
    plgpu.emit_pipeline_warp_specialized(
        attend,
        grid=(steps,),
        in_specs=[spec(k_ref), spec(v_ref)],
        memory_registers=PRODUCER_REGISTERS,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=tile.stages,
        manual_consumed_barriers=True,
        compute_context=around,
    )(k_ref.at[row, kv_head], v_ref.at[row, kv_head])


def _added(sums, weights, v_buffer):
    """sums + weights v, the weights from registers."""
    if interpreted():  # which has no product of values and references
        v = v_buffer[...].astype(jnp.float32)
        plgpu.commit_smem()  # such a read is not the tensor cores', and TMA waits for none that was not announced
        return sums + jnp.dot(weights.astype(jnp.float32), v)

    def product(total):
        plgpu.wgmma(total, weights, v_buffer)

    return pl.run_state(product)(plgpu.ACC.init(sums))
