"""Methods for the half of a layer that has experts: each expert's matrices by the tokens that were routed to it.

Shapes: E experts, D embed, F their width, I inputs of a matrix.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.load import QuantSpec
from jaxinfer.models.config import ModelConfig
from jaxinfer.quantization.calibration import ExpertStatistics
from jaxinfer.quantization.methods import Half, Method, check_whole, relative_error, rounded
from jaxinfer.quantization.scaling import Site, awq_factors, scaled, smoothing_factors, tried_factors
from pallas_kernels.qtensor import QTensor

FEWEST = (
    64  # tokens that an expert must have seen; of fewer a Hessian says little, and its matrices are rounded as without a text
)
MATRICES = ("gate", "up", "down")


def quantize_experts(
    values: dict[str, np.ndarray],
    statistics: Mapping[str, ExpertStatistics] | None,
    specs: Mapping[str, QuantSpec | None],
    method: Method,
    *,
    config: ModelConfig,
    where: str = "",
) -> Half:
    """Quantise the half layer that has experts.

    values: its float32 parameters: norm [D], router [E, D], gate and up [E, F, D], down [E, D, F]. statistics: of the inputs of gate, up
    and down, or None without a text. specs: of these, None for one that stays as it is. where: names the layer in messages. Scales of
    inputs that the norm makes are the same for all experts and go into the router too; those between up and down are each expert's own.
    An expert that saw fewer than FEWEST tokens is rounded to the nearest; the result names it. Raises QuantizationError as
    `quantize_half` does.
    """
    check_whole(values, where)
    if statistics is not None and {"awq", "smoothquant"} & {*method.parts}:
        values, statistics = scaled_experts(values, statistics, specs, method, config)
    out: dict[str, Any] = dict(values)
    errors: dict[str, float] = {}
    plainly: list[str] = []
    for name in MATRICES:
        if (spec := specs[name]) is None:
            continue
        parts: list[QTensor] = []
        lost, size = 0.0, 0.0
        for e, w in enumerate(values[name]):
            path, how = f"{where}{name}[{e}]", method
            seen = None if statistics is None else statistics[name].experts[e]
            if statistics is not None and not _enough(statistics[name], e):
                seen, how = None, Method(clip=method.clip)
                plainly.append(path)
            q = rounded(jnp.asarray(w), seen, spec, how, path)
            parts.append(q)
            if seen is not None:
                error, whole = relative_error(q, w, seen)
                share = float(statistics[name].tokens[e]) if statistics is not None else 1.0
                lost, size = lost + share * error, size + share * whole
        out[name] = jax.tree.map(lambda *arrays: np.stack([np.asarray(a) for a in arrays]), *parts)
        if size:
            errors[name] = lost / size
    return Half(values=out, errors=errors, plainly=tuple(plainly))


def _enough(statistics: ExpertStatistics, expert: int) -> bool:
    return int(statistics.tokens[expert]) >= FEWEST


def scaled_experts(
    values: dict[str, np.ndarray],
    statistics: Mapping[str, ExpertStatistics],
    specs: Mapping[str, QuantSpec | None],
    method: Method,
    config: ModelConfig,
) -> tuple[dict[str, np.ndarray], dict[str, ExpertStatistics]]:
    """Parameters of the same function with scaled inputs, and the statistics of these; the method is awq or smoothquant."""
    shift = 1.0 if config.norm == "rms_offset" else 0.0
    first, experts = Site(matrices=("gate", "up", "router"), source="norm", shift=shift), range(len(values["up"]))
    awq, seen = "awq" in method.parts, statistics["up"]
    of = lambda e: {name: values[name][e] for name in MATRICES}
    if awq:
        weighed = [e for e in experts if _enough(seen, e)]
        tried = [
            tried_factors(of(e), seen.experts[e], first.only("gate", "up"), specs, amounts=seen.together.mean) for e in weighed
        ]
        shares = [float(seen.tokens[e]) for e in weighed]
        errors = [share * choice.errors for share, choice in zip(shares, tried, strict=True)]
        factors = tried[0].factors[int(np.argmin(np.sum(errors, 0)))] if tried else np.ones(config.embed, np.float32)
    else:
        joined = {name: values[name].reshape(-1, values[name].shape[-1]) for name in ("gate", "up")}
        factors = smoothing_factors(joined, seen.together, first.only("gate", "up"), strength=method.strength)
    values = scaled(values, first, factors)
    divided = seen.divided([factors] * len(values["up"]))
    inner, own = Site(matrices=("down",), source="up"), []
    up, down = values["up"].copy(), values["down"].copy()
    for e in experts:
        mine: np.ndarray = np.ones(up.shape[1], np.float32)
        if _enough(statistics["down"], e):
            part: dict[str, np.ndarray] = {"up": up[e], "down": down[e]}
            inputs = statistics["down"].experts[e]
            mine = (
                awq_factors(part, inputs, inner, specs)
                if awq
                else smoothing_factors(part, inputs, inner, strength=method.strength)
            )
            part = scaled(part, inner, mine)
            up[e], down[e] = part["up"], part["down"]
        own.append(mine)
    values = values | {"up": up, "down": down}
    return values, {"gate": divided, "up": divided, "down": statistics["down"].divided(own)}
