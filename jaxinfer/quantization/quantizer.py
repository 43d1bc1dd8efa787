"""Layer by layer: from a model's lazy tensors and a text to quantised tensors.

A layer is read, sees the text as the quantised layers before it have left it, is quantised half by half, and is written into a folder
of work before the next one is read: beside the hidden states of the text, memory holds one layer, and a run that was interrupted goes on
where it was.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.load import as_float, cast
from convert.readers.base import LazyTensor, PackedFormat, Shard, dtype_named
from jaxinfer.models.blocks import MLP, Attention
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import POST_NORMS, DecoderWeights, LayerWeights, embed, parameters
from jaxinfer.models.experts import MoE
from jaxinfer.placement import InMemory
from jaxinfer.quantization.calibration import HALVES, InputStatistics, Layers, input_statistics
from jaxinfer.quantization.experts import quantize_experts
from jaxinfer.quantization.methods import LayerReport, Method, quantize_half, rounded
from jaxinfer.quantization.policy import Kept
from pallas_kernels import qtensor
from pallas_kernels.errors import QuantizationError
from pallas_kernels.norm import norm
from pallas_kernels.qtensor import QTensor
from sharding.partition import Units

type Progress = Callable[[int, int, str], None]


class Quantizer:
    """A model that is being quantised.

    tensors: by module path. kept: how each matrix is to be kept, of `policy.kept`. tokens: int32 [S, T] of calibration, or None.
    work: the folder of what is done already; its name should come from `key`. Raises QuantizationError for a method without its text.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        config: ModelConfig,
        kept: Mapping[str, Kept],
        method: Method,
        *,
        tokens: np.ndarray | None,
        work: Path,
    ):
        if method.reads_text and tokens is None:
            raise QuantizationError(f"the method {method.name} needs a calibration text; give one, or take rtn")
        self.tensors, self.config, self.kept, self.method = tensors, config, kept, method
        self.tokens, self.work = tokens, work
        self.paths = [path for path in parameters(config) if path.startswith("blocks.")]

    def run(self, progress: Progress | None = None) -> list[LayerReport]:
        """Quantise all layers that are not in the folder of work yet. progress(done, total, name) counts layers."""
        self.work.mkdir(parents=True, exist_ok=True)
        done = next((i for i in range(self.config.layers) if not self._file(i).is_file()), self.config.layers)
        hidden = None
        if self.tokens is not None and done < self.config.layers:
            hidden = self._embedded() if done == 0 else np.load(self._hidden(done - 1))
        layers = None if self.tokens is None else Layers(self.config, self.tokens.shape[1])
        for i in range(done, self.config.layers):
            if progress:
                progress(i, self.config.layers, f"layer {i}")
            hidden = self._layer(i, layers, hidden)
        if not self._file(self.config.layers).is_file():
            self._ends()
        if progress:
            progress(self.config.layers, self.config.layers, "layers")
        return [self._report(i) for i in range(self.config.layers)]

    def results(self) -> dict[str, LazyTensor]:
        """Every tensor of the model by module path, in the form that it was given; those of layers lie in the folder of work."""
        out: dict[str, LazyTensor] = {}
        for path, tensor in self.tensors.items():
            if path in self.paths:
                out[path] = _Stored(tensor.name, path, tensor.shape, self._file(int(path.split(".")[1])))
            elif path in self._searched():
                out[path] = _Stored(tensor.name, path, tensor.shape, self._file(self.config.layers))
            else:
                out[path] = self.kept[path].of(tensor)
        return out

    def _layer(self, i: int, layers: Layers | None, hidden: np.ndarray | None) -> np.ndarray | None:
        prefix = f"blocks.{i}."
        values: dict[str, Any] = dict(read_layer(self.tensors, i))
        errors: dict[str, float] = {}
        plainly: tuple[str, ...] = ()
        for half in HALVES:
            part = {name.removeprefix(f"{half}."): v for name, v in values.items() if name.startswith(f"{half}.")}
            specs = {name: self.kept[f"{prefix}{half}.{name}"].spec for name in part if part[name].ndim > 1}
            where = f"{prefix}{half}."
            if half == "mlp" and self.config.kind(i) == "moe":
                routed = layers.experts(layer_weights(values), hidden, i) if layers is not None and hidden is not None else None
                done = quantize_experts(part, routed, specs, self.method, config=self.config, where=where)
            else:
                inputs = (
                    layers.inputs(half, layer_weights(values), hidden, i) if layers is not None and hidden is not None else None
                )
                done = quantize_half(part, inputs, specs, self.method, config=self.config, half=half, where=where)
            plainly += done.plainly
            values |= {f"{half}.{name}": value for name, value in done.values.items()}
            if self.method.static_inputs and layers is not None and hidden is not None:
                for name, scale in layers.scales(half, layer_weights(values), hidden, i).items():
                    values[f"{half}.{name}"] = _at_static_scale(values[f"{half}.{name}"], scale)
            errors |= {f"{half}.{name}": error for name, error in done.errors.items()}
            if layers is not None and hidden is not None:
                hidden = layers.run(half, layer_weights(values), hidden, i)
        if hidden is not None and not np.isfinite(hidden).all():
            raise QuantizationError(f"layer {i} gives NaN or infinity on the calibration text; is the checkpoint whole?")
        if hidden is not None:
            _write(self._hidden(i), lambda file: np.save(file, hidden))
        self._save(i, {name: self._form(prefix + name, value) for name, value in values.items()}, errors, plainly)
        if i:
            self._hidden(i - 1).unlink(missing_ok=True)
        return hidden

    def _searched(self) -> list[str]:
        """Embedding and head where they are INT4; in INT8 a searched grid is no better than the nearest levels of the range."""
        specs = {path: self.kept[path].spec for path in ("embedding", "head") if path in self.tensors}
        return [path for path, spec in specs.items() if spec and spec.format == "int4"]

    def _ends(self) -> None:
        """Embedding and head; the one that multiplies sees the text as the last layer leaves it."""
        values: dict[str, np.ndarray | QTensor] = {}
        for path in self._searched():
            spec, seen, method = self.kept[path].spec, None, self.method
            assert spec is not None
            if self.tokens is not None and path == ("embedding" if self.config.tied else "head"):
                seen = self._head_inputs()
            else:  # a table that is read has no inputs
                method = Method(clip=self.method.clip)
            values[path] = rounded(jnp.asarray(read_float(self.tensors[path])), seen, spec, method, path)
        self._save(self.config.layers, values, {})

    def _head_inputs(self) -> InputStatistics:
        x, config = np.load(self._hidden(self.config.layers - 1)), self.config
        scale, bias = (read_float(self.tensors[name]) if name in self.tensors else None for name in ("norm", "norm_bias"))
        return input_statistics(x, lambda x: norm(x, scale, bias, kind=config.norm, eps=config.norm_eps))

    def _form(self, path: str, value: Any) -> np.ndarray | QTensor:
        """A parameter as it is kept: floats in the dtype that they are to have."""
        return (
            value
            if isinstance(value, QTensor) or value.ndim == 1
            else value.astype(self.kept[path].of(self.tensors[path]).dtype)
        )

    def _embedded(self) -> np.ndarray:
        """Hidden states [S, T, D] before the first layer, from the rows of the embedding that occur."""
        assert self.tokens is not None
        used, ids = np.unique(self.tokens, return_inverse=True)
        rows = (Units(1, tuple(used.tolist())), None)
        weights = DecoderWeights(
            layers=(),
            embedding=jnp.asarray(read_float(self.tensors["embedding"], rows)),
            positions=jnp.asarray(read_float(self.tensors["positions"])) if "positions" in self.tensors else None,
            norm=jnp.asarray(read_float(self.tensors["norm"])),
            head=None,
            embed_scale=self.config.embed_scale,
        )
        return np.asarray(embed(weights, jnp.asarray(ids.reshape(self.tokens.shape), jnp.int32)))

    # --- the folder of work

    def _file(self, i: int) -> Path:
        return self.work / f"layer_{i:05d}.npz"

    def _hidden(self, i: int) -> Path:
        return self.work / f"hidden_{i:05d}.npy"

    def _save(
        self, i: int, values: Mapping[str, np.ndarray | QTensor], errors: Mapping[str, float], plainly: Sequence[str] = ()
    ) -> None:
        arrays: dict[str, np.ndarray] = {}
        entries: dict[str, Any] = {}
        for name, value in values.items():
            parts = {"": value} if not isinstance(value, QTensor) else _parts(value)
            for part, array in parts.items():
                arrays[f"{name}:{part}"] = np.asarray(array).view(_storable(np.asarray(array).dtype))
            form: dict[str, Any] | None = None
            if isinstance(value, QTensor):
                inputs = value.activation and dataclasses.asdict(value.activation)
                form = {"format": value.format, "group": value.group, "activation": inputs}
            dtypes = {part: np.asarray(array).dtype.name for part, array in parts.items()}
            entries[name if i == self.config.layers else f"blocks.{i}.{name}"] = {"form": form, "dtypes": dtypes}
        arrays["description"] = np.asarray(json.dumps({"tensors": entries, "errors": dict(errors), "plainly": list(plainly)}))
        _write(self._file(i), lambda file: np.savez(file, allow_pickle=False, **arrays))

    def _report(self, i: int) -> LayerReport:
        with np.load(self._file(i)) as file:
            described = json.loads(str(file["description"]))
        return LayerReport(layer=i, errors=described["errors"], plainly=tuple(described["plainly"]))


def key(settings: Mapping[str, Any], tokens: np.ndarray | None) -> str:
    """A name for the work of these settings, so that other settings never go on with it. settings: JSON values."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(b"" if tokens is None else np.ascontiguousarray(tokens).tobytes())
    return digest.hexdigest()[:12]


class _Stored(LazyTensor):
    """A tensor in the folder of work."""

    def __init__(self, name: str, path: str, shape: tuple[int, ...], file: Path):
        self.name, self.shape = name, shape
        self._path, self._file = path, file
        value = self._value()
        self.dtype = np.dtype(np.float32) if isinstance(value, QTensor) else value.dtype
        self.packed = PackedFormat.of(value) if isinstance(value, QTensor) else None

    def read(self, units: Shard = None) -> np.ndarray | QTensor:
        return InMemory(self._value()).read(units)

    def _value(self) -> np.ndarray | QTensor:
        with np.load(self._file) as file:
            entry = json.loads(str(file["description"]))["tensors"][self._path]
            local = re.sub(r"^blocks\.\d+\.", "", self._path)
            arrays = {part: file[f"{local}:{part}"].view(dtype_named(dtype)) for part, dtype in entry["dtypes"].items()}
        if entry["form"] is None:
            return arrays[""]
        activation = entry["form"]["activation"]
        form = entry["form"] | {"activation": activation and qtensor.ActivationQuant(**activation)}
        return QTensor(**arrays, **form)


def _at_static_scale(q: QTensor, scale: np.ndarray) -> QTensor:
    """The same weight, whose inputs are rounded at a scale float32 [1, 1]."""
    assert q.activation is not None
    inputs = qtensor.ActivationQuant(group=None, format=q.activation.format, static=True)
    return q.replace(activation=inputs, input_scale=scale)


def _parts(q: QTensor) -> dict[str, np.ndarray]:
    parts = {"values": q.values, "scales": q.scales, "zeros": q.zeros, "input_scale": q.input_scale}
    return {name: np.asarray(array) for name, array in parts.items() if array is not None}


def _storable(dtype: np.dtype) -> np.dtype:
    """A dtype of the same size that files of numpy know."""
    return dtype if dtype.kind in "biuf" else np.dtype(f"u{dtype.itemsize}")


def _write(path: Path, write: Callable[[Any], None]) -> None:
    """A file that is complete or absent."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        write(file)
    os.replace(temporary, path)


def read_layer(tensors: Mapping[str, LazyTensor], i: int) -> dict[str, np.ndarray]:
    """The float32 parameters of a layer by name, such as "mlp.up"."""
    prefix = f"blocks.{i}."
    return {path.removeprefix(prefix): read_float(tensor) for path, tensor in tensors.items() if path.startswith(prefix)}


def read_float(tensor: LazyTensor, units: Shard = None) -> np.ndarray:
    """A tensor, or a shard of it, as float32; packed ones are dequantised."""
    value = cast(as_float(tensor), "float32").read(units)
    assert isinstance(value, np.ndarray)
    return value


def layer_weights(values: Mapping[str, Any]) -> LayerWeights:
    """The weights of a layer of its parameters by name."""
    arrays = {name: jax.tree.map(jnp.asarray, value) for name, value in values.items()}
    get = lambda half: lambda name: arrays.get(f"{half}.{name}")
    return LayerWeights(
        attention=Attention.build(get("attention")),
        mlp=(MoE if "mlp.router" in values else MLP).build(get("mlp")),
        **{name: arrays[name] for name in POST_NORMS if name in arrays},
    )
