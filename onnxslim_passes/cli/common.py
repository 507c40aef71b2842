"""What several commands share: kinds of arguments, checks of paths, opening of samples."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import UsageError
from onnxslim_passes.passes.base import Pass
from onnxslim_passes.runtime import Session

__all__ = [
    "RANDOM",
    "Flag",
    "JsonFlag",
    "ModelPath",
    "TargetName",
    "check_output",
    "needed_data",
    "open_samples",
    "warn",
]

# A switch that is off unless given: no --no-... twin, no default worth showing.
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
JsonFlag = Annotated[
    Flag, Parameter(help="Print the result as JSON on stdout, and nothing else there.")
]
ModelPath = Annotated[Path, Parameter(help="An ONNX model.")]
TargetName = Literal["cpu", "cpu-no-vnni", "tensorrt", "qnn", "coreml", "web"]
RANDOM = "random"


def check_output(output: Path, sources: Iterable[Path], option: str = "-o") -> None:
    """Refuses a place that cannot be written, or that would overwrite a source.

    Raises:
        UsageError: a missing folder, a folder in its place, or a source itself, also through
            symbolic and hard links.
    """
    if output.is_dir():
        raise UsageError(f"{option} {output} is a folder; name the file to write")
    if not output.parent.is_dir():
        raise UsageError(f"{option} {output}: there is no folder {output.parent}; make it first")
    for source in sources:
        same = output.exists() and source.exists() and output.samefile(source)
        if same or output.resolve() == source.resolve():
            raise UsageError(
                f"{option} {output} is the same file as {source}, which is never overwritten; "
                "choose another name"
            )


def open_samples(spec: str, session: Session, *, seed: int, option: str) -> Samples:
    """The samples that `spec` names, checked against a model's inputs; ``random`` makes them up.

    Raises:
        SamplesError: they do not fit the model; the message names the input.
    """
    if spec == RANDOM:
        warn(
            f"{option} random: the inputs are random numbers, for smoke tests only. "
            "The figures below MEAN NOTHING for real data."
        )
        return Samples.runnable_random(session, seed=seed)
    samples = Samples.open(spec)
    samples.check(session.inputs)
    return samples


def needed_data(kind: Pass | type[Pass]) -> str:
    """The option that gives a pass the samples it cannot do without, or ""."""
    if kind.needs_training:
        return "--training"
    return "--calibration" if kind.needs_samples else ""


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr)
