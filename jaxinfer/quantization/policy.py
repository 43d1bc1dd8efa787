"""From a dtype and a QuantizationConfig to how each tensor is kept: cast, quantised, or as the checkpoint has it."""

import dataclasses
from collections.abc import Mapping

from convert.load import QuantSpec, as_float, cast, checked, quantized, with_activation
from convert.readers.base import LazyTensor, dtype_named
from jaxinfer.config import QuantizationConfig
from jaxinfer.models.decoder import ParameterInfo
from pallas_kernels.qtensor import ActivationQuant


def stored_as(
    tensors: Mapping[str, LazyTensor],
    parameters: Mapping[str, ParameterInfo],
    *,
    dtype: str | None,
    quantization: QuantizationConfig | None,
    head_dim: int,
) -> dict[str, LazyTensor]:
    """Every tensor by module path as it is to be kept; still lazy.

    Vectors are float32. Matrices: quantised as `quantization` says; else cast to `dtype`, packed ones decoded; else as they are stored.
    Groups of activation scales never straddle two heads, so that a mesh that splits heads gives the same numbers.
    """
    out = {}
    for path, tensor in tensors.items():
        axes = parameters[path].axes
        if len(axes) == 1 or (axes[0] is None and dtype is None):
            out[path] = cast(as_float(tensor), "float32")
        elif quantization is not None and quantization.enabled:
            out[path] = _quantized(path, tensor, axes, quantization, head_dim)
        elif dtype is not None:
            out[path] = cast(as_float(tensor), dtype_named(dtype))
        else:
            out[path] = _kept(tensor, axes, head_dim)
    return out


def _kept(tensor: LazyTensor, axes: tuple[str | None, ...], head_dim: int) -> LazyTensor:
    activation = tensor.packed and tensor.packed.activation
    if not activation:
        return checked(tensor)
    return with_activation(tensor, _fitted(activation, head_dim if axes[-1] == "heads" else tensor.shape[-1]))


def _quantized(path: str, tensor: LazyTensor, axes: tuple[str | None, ...], q: QuantizationConfig, head_dim: int) -> LazyTensor:
    if axes[0] is None:  # learned positions: a table that is read, not multiplied
        return as_float(tensor)
    inputs = tensor.shape[-1]
    activation = q.activation and _fitted(q.activation, head_dim if axes[-1] == "heads" else inputs)
    if axes[0] == "vocab":
        if q.head_bits == 16:
            return as_float(tensor)
        return quantized(as_float(tensor), QuantSpec(format="int8", group=None, symmetric=True, activation=activation))
    spec = QuantSpec(format=f"int{q.weight_bits}", group=q.group, symmetric=q.symmetric, activation=activation)
    return quantized(as_float(tensor), spec)


def _fitted(activation: ActivationQuant, unit: int) -> ActivationQuant:
    """The same with the largest group that divides `unit` inputs."""
    if activation.group is None:
        return activation
    size = next(g for g in range(min(activation.group, unit), 0, -1) if unit % g == 0)
    return dataclasses.replace(activation, group=size)
