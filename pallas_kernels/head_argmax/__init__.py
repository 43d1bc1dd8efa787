"""The most likely token without all logits: what greedy decoding needs of a head."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cpu import operations as native
from pallas_kernels.errors import BackendError, ShapeError
from pallas_kernels.head_argmax import reference
from pallas_kernels.norm import KINDS
from pallas_kernels.quant_matmul.fused import Norm
from pallas_kernels.registry import choose, register
from pallas_kernels.sampling.shards import WHOLE_VOCAB, VocabShards

ROWS = native.SKETCH_ROWS  # inputs at once: more of them take more operations than they save bytes
WIDTH = 1024  # inputs, at most: the bound of a sketch grows with their root, beside logits that do not


@functools.partial(jax.tree_util.register_dataclass, data_fields=("blocks", "numbers"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSketch:
    """A head [V, D] in 5 bits a weight, and how far each of its rows is off, as native kernels read it (pallas_kernels/cpu/src/sketch.inc).

    blocks: uint8 [ceil(V / 32), ceil(D / 32), 704], of 32 rows and 32 inputs each: 5-bit levels, and a scale and a zero of 8 bits for each
    row. numbers: float32 [ceil(V / 32), 3, 32], of each row: what its scales count in, the norm of what its levels leave out, and its norm.
    """

    blocks: Any
    numbers: Any


def sketch_shapes(rows: int, width: int) -> HeadSketch:
    """The shapes of the sketch of a head [rows, width]."""
    blocks, groups = -(-rows // native.SKETCH_BLOCK), -(-width // native.SKETCH_BLOCK)
    return HeadSketch(
        blocks=jax.ShapeDtypeStruct((blocks, groups, native.SKETCH_BYTES), jnp.uint8),
        numbers=jax.ShapeDtypeStruct((blocks, native.SKETCH_NUMBERS, native.SKETCH_BLOCK), jnp.float32),
    )


def sketch_refusal(w: Any, width: int) -> str | None:
    """Why `head_argmax` with a sketch of a head [V, width] is not possible here, or not faster than with all logits; None where it is.
    w: the head, or anything of its dtype or format."""
    if width > WIDTH:
        return f"a sketch of {width} inputs excludes too few tokens; it is for at most {WIDTH}"
    return native.sketch_refusal(w) or native.slow_sketch()


def make_sketch(w: Any) -> HeadSketch:
    """The sketch of a head [V, D], a float32 or bfloat16 array or an int8 QTensor, in numpy arrays; cannot be traced. Raises BackendError
    for other weights."""
    if reason := native.sketch_refusal(w):
        raise BackendError(f"make_sketch: {reason}")
    blocks, numbers = native.head_sketch(w)
    return HeadSketch(blocks=blocks, numbers=numbers)


register("head_argmax", "reference", reference.head_argmax)
register("head_argmax", "native", native.head_argmax, supports=native.supports_head_argmax, priority=native.PRIORITY)


def head_argmax(
    x,
    w,
    *,
    norm: Norm,
    sketch: HeadSketch,
    vocab: int | None = None,
    shards: VocabShards = WHOLE_VOCAB,
    implementation: str | None = None,
) -> jax.Array:
    """The most likely token, the lowest id on ties.

        argmax_i w_i . norm(x)          i < vocab

    x: float [B, D] with B from 1 to `ROWS`. w: float32, bfloat16 or int8 QTensor [V, D], the local part of the head, with its sketch.
    vocab: entries of the whole vocabulary that are no padding, all of them by default. shards: as in `sampling.argmax`. Returns int32
    [B], the same on every shard.

    The token is that of the logits which `fused_matmul` gives, also where it reads but a few rows of w: rows that the sketch, with a bound
    on its error by Cauchy and Schwarz, keeps below a logit that was computed cannot be it. How many are left depends on x: a handful where
    one token stands out, all where none does. Raises ShapeError.
    """
    if x.ndim != 2 or not 1 <= x.shape[0] <= ROWS or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(f"head_argmax: x must be a float array [B, D] with B from 1 to {ROWS}, got {x.dtype}{list(x.shape)}")
    if len(w.shape) != 2 or w.shape[1] != x.shape[1]:
        raise ShapeError(f"head_argmax: w must be [V, {x.shape[1]}] as x {list(x.shape)}, got {list(w.shape)}")
    if norm.kind not in KINDS:
        raise ShapeError(f"head_argmax: norm {norm.kind!r} is not one of {KINDS}")
    if vocab is None and shards is not WHOLE_VOCAB:
        raise ShapeError("head_argmax: a split vocabulary may have padding; give vocab")
    want, got = ([list(a.shape) for a in jax.tree.leaves(of)] for of in (sketch_shapes(*w.shape), sketch))
    if want != got:
        raise ShapeError(f"head_argmax: the sketch of w {list(w.shape)} is {want}, got {got}; make it with make_sketch")
    run = choose("head_argmax", implementation, weight=w)
    vocab = w.shape[0] if vocab is None else vocab
    return run.function(x, w, norm=norm, sketch=sketch, vocab=vocab, shards=shards)
