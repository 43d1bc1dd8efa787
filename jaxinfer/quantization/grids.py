"""The grids that weights are rounded to: scales chosen for the least error, and levels packed into QTensors.

Shapes: O outputs, I inputs, G groups. A weight is w ~ n * scale + minimum with whole n in low..high; the minimum is 0 where symmetric.
Of fp8 n is a number of e4m3.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from convert.load import QuantSpec
from pallas_kernels import qtensor
from pallas_kernels.errors import QuantizationError
from pallas_kernels.qtensor import QTensor
from pallas_kernels.value_formats import FP8, FP8_MAX, INT4_OFFSET

CLIPS = tuple(1 - 0.03 * i for i in range(12))  # of a group's range, tried in turn
CHUNK = 1 << 23  # weights whose candidates are compared at a time
FP8_STEPS = tuple(
    2 ** (i / 12) for i in range(12)
)  # e4m3 rounds alike whatever its exponent: where between two powers of two is tried
INTEGER = ("int4", "int8")  # formats with even steps
SEARCHED = (*INTEGER, "fp8")  # for which scales and levels are searched


@functools.partial(jax.tree_util.register_dataclass, data_fields=("scales", "minima"), meta_fields=("low", "high", "even"))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """scales, minima: float32 [O, G], exactly as they will be stored; minima None where symmetric. low, high: of the levels. even: they
    are whole numbers, else those of e4m3."""

    scales: jax.Array
    minima: jax.Array | None
    low: int
    high: int
    even: bool = True

    def spread(self, inputs: int) -> "Grid":
        """The same with a scale for every input, [O, I]."""
        wide = lambda a: jnp.repeat(a, inputs // a.shape[-1], -1)
        return dataclasses.replace(self, scales=wide(self.scales), minima=None if self.minima is None else wide(self.minima))


def levels_of(w, scales, minima, low: int, high: int, even: bool = True):
    """The nearest levels, float32 in the shape of w. scales, minima: of a shape that broadcasts to it. Others: of the Grid."""
    w = (w if minima is None else w - minima) / jnp.where(scales == 0, 1, scales)
    return jnp.clip(jnp.rint(w), low, high) if even else jnp.clip(w, low, high).astype(FP8).astype(jnp.float32)


def values_of(levels, scales, minima):
    """What levels stand for."""
    return levels * scales if minima is None else levels * scales + minima


def check_searchable(spec: QuantSpec, name: str) -> None:
    """Raise QuantizationError for a format that is rounded to the nearest only."""
    if spec.format not in SEARCHED:
        raise QuantizationError(f"{name}: {spec.format} is rounded to the nearest only; the method takes {', '.join(SEARCHED)}")


def search_grid(w, importance, spec: QuantSpec, *, clips: tuple[float, ...] = CLIPS) -> Grid:
    """Scales with the least error of rounding to the nearest.

        argmin over scale, minimum of  sum_i importance_i (w_i - round(w_i))^2         for each group of each output

    w: float [O, I]. importance: float [I], such as the mean square of every input. clips: parts of a group's range that are tried.
    INT4 without minima uses all 16 levels -8..7, in either direction; for fp8 no clipping pays, and FP8_STEPS times the range are
    tried instead. Each candidate is refined by least squares for the levels that it gives. Raises QuantizationError for a format that is
    not searched and a group that does not divide I.
    Source: clipping as in AWQ, Lin et al. 2023, arXiv:2306.00978; the signed scale as in GGUF's Q4_0.
    """
    check_searchable(spec, "search_grid")
    inputs = w.shape[1]
    if inputs % (spec.group or inputs):
        raise QuantizationError(f"group {spec.group} does not divide {inputs} inputs; choose one of {qtensor.divisors(inputs)}")
    rows = max(1, CHUNK // inputs)
    parts = [_search(w[at : at + rows], importance, spec, clips) for at in range(0, w.shape[0], rows)]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


@functools.partial(jax.jit, static_argnames=("spec", "clips"))
def _search(w, importance, spec: QuantSpec, clips: tuple[float, ...]) -> Grid:
    outputs, inputs = w.shape
    size = spec.group or inputs
    g = w.astype(jnp.float32).reshape(outputs, -1, size)
    weight = jnp.broadcast_to(importance.astype(jnp.float32).reshape(1, -1, size), g.shape)
    weight = weight + 1e-6 * jnp.mean(weight) + 1e-30  # groups whose inputs never occur are rounded as if all mattered alike
    low, high = _range(spec)
    even = spec.format in INTEGER
    dtype = np.dtype(spec.scale_dtype or qtensor.default_scale_dtype(spec.format))
    stored = lambda a: a.astype(dtype).astype(jnp.float32)
    least, most = g.min(-1, keepdims=True), g.max(-1, keepdims=True)
    extreme = jnp.where(-least > most, least, most)  # of the largest magnitude, with its sign

    def error(scales, minima):
        n = levels_of(g, scales, minima, low, high, even)
        return n, jnp.sum(weight * (g - values_of(n, scales, minima)) ** 2, -1, keepdims=True)

    def refined(n, minima):
        """The scale (and minimum) of least squares for given levels."""
        if minima is None:
            return stored(
                jnp.sum(weight * g * n, -1, keepdims=True) / _positive(jnp.sum(weight * n * n, -1, keepdims=True))
            ), None
        total = jnp.sum(weight, -1, keepdims=True)
        mean_n, mean_w = (jnp.sum(weight * a, -1, keepdims=True) / total for a in (n, g))
        slope = jnp.sum(weight * (g - mean_w) * (n - mean_n), -1, keepdims=True)
        slope = stored(slope / _positive(jnp.sum(weight * (n - mean_n) ** 2, -1, keepdims=True)))
        return slope, stored(mean_w - slope * mean_n)

    def better(best, scales, minima):
        n, e = error(scales, minima)
        finer = refined(n, minima)
        _, finer_error = error(*finer)
        for found, found_error in (((scales, minima), e), (finer, finer_error)):
            take = found_error < best[1]
            kept = jax.tree.map(lambda new, old, take=take: jnp.where(take, new, old), found, best[0])
            best = kept, jnp.where(take, found_error, best[1])
        return best

    def step(best, clip):
        if not spec.symmetric:
            return better(best, stored(clip * (most - least) / (high - low)), stored(clip * least)), None
        best = better(best, stored(clip * jnp.abs(extreme) / high), None)
        if low != -high:  # one level more on one side, which the extreme may lie on
            best = better(best, stored(clip * extreme / low), None)
        return best, None

    first = jnp.zeros_like(least), None if spec.symmetric else jnp.zeros_like(least)
    tried = clips if even or clips == (1.0,) else FP8_STEPS
    (found, _), _ = jax.lax.scan(step, (first, jnp.full_like(least, jnp.inf)), jnp.asarray(tried, jnp.float32))
    scales, minima = found
    return Grid(scales=scales[..., 0], minima=None if minima is None else minima[..., 0], low=low, high=high, even=even)


def rounded_to_range(w, spec: QuantSpec):
    """A weight [O, I] rounded on grids that hold each group's whole range; float32 [O, I]."""
    low, high = _range(spec)
    g = w.astype(jnp.float32).reshape(w.shape[0], -1, spec.group or w.shape[1])
    dtype = np.dtype(spec.scale_dtype or qtensor.default_scale_dtype(spec.format))
    stored = lambda a: a.astype(dtype).astype(jnp.float32)
    if spec.symmetric:
        scales, minima = stored(jnp.max(jnp.abs(g), -1, keepdims=True) / high), None
    else:
        least = g.min(-1, keepdims=True)
        scales, minima = stored((g.max(-1, keepdims=True) - least) / (high - low)), stored(least)
    return values_of(levels_of(g, scales, minima, low, high, spec.format in INTEGER), scales, minima).reshape(w.shape)


def _positive(a):
    return jnp.where(a == 0, 1, a)


def _range(spec: QuantSpec) -> tuple[int, int]:
    """Levels of a format; INT8 leaves -128 out, so that kernels may negate a level."""
    if spec.format == "int8":
        return -127, 127
    if spec.format == "fp8":
        return -int(FP8_MAX), int(FP8_MAX)
    return (-INT4_OFFSET, 15 - INT4_OFFSET) if spec.symmetric else (0, 15)


def nearest(w, grid: Grid):
    """Levels float32 [O, I] of a weight on its grid."""
    wide = grid.spread(w.shape[1])
    return levels_of(w, wide.scales, wide.minima, grid.low, grid.high, grid.even)


def decoded(levels, grid: Grid):
    """The weight float32 [O, I] that levels on a grid stand for."""
    wide = grid.spread(levels.shape[1])
    return values_of(levels, wide.scales, wide.minima)


def packed(levels, grid: Grid, spec: QuantSpec) -> QTensor:
    """A numpy QTensor of levels [O, I] on a grid. Raises QuantizationError for NaN or infinite scales."""
    dtype = np.dtype(spec.scale_dtype or qtensor.default_scale_dtype(spec.format))
    scales, n = np.asarray(grid.scales), np.asarray(levels)
    minima = None if grid.minima is None else np.asarray(grid.minima).astype(dtype)
    if not np.isfinite(scales).all() or (minima is not None and not np.isfinite(minima).all()):
        raise QuantizationError(f"a scale is not finite as {dtype}; the weight holds NaN, or values too large for these scales")
    four, kind = spec.format == "int4", qtensor.value_format(spec.format)
    return QTensor(
        values=qtensor.pack_int4((n - grid.low).astype(np.uint8), spec.group) if four else n.astype(kind.dtype),
        scales=scales.astype(dtype),
        zeros=minima,
        format=spec.format,
        group=spec.group,
        activation=spec.activation,
    )
