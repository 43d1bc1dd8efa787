"""Every error that the library raises on purpose, in one place. Each message gives the value, the limit and what to do."""

from convert.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConversionError,
    DestinationExistsError,
    MissingTensorError,
    NativeFormatError,
    NonFiniteWeightError,
    TensorShapeError,
    TruncatedFileError,
    UnexpectedTensorError,
    UnsupportedFormatError,
)
from pallas_kernels.errors import BackendError, KernelError, QuantizationError, ShapeError
from sharding.errors import AxisRuleError, LaunchError, MeshError, ShardingError


class InferenceError(ValueError):
    """Base of what the runtime itself refuses."""


class ConfigError(InferenceError):
    """A configuration that cannot be used."""


class SamplingParamsError(InferenceError):
    """Sampling parameters out of their range."""


class UnknownArchitectureError(InferenceError):
    """A checkpoint of an architecture that is not supported."""


class UnknownConfigKeyError(InferenceError):
    """A config.json with keys that may change the arithmetic and are not understood."""


class CheckpointCopyError(InferenceError):
    """Weights that process 0 was to send and did not."""


class PromptError(InferenceError):
    """A prompt that cannot be run: empty, or with tokens outside of the vocabulary."""


class TokenLimitError(InferenceError):
    """More tokens than inference_max_tokens."""


class MemoryPlanError(InferenceError):
    """Weights, cache and temporary arrays do not fit in memory."""


class OutOfMemoryError(InferenceError):
    """Memory ran out while programs were compiled or ran."""


class ExecutablesError(InferenceError):
    """Executables that were compiled earlier, and do not fit or cannot be read."""


class EngineStateError(InferenceError):
    """An engine that was closed, or a state that does not fit the call."""


class TextError(InferenceError):
    """Base of everything that tokenizers, chat templates and stop strings refuse."""


class InvalidTextError(TextError, PromptError):
    """A text that is not Unicode: it holds half of a surrogate pair."""


class NoTokenizerError(TextError):
    """A checkpoint without a tokenizer, or with one that cannot be read."""


class NoChatTemplateError(TextError):
    """Messages were given to a model whose checkpoint has no chat template."""


class ChatTemplateError(TextError):
    """A chat template that does not compile, or that refuses the messages it was given."""


class DemoModelError(InferenceError):
    """The demonstration model is not cached and could not be fetched."""


EXPECTED = (InferenceError, ConversionError, KernelError, ShardingError)

__all__ = [
    "EXPECTED",
    "AxisRuleError",
    "BackendError",
    "ChatTemplateError",
    "CheckpointCopyError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "ConfigError",
    "ConversionError",
    "DemoModelError",
    "DestinationExistsError",
    "EngineStateError",
    "ExecutablesError",
    "InferenceError",
    "InvalidTextError",
    "KernelError",
    "LaunchError",
    "MemoryPlanError",
    "MeshError",
    "MissingTensorError",
    "NativeFormatError",
    "NoChatTemplateError",
    "NoTokenizerError",
    "NonFiniteWeightError",
    "OutOfMemoryError",
    "PromptError",
    "QuantizationError",
    "SamplingParamsError",
    "ShapeError",
    "ShardingError",
    "TensorShapeError",
    "TextError",
    "TokenLimitError",
    "TruncatedFileError",
    "UnexpectedTensorError",
    "UnknownArchitectureError",
    "UnknownConfigKeyError",
    "UnsupportedFormatError",
]
