"""Attention along the rows of a matrix of pairs, with a bias per pair: the triangle attention of structure prediction."""

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ShapeError
from pallas_kernels.registry import choose, register, register_file
from pallas_kernels.triangle_attention import reference

register("triangle_attention", "reference", reference.triangle_attention)
register_file("triangle_attention", "pallas", "pallas_kernels.triangle_attention.pallas")


def triangle_attention(q, k, v, bias, mask=None, *, scale: float, implementation: str | None = None) -> jax.Array:
    """Attention of every element of a row of pairs to the others of its row, with the same pair bias in all rows.

        s[i, j, l] = scale q[i, j] . k[i, l] + bias[j, l]         o[i, j] = sum_l softmax_l(s[i, j] over what the mask keeps) v[i, l]

    q, k, v: float [B, I, J, N, H] of one dtype. bias: float [B, N, J, J]. mask: bool [B, I, J], True where an element may be attended to,
    or None; a row that keeps nothing gives 0. scale: of the products. The ending node's form is this one of the transposed matrix.
    Returns [B, I, J, N, H] in q's dtype; float32 softmax. Differentiable in q, k, v and bias; with the kernel no array of I J^2 elements
    is held in either direction. Raises ShapeError. Source: Jumper et al. 2021, AlphaFold, supplement 1.6.6, algorithms 13 and 14.
    """
    if q.ndim != 5 or 0 in q.shape or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ShapeError(f"triangle_attention: q must be a float array [B, I, J, N, H], got {q.dtype}{list(q.shape)}")
    for name, a in (("k", k), ("v", v)):
        if a.shape != q.shape or a.dtype != q.dtype:
            raise ShapeError(f"triangle_attention: {name} must be {q.dtype}{list(q.shape)} as q, got {a.dtype}{list(a.shape)}")
    B, I, J, N, _ = q.shape
    if bias.shape != (B, N, J, J):
        raise ShapeError(f"triangle_attention: bias must be {[B, N, J, J]}, got {list(bias.shape)}")
    if mask is not None and (mask.shape != (B, I, J) or mask.dtype != jnp.bool_):
        raise ShapeError(f"triangle_attention: mask must be bool{[B, I, J]}, got {mask.dtype}{list(mask.shape)}")
    run = choose("triangle_attention", implementation, shape=q.shape, dtype=str(q.dtype))
    return run.function(q, k, v, bias, mask, scale=scale)
