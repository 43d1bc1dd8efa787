"""Methods without training: half a layer's parameters and what its inputs are like -> quantised parameters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.load import QuantSpec
from jaxinfer.models.config import ModelConfig
from jaxinfer.quantization.calibration import InputStatistics
from jaxinfer.quantization.gptq import gptq
from jaxinfer.quantization.grids import CLIPS, SEARCHED, check_searchable, nearest, packed, search_grid
from jaxinfer.quantization.scaling import awq_factors, output_error, scaled, sites, smoothing_factors, spread
from pallas_kernels import qtensor
from pallas_kernels.errors import QuantizationError
from pallas_kernels.qtensor import QTensor

METHODS = ("rtn", "gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How levels are chosen.

    name: one of METHODS. rtn rounds to the nearest level of a grid; gptq makes up for each error with the inputs that follow; awq and
    smoothquant scale inputs first. clip: grids of the least error (weighted by the inputs where there is a text), else of the largest
    weight. damping, act_order: see `gptq`. strength: of smoothquant, from inputs (1) to weights (0). static_inputs: where inputs are
    rounded, one scale for all of them is fixed by the text. Raises QuantizationError.
    """

    name: str = "rtn"
    clip: bool = True
    damping: float = 0.01
    act_order: bool = True
    strength: float = 0.5
    static_inputs: bool = False

    def __post_init__(self):
        if self.name not in METHODS:
            raise QuantizationError(f"method {self.name!r} is not one of {', '.join(METHODS)}")
        if not 0 < self.damping <= 1:
            raise QuantizationError(f"damping is {self.damping}; give a number above 0, at most 1")
        if not 0 <= self.strength <= 1:
            raise QuantizationError(f"strength is {self.strength}; give a number from 0 to 1")

    @property
    def reads_text(self) -> bool:
        """Whether there is no method without a calibration text."""
        return self.name != "rtn" or self.static_inputs

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.name.split("+"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """errors: by matrix, the mean square of the error that rounding makes in its outputs, relative to that of the outputs themselves.
    plainly: experts' matrices that were rounded to the nearest, because the text sent them too few tokens, such as "mlp.up[3]"."""

    layer: int
    errors: Mapping[str, float]
    plainly: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Half:
    """The parameters of half a layer, quantised, and the errors of its matrices. values: float32 arrays and QTensors by name. plainly: see
    LayerReport, with the whole paths."""

    values: dict[str, Any]
    errors: dict[str, float]
    plainly: tuple[str, ...] = ()


def check_whole(values: Mapping[str, np.ndarray], where: str) -> None:
    """Raise QuantizationError for NaN and infinity."""
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise QuantizationError(f"{where}{name} holds NaN or infinity; repair the checkpoint before quantising")


def relative_error(q: QTensor, w, seen: InputStatistics) -> tuple[float, float]:
    """Mean squares over the text, summed over outputs: of the error that rounding makes in them, and of what they are."""
    w = jnp.asarray(w)
    lost = output_error(jnp.asarray(qtensor.dequantize(q)) - w, seen.hessian)
    return float(lost), float(output_error(w, seen.hessian))


def quantize_half(
    values: dict[str, np.ndarray],
    statistics: Mapping[str, InputStatistics] | None,
    specs: Mapping[str, QuantSpec | None],
    method: Method,
    *,
    config: ModelConfig,
    half: str,
    where: str = "",
) -> Half:
    """Quantise half a layer.

    values: its float32 parameters by name. statistics: of the inputs of its matrices, or None without a text. specs: of its matrices,
    None for one that stays as it is. where: names the layer in messages. Raises QuantizationError for NaN, and for a format or group
    that the method or the matrix does not have.
    """
    check_whole(values, where)
    statistics = dict(statistics or {})
    if "awq" in method.parts or "smoothquant" in method.parts:
        for site in sites(config, half, tuple(values)):
            seen = statistics[site.matrices[0]]
            if "awq" in method.parts:
                factors = awq_factors(values, seen, site, specs)
            else:
                factors = smoothing_factors(values, seen, site, strength=method.strength)
            values = scaled(values, site, factors)
            divided = seen.divided(jnp.asarray(spread(factors, site)))
            statistics |= dict.fromkeys(site.matrices, divided)
    out: dict[str, Any] = dict(values)
    errors = {}
    for name, spec in specs.items():
        if spec is None:
            continue
        w, inputs = jnp.asarray(values[name]), statistics.get(name)
        out[name] = q = rounded(w, inputs, spec, method, where + name)
        if inputs is not None:
            lost, whole = relative_error(q, w, inputs)
            errors[name] = lost / max(whole, 1e-30)
    return Half(values=out, errors=errors)


def rounded(w, seen: InputStatistics | None, spec: QuantSpec, method: Method, name: str) -> QTensor:
    """A weight float32 [O, I] as the method rounds it; seen: of its inputs, or None without a text."""
    if w.shape[1] % (spec.group or 1):
        raise QuantizationError(
            f"{name}: groups of {spec.group} do not divide its {w.shape[1]} inputs; choose one of {qtensor.divisors(w.shape[1])}"
        )
    if "gptq" in method.parts:
        check_searchable(spec, name)
    if spec.format not in SEARCHED or (not method.clip and "gptq" not in method.parts):
        return qtensor.round_to_nearest(np.asarray(w), **dataclasses.asdict(spec) | {"activation": spec.activation})
    importance = jnp.ones(w.shape[1]) if seen is None else seen.importance
    grid = search_grid(w, importance, spec, clips=CLIPS if method.clip else (1.0,))
    if "gptq" not in method.parts:
        return packed(nearest(w, grid), grid, spec)
    assert seen is not None
    levels = gptq(w, seen.hessian, grid, damping=method.damping, act_order=method.act_order, name=name)
    return packed(levels, grid, spec)
