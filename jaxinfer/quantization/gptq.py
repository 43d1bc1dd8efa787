"""GPTQ: levels chosen one input after the other, each one's error made up for by the inputs that follow."""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from jaxinfer.quantization.grids import Grid, levels_of, values_of
from pallas_kernels.errors import QuantizationError

BLOCK = 128  # inputs whose errors reach the rest of the weight in one product
STRONGER = 10  # times the damping, where the Hessian is not positive definite with it
ATTEMPTS = 4


def gptq(w, hessian, grid: Grid, *, damping: float = 0.01, act_order: bool = True, name: str = "gptq"):
    """Levels float32 [O, I] of a weight on a grid.

        minimise  tr((w - q) H (w - q)^T),   q = decoded levels,   H = X^T X + damping * mean(diag(X^T X)) * 1

    w: float32 [O, I]. hessian: X^T X, float32 [I, I], of the inputs X. act_order: inputs in the order of falling H_ii; the groups of the
    scales stay runs of inputs, so that the result is packed like any other. Inputs that never occur are rounded to the nearest.
    Raises QuantizationError where H holds NaN, or is not positive definite with 1000 times the damping either.
    Source: Frantar et al. 2022, arXiv:2210.17323.
    """
    diagonal = jnp.diag(hessian)
    if not bool(jnp.isfinite(diagonal).all()):
        raise QuantizationError(
            f"{name}: the calibration inputs hold NaN or infinity; is the model whole, and its dtype wide enough?"
        )
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(len(diagonal))
    for attempt in range(ATTEMPTS):
        factor = _factor(hessian, order, damping * STRONGER**attempt)
        if bool(jnp.isfinite(factor).all()):
            wide = grid.spread(w.shape[1])
            return _rounded(w, factor, order, wide.scales, wide.minima, low=grid.low, high=grid.high, even=grid.even)
    raise QuantizationError(f"{name}: X^T X is not positive definite; give more calibration text, or a damping above {damping}")


@jax.jit
def _factor(hessian, order, damping):
    """U [I, I], upper triangular, with U^T U = H^-1 for the inputs in `order`; NaN where H is not positive definite."""
    h = hessian[order][:, order]
    diagonal = jnp.diag(h)
    h = h + jnp.diag(jnp.where(diagonal > 0, damping * jnp.mean(diagonal), 1.0))
    # H = V V^T with V upper, by the Cholesky factor of H read backwards: one factor and no inverse of H
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    return solve_triangular(lower, jnp.eye(h.shape[0], dtype=h.dtype), lower=True)[::-1, ::-1]


@functools.partial(jax.jit, static_argnames=("low", "high", "even"))
def _rounded(w, factor, order, scales, minima, *, low: int, high: int, even: bool):
    inputs, outputs = w.shape[1], w.shape[0]
    block = next(b for b in range(min(BLOCK, inputs), 0, -1) if inputs % b == 0)
    # inputs first, so that one input of all outputs is one row
    by_input = lambda a: a.T[order]
    rest, scales = by_input(w.astype(jnp.float32)), by_input(scales)
    minima = jnp.zeros_like(scales) if minima is None else by_input(minima)
    position = jnp.arange(inputs)

    def one_block(b, carry):
        rest, levels = carry
        at = b * block
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, at, block)
        mine, s, m = cut(rest), cut(scales), cut(minima)
        rows = jax.lax.dynamic_slice(factor, (at, 0), (block, inputs))
        square = jax.lax.dynamic_slice(rows, (0, at), (block, block))

        def one_input(i, carry):
            mine, chosen, errors = carry
            n = levels_of(mine[i], s[i], m[i], low, high, even)
            error = (mine[i] - values_of(n, s[i], m[i])) / square[i, i]
            later = jnp.where(jnp.arange(block) > i, square[i], 0)
            return mine - later[:, None] * error, chosen.at[i].set(n), errors.at[i].set(error)

        nothing = jnp.zeros((block, outputs), jnp.float32)
        _, chosen, errors = jax.lax.fori_loop(0, block, one_input, (mine, nothing, nothing))
        beyond = jnp.where(position >= at + block, rows, 0)
        rest = rest - jnp.matmul(beyond.T, errors, precision=jax.lax.Precision.HIGHEST)
        return rest, jax.lax.dynamic_update_slice_in_dim(levels, chosen, at, 0)

    start = rest, jnp.zeros((inputs, outputs), jnp.float32)
    _, levels = jax.lax.fori_loop(0, inputs // block, one_block, start)
    return jnp.zeros_like(levels).at[order].set(levels).T
