"""One exception type a cause; each knows the exit code of the command line.

Exit codes: 2 wrong usage or recipe; 3 the model or the data is invalid or not supported, or the
result could not be written; 4 a guard (`--max-drop`, `--require-speedup`, `--require-ratio`) was
not met. A message says where, what was found, what was expected and what to do next.
"""

import difflib
from collections.abc import Iterable


class OnnxSlimError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 3


class UsageError(OnnxSlimError):
    """The call cannot be meant as written."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or a pass in it is malformed, or its passes stand in an impossible order."""


class UnknownNameError(UsageError):
    """A name (pass, option, node, weight, metric...) that does not exist."""


class ModelError(OnnxSlimError):
    """The model cannot be worked on."""


class InvalidModelError(ModelError):
    """The file is not an ONNX model, is truncated, or the ONNX checker refuses it."""


class ExternalDataError(InvalidModelError):
    """External data is missing, too short, or points outside the model's folder."""


class UnsupportedModelError(ModelError):
    """A valid model that a pass cannot work on; the message names the tensors or nodes."""


class DifferentiationError(UnsupportedModelError):
    """The way from weights to a loss leads through operators without a gradient."""


class RuntimeRefusedError(ModelError):
    """ONNX Runtime would not load or run the model."""


class VerificationError(ModelError):
    """A pass made a model that the checker or ONNX Runtime refuses, or whose outputs are wrong."""


class PassFailedError(ModelError):
    """A pass raised on a model where it should have worked; a reproducer was written."""


class SamplesError(OnnxSlimError):
    """Calibration or evaluation data that does not fit the model."""


class TrainingError(OnnxSlimError):
    """Training went wrong: the loss or a weight is not a number any more."""


class OutputError(OnnxSlimError):
    """A result could not be written."""


class GuardError(OnnxSlimError):
    """A limit that the user asked for was not met; nothing was written."""

    exit_code = 4


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The hint ``" Did you mean 'x'?"`` for the candidate most like `name`, or ``""``."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def unknown_name(kind: str, name: str, candidates: Iterable[str]) -> UnknownNameError:
    """An error for a `name` of some `kind` that is not among `candidates`, with the nearest one."""
    candidates = list(candidates)
    hint = nearest(name, candidates)
    if not hint and 0 < len(candidates) <= 12:
        hint = f" Known: {', '.join(sorted(candidates))}."
    return UnknownNameError(f"Unknown {kind} {name!r}.{hint}")
