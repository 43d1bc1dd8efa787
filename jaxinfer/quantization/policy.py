"""From a dtype and a QuantizationConfig to how each tensor is kept: cast, quantised, or as the checkpoint has it."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from convert.load import QuantSpec, as_float, cast, checked, quantized, with_activation
from convert.readers.base import LazyTensor, dtype_named
from jaxinfer.config import FLOATS, QuantizationConfig
from jaxinfer.errors import ConfigError, QuantizationError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import ParameterInfo
from jaxinfer.values import DTYPES
from pallas_kernels.qtensor import ActivationQuant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """How a tensor is kept. spec: it is quantised so. dtype: else floats of this dtype, None for their own. stored: packed tensors stay
    packed; groups of activation scales are made to divide `unit` inputs. inputs: what says how those of packed tensors are quantised, in
    place of the checkpoint."""

    spec: QuantSpec | None = None
    dtype: str | None = None
    stored: bool = False
    unit: int = 1
    inputs: QuantizationConfig | None = None

    def of(self, tensor: LazyTensor) -> LazyTensor:
        """The tensor in this form; still lazy. Raises QuantizationError where a group does not divide its inputs."""
        if self.spec is not None:
            return quantized(as_float(tensor), self.spec)
        if self.stored and tensor.packed is not None:
            activation = tensor.packed.activation
            if self.inputs is not None:
                if not tensor.packed.format.startswith("int"):
                    raise QuantizationError(
                        f"{tensor.name} is stored as {tensor.packed.format}; inputs are chosen for int8 and int4 weights: name the "
                        "form of the others in quantization.rules"
                    )
                activation = self.inputs.activation
            elif activation is None or activation.static:
                return checked(tensor)
            return with_activation(tensor, activation and _fitted(activation, self.unit))
        if self.stored and self.dtype is None:
            return checked(tensor)
        return as_float(tensor) if self.dtype is None else cast(as_float(tensor), dtype_named(self.dtype))


def attending(config: ModelConfig, quantization: QuantizationConfig | None) -> ModelConfig:
    """The model with the attention that a quantisation asks for."""
    if quantization is None or not quantization.enabled or quantization.attention_bits == 16:
        return config
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, integer=True))


def stored_as(
    tensors: Mapping[str, LazyTensor],
    parameters: Mapping[str, ParameterInfo],
    *,
    dtype: str | None,
    quantization: QuantizationConfig | None,
    head_dim: int,
) -> dict[str, LazyTensor]:
    """Every tensor by module path as it is to be kept, see `kept`; still lazy."""
    how = kept(parameters, dtype=dtype, quantization=quantization, head_dim=head_dim)
    return {path: how[path].of(tensor) for path, tensor in tensors.items()}


def kept(
    parameters: Mapping[str, ParameterInfo], *, dtype: str | None, quantization: QuantizationConfig | None, head_dim: int
) -> dict[str, Kept]:
    """How every parameter is kept, by module path.

    Vectors are float32. Matrices: quantised as `quantization` and its rules say; else cast to `dtype`, packed ones decoded; else as they
    are stored. Groups of activation scales never straddle two heads, so that a mesh that splits heads gives the same numbers.
    Raises ConfigError for a pattern that matches no matrix.
    """
    out: dict[str, Kept] = {}
    matrices = [path for path, info in parameters.items() if len(info.axes) > 1 and info.axes[0] is not None]
    by_rule = {} if quantization is None or not quantization.enabled else matched(matrices, quantization)
    for path, info in parameters.items():
        unit = head_dim if info.axes[-1] == "heads" else info.shape[-1]
        if len(info.axes) == 1 or (info.axes[0] is None and dtype is None):
            out[path] = Kept(dtype="float32")
        elif quantization is not None and quantization.enabled:
            # learned positions are a table that is read, not multiplied
            rule = by_rule[path] if path in by_rule else None if info.axes[0] is None else _by_default(info, quantization)
            if isinstance(rule, QuantizationConfig):
                floats = FLOATS.get(rule.weight_bits)
                half = dtype if floats == "bfloat16" and dtype == "float16" else floats
                if rule.weight_format == "stored":
                    out[path] = Kept(dtype=dtype, stored=True, unit=unit, inputs=rule)
                else:
                    out[path] = Kept(dtype=half) if floats else Kept(spec=spec_of(rule, unit))
            else:
                out[path] = Kept(dtype=rule or dtype)
        else:
            out[path] = Kept(dtype=dtype, stored=dtype is None, unit=unit)
    return out


def matched(matrices: Iterable[str], quantization: QuantizationConfig) -> dict[str, QuantizationConfig | str | None]:
    """For each matrix that a pattern matches what it says: a quantisation, a dtype, or None for the floats that it has.

    Raises ConfigError for a pattern that matches none.
    """
    matrices = list(matrices)
    rules: list[tuple[str, str | None]] = [(pattern, None) for pattern in quantization.skip]
    rules += list((quantization.rules or {}).items())
    out: dict[str, QuantizationConfig | str | None] = {}
    for pattern, form in rules:
        found = fnmatch.filter(matrices, pattern)
        if not found:
            near = difflib.get_close_matches(pattern, matrices, 1, cutoff=0)
            known = f"; matrices are named like {near[0]!r}" if near else ""
            raise ConfigError(f"the pattern {pattern!r} of the quantisation matches no matrix{known}")
        value = form if form is None or form in DTYPES else QuantizationConfig.parse(form)
        out |= {path: value for path in found if path not in out}
    return out


def _by_default(info: ParameterInfo, q: QuantizationConfig) -> QuantizationConfig | None:
    """What a matrix without a rule is. Embedding and head are INT8, a scale per channel, or INT4, with the inputs of the others."""
    if info.axes[0] != "vocab" or q.weight_format == "stored" or (q.head_bits is None and q.weight_bits in FLOATS):
        return q
    if q.head_bits == 16:
        return None
    inputs: dict[str, Any] = {
        "activation_bits": 16 if q.activation is None else 8,
        "activation_group_size": q.activation_group_size,
    }
    if q.head_bits == 4:
        four = q.format == "int4"
        return QuantizationConfig(
            weight_bits=4, group_size=q.group if four else 64, symmetric=q.symmetric or not four, **inputs
        )
    return QuantizationConfig(**inputs)


def spec_of(q: QuantizationConfig, unit: int) -> QuantSpec:
    """How a matrix without rules is quantised; unit: inputs that no group of activation scales straddles.

    Raises ConfigError for weights that stay as they are stored.
    """
    if q.weight_format == "stored":
        raise ConfigError(
            "weight_format 'stored' rounds no weights: leave it out where they are rounded, or written for other systems"
        )
    activation = q.activation and _fitted(q.activation, unit)
    return QuantSpec(format=q.format, group=q.group, symmetric=q.symmetric, activation=activation)


def _fitted(activation: ActivationQuant, unit: int) -> ActivationQuant:
    """The same with the largest group that divides `unit` inputs."""
    if activation.group is None:
        return activation
    size = next(g for g in range(min(activation.group, unit), 0, -1) if unit % g == 0)
    return dataclasses.replace(activation, group=size)
