"""Errors of reading, binding and writing checkpoints. Each message gives the value, the limit and what to do."""

from collections.abc import Sequence

SHOWN = 20  # problems listed in a message; all of them are in `.problems`


class ConversionError(ValueError):
    """Base of everything that the convert package refuses."""


class CheckpointNotFoundError(ConversionError, FileNotFoundError):
    """A path that does not exist."""


class DestinationExistsError(ConversionError, FileExistsError):
    """A place to write to that already holds something."""


class UnsupportedFormatError(ConversionError):
    """A file, a tensor type or a tokenizer of a kind that cannot be read."""


class TruncatedFileError(ConversionError):
    """A file shorter than its own header says, as after an interrupted download."""


class NativeFormatError(ConversionError):
    """A native checkpoint of an unknown format_version, or one whose description is damaged."""


class NonFiniteWeightError(ConversionError):
    """A weight that holds NaN or infinity, or that overflows the asked dtype."""


class CheckpointMismatchError(ConversionError):
    """A checkpoint whose tensors do not fit the model.

    problems: every mismatch found, one sentence each; the message shows the first ones. A subclass is raised where all problems
    are of one kind.
    """

    def __init__(self, problems: Sequence[str], where: str = "the checkpoint"):
        self.problems = list(problems)
        shown = [f"  - {p}" for p in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            shown.append(f"  - and {len(self.problems) - SHOWN} more (all in .problems)")
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__(f"{where} does not fit: {count}\n" + "\n".join(shown))


class MissingTensorError(CheckpointMismatchError):
    """Weights of the model that the checkpoint does not hold."""


class UnexpectedTensorError(CheckpointMismatchError):
    """Tensors of the checkpoint that the model does not know, or that would set one weight twice."""


class TensorShapeError(CheckpointMismatchError):
    """Tensors whose shape is not that of the model's weight."""
