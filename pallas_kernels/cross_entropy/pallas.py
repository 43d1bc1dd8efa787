"""Largest logit, sum of exponentials and the target's logit in one read of the logits, for NVIDIA GPUs through Pallas and Triton."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.cross_entropy import reference
from pallas_kernels.cross_entropy.parts import Parts
from pallas_kernels.kernel_math import power_of_two
from pallas_kernels.launch import gpu_refusal, launch
from pallas_kernels.tuning import tile_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """columns: of one step, a power of two. warps: of 32 threads."""

    columns: int
    warps: int


def heuristic(vocabulary: int) -> Tile:
    """A row a block; sixteen elements a thread and step."""
    columns = min(4096, power_of_two(vocabulary))
    return Tile(columns=columns, warps=max(1, columns // 512))


def supports_vocabulary_parts(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    return "there is nothing to read" if 0 in facts["shape"] else True


@jax.custom_vjp
def vocabulary_parts(logits, targets, first):
    vocabulary, lead = logits.shape[-1], logits.shape[:-1]
    rows = logits.size // vocabulary
    tile = tile_for("cross_entropy", heuristic(vocabulary), vocabulary=vocabulary, dtype=str(logits.dtype))
    row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    found = launch(
        functools.partial(_kernel, columns=tile.columns, vocabulary=vocabulary),
        logits.reshape(rows, vocabulary),
        (targets.reshape(rows) - first).astype(jnp.int32),
        name="cross_entropy",
        out=(row, row, row),
        grid=(rows,),
        warps=tile.warps,
    )
    largest, total, target = (a.reshape(lead) for a in found)
    return Parts(largest=largest, total=total, target=target)


def _kernel(logits_ref, places_ref, largest_ref, total_ref, target_ref, *, columns, vocabulary):
    row = pl.program_id(0)
    place = places_ref[row]

    def body(step, carry):
        largest, total, target = carry
        at = step * columns + jnp.arange(columns)
        inside = at < vocabulary
        z = triton.load(logits_ref.at[row, pl.ds(step * columns, columns)], mask=inside, other=0.0).astype(jnp.float32)
        z = jnp.where(inside, z, -jnp.inf)
        raised = jnp.maximum(largest, jnp.max(z))
        base = jnp.where(raised > -jnp.inf, raised, 0.0)
        total = total * jnp.exp(jnp.minimum(largest - base, 0.0)) + jnp.sum(jnp.exp(z - base))
        target = target + jnp.sum(jnp.where((at == place) & inside, z, 0.0))
        return raised, total, target

    start = (jnp.float32(-jnp.inf), jnp.float32(0), jnp.float32(0))
    largest, total, target = lax.fori_loop(0, -(-vocabulary // columns), body, start)
    largest_ref[row], total_ref[row], target_ref[row] = largest, total, target


def _forward(logits, targets, first):
    return vocabulary_parts(logits, targets, first), (logits, targets, first)


def _backward(saved, gradient):
    _, targets, first = saved
    _, pull = jax.vjp(lambda logits: reference.vocabulary_parts(logits, targets, first), saved[0])
    return *pull(gradient), None, None


vocabulary_parts.defvjp(_forward, _backward)
