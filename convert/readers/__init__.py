"""Readers: a path becomes a Checkpoint of lazy tensors under canonical names. Each format is imported when it is met."""

from pathlib import Path

from convert.errors import CheckpointNotFoundError, UnsupportedFormatError
from convert.readers.base import Checkpoint, LazyTensor, PackedFormat, TokenizerAssets

__all__ = ["Checkpoint", "LazyTensor", "PackedFormat", "TokenizerAssets", "open_checkpoint"]

# the native form, see convert/native.py
DESCRIPTION = "jaxinfer.json"  # makes a folder a native checkpoint
PARAMS = "params"
FORMAT_VERSION = 1


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder (config.json and safetensors), a .gguf file or a native folder; no weight is read.

    A folder with nothing but one .gguf file in it is that file. Raises CheckpointNotFoundError, UnsupportedFormatError,
    TruncatedFileError, MissingTensorError (a shard that the index names is absent) and NativeFormatError.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointNotFoundError(f"{path} does not exist; give a folder with config.json and safetensors, or a .gguf file")
    if path.is_file():
        return _open_file(path)
    if (path / DESCRIPTION).is_file():
        from convert.readers.native import open_native

        return open_native(path)
    weights, ggufs = sorted(path.glob("*.safetensors")), sorted(path.glob("*.gguf"))
    if weights or (path / "model.safetensors.index.json").is_file():
        from convert.readers.safetensors import open_safetensors

        return open_safetensors(path)
    if len(ggufs) == 1:
        return _open_file(ggufs[0])
    found = ", ".join(p.name for p in sorted(path.iterdir())[:8]) or "nothing"
    if ggufs:
        raise UnsupportedFormatError(f"{path} holds {len(ggufs)} GGUF files; give the path of one: {found}")
    hint = " (save the model again with safe_serialization=True)" if any(path.glob("*.bin")) or any(path.glob("*.pt*")) else ""
    raise UnsupportedFormatError(f"{path} holds no *.safetensors, *.gguf or {DESCRIPTION}{hint}; it holds {found}")


def _open_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        magic = file.read(4)
    # a file cut within its first bytes is still recognised by its name, so that it is called truncated
    if magic == b"GGUF" or path.suffix == ".gguf":
        from convert.readers.gguf import open_gguf

        return open_gguf(path)
    if path.suffix == ".safetensors":
        raise UnsupportedFormatError(f"{path} is one file of a checkpoint; give its folder with config.json in it")
    raise UnsupportedFormatError(f"{path} starts with {magic!r}: it is not a GGUF file; give one, or a folder with config.json")
