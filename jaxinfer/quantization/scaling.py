"""Scales of inputs that are moved from a matrix into what makes its inputs: AWQ's and SmoothQuant's. Nothing is computed at run time.

    W x = (W diag(s)) (x / s)           x / s by dividing the norm before, the rows of v before o, or the rows of up before down

The function of the model stays the same; what changes is which inputs of a matrix have fine steps.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.load import QuantSpec
from jaxinfer.models.config import ModelConfig
from jaxinfer.quantization.calibration import InputStatistics
from jaxinfer.quantization.grids import INTEGER, rounded_to_range

RATIOS = tuple(i / 10 for i in range(11))  # exponents that AWQ tries
SMOOTHING = 0.5  # SmoothQuant's exponent: halfway between inputs and weights
LARGEST = 1e4  # of a factor, and one over it the smallest

type Values = dict[str, np.ndarray]  # the float32 parameters of half a layer by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Where inputs can be scaled. matrices: that share the inputs. source: the parameter whose rows or entries make them; vectors: what
    is divided beside it. shift: of a norm that multiplies by 1 + its scale. repeat: kv heads serve so many query heads each."""

    matrices: tuple[str, ...]
    source: str
    vectors: tuple[str, ...] = ()
    shift: float = 0.0
    repeat: int = 1
    head_dim: int = 1

    def only(self, *matrices: str) -> "Site":
        """The same with some of its matrices."""
        return dataclasses.replace(self, matrices=matrices)


def sites(config: ModelConfig, half: str, names: Sequence[str]) -> tuple[Site, ...]:
    """The sites of half a layer whose parameters have these names."""
    present = lambda *wanted: tuple(name for name in wanted if name in names)
    shift = 1.0 if config.norm == "rms_offset" else 0.0
    after_norm = lambda *matrices: Site(matrices=matrices, source="norm", vectors=present("norm_bias"), shift=shift)
    if half == "attention":
        a = config.attention
        out = Site(matrices=("o",), source="v", vectors=present("v_bias"), repeat=a.heads // a.kv_heads, head_dim=a.head_dim)
        return after_norm("q", "k", "v"), out
    first = after_norm(*present("gate", "up"))
    if not config.mlp.gated:  # what lies between up and down is not linear in up
        return (first,)
    return first, Site(matrices=("down",), source="up", vectors=present("up_bias"))


def scaled(values: Values, site: Site, factors: np.ndarray) -> Values:
    """The parameters with inputs divided by `factors` [inputs of the source], and the site's matrices multiplied."""
    out, wide = dict(values), spread(factors, site)
    for name in site.matrices:
        out[name] = values[name] * wide
    source = values[site.source] + np.float32(site.shift)
    out[site.source] = source / (factors if source.ndim == 1 else factors[:, None]) - np.float32(site.shift)
    for name in site.vectors:
        out[name] = values[name] / factors
    return out


def spread(factors, site: Site):
    """A factor for every input of the matrices: rows of kv heads are read by `repeat` query heads."""
    if site.repeat == 1:
        return factors
    return factors.reshape(-1, 1, site.head_dim).repeat(site.repeat, 1).reshape(-1)


def gathered(amounts, site: Site):
    """One amount for every entry of the source: the mean over the query heads that read it."""
    if site.repeat == 1:
        return amounts
    return amounts.reshape(-1, site.repeat, site.head_dim).mean(1).reshape(-1)


def smoothing_factors(
    values: Mapping[str, Any], statistics: InputStatistics, site: Site, *, strength: float = SMOOTHING
) -> np.ndarray:
    """SmoothQuant's factors, float32 [inputs of the source].

        s_j = max|x_j|^strength / max|w_j|^(1 - strength)

    Source: Xiao et al. 2022, arXiv:2211.10438.
    """
    largest = np.max([np.abs(values[name]).max(0) for name in site.matrices], 0)
    inputs, weights = (gathered(np.asarray(a), site) for a in (statistics.largest, largest))
    return _bounded(inputs**strength / np.maximum(weights, 1e-8) ** (1 - strength))


def awq_factors(
    values: Mapping[str, Any],
    statistics: InputStatistics,
    site: Site,
    specs: Mapping[str, QuantSpec | None],
    *,
    ratios: Sequence[float] = RATIOS,
) -> np.ndarray:
    """AWQ's factors, float32 [inputs of the source]: those among s_j = mean|x_j|^ratio with the least error of the outputs.

        argmin over ratio of  sum over matrices of  tr(E H E^T),   E = Q(W diag(s)) diag(1/s) - W,   H = X^T X

    specs: how each matrix is rounded; those that are not take no part. A ratio of 0 leaves everything as it is.
    Source: Lin et al. 2023, arXiv:2306.00978.
    """
    tried = tried_factors(values, statistics, site, specs, ratios=ratios)
    return tried.factors[int(np.argmin(tried.errors))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """factors: float32 [n, inputs of the source]. errors: of the outputs with each row of them, [n]."""

    factors: np.ndarray
    errors: np.ndarray


def tried_factors(
    values: Mapping[str, Any],
    statistics: InputStatistics,
    site: Site,
    specs: Mapping[str, QuantSpec | None],
    *,
    amounts=None,
    ratios: Sequence[float] = RATIOS,
) -> Tried:
    """What `awq_factors` chooses from. amounts: mean|x_j| that the factors are powers of, in place of the statistics' own."""
    amounts = gathered(np.asarray(statistics.mean if amounts is None else amounts), site)
    rounded = [(jnp.asarray(values[name]), spec) for name in site.matrices if (spec := specs[name]) and spec.format in INTEGER]
    if not rounded:
        return Tried(factors=np.ones((1, len(amounts)), np.float32), errors=np.zeros(1))
    factors = np.stack([_bounded(amounts**ratio) for ratio in ratios])
    wide = jnp.asarray(np.stack([spread(f, site) for f in factors]))
    errors = sum(_scaled_errors(w, statistics.hessian, wide, spec) for w, spec in rounded)
    return Tried(factors=factors, errors=np.asarray(errors))


@functools.partial(jax.jit, static_argnames="spec")
def _scaled_errors(w, hessian, factors, spec: QuantSpec):
    """The error of the outputs for each row of factors [n, I], every weight rounded on the grid of its group's range."""

    def one(factors):
        difference = rounded_to_range(w * factors, spec) / factors - w
        return jnp.sum(jnp.matmul(difference, hessian, precision=jax.lax.Precision.HIGHEST) * difference)

    return jax.lax.map(one, factors)


@jax.jit
def output_error(difference, hessian):
    """tr(E H E^T): the mean square that a difference [O, I] of weights makes in the outputs, summed over them."""
    return jnp.sum(jnp.matmul(difference, hessian, precision=jax.lax.Precision.HIGHEST) * difference)


def _bounded(factors: np.ndarray) -> np.ndarray:
    """Factors around 1: divided by the middle of their range; those of inputs that never occur are 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        usable = np.isfinite(factors) & (factors > 0)
        if not usable.any():
            return np.ones(factors.shape, np.float32)
        middle = np.sqrt(factors[usable].max() * factors[usable].min())
        out = np.where(usable, factors / middle, 1.0)
    return np.clip(out, 1 / LARGEST, LARGEST).astype(np.float32)
