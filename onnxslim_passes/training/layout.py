"""What is fed to a training graph and what comes out: the contents of `training.json`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from onnxslim_passes.errors import InvalidModelError
from onnxslim_passes.training.losses import LabelSpec

__all__ = ["FORMAT", "Layout", "MetricSpec", "StateSpec", "TensorSpec"]

FORMAT = 1

Role = Literal["trainable", "slot", "buffer", "running", "frozen"]


@dataclass(frozen=True)
class TensorSpec:
    """One data input.

    Attributes:
        name: of the graph input; that of the model.
        dtype: NumPy's name of the element type.
        shape: a size, or a symbol where it is free.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class StateSpec:
    """One tensor of the state.

    Attributes:
        input: name of the graph input, and of the tensor in the checkpoint.
        output: name of the graph output with its next value; None if it never changes.
        dtype: NumPy's name of the element type.
        shape: sizes.
        role: "trainable" (moved by the optimizer), "slot" (the optimizer's own), "buffer" (a mask,
            assignments), "running" (statistics of a normalization), "frozen" (a weight of the model
            or of the teacher that does not change; kept in a file of its own).
        weight: the weight of the model that it belongs to, with the path of its body; "" for
            the teacher's.
    """

    input: str
    output: str | None
    dtype: str
    shape: tuple[int, ...]
    role: Role
    weight: str


@dataclass(frozen=True)
class MetricSpec:
    """The number beside the loss.

    Attributes:
        name: what it is, e.g. "top1".
        output: name of the graph output.
        higher_is_better: the direction.
    """

    name: str
    output: str
    higher_is_better: bool


@dataclass(frozen=True)
class Layout:
    """Names and shapes of everything that goes in and out, and where it came from.

    Attributes:
        inputs: data inputs.
        labels: what the labels must be, or None.
        learning_rate: name of that input: float32, rank 0.
        step: name of that input: int64, rank 0, the number of steps done, 0 in the first.
        loss: name of that output: float32, rank 0.
        metric: what is shown beside it.
        state: every state tensor.
        weights: for each trained weight its constraint and what the constraint says of itself.
        options: of objective, update and parameters, as given.
        fixed_inputs: inputs of the model that are built in, with their values.
        source: file name of the model.
        source_sha256: its hash.
        teacher_sha256: that of the teacher, or "".
        seed: of dropout.
        versions: of the packages that made it.
    """

    inputs: tuple[TensorSpec, ...]
    labels: LabelSpec | None
    learning_rate: str
    step: str
    loss: str
    metric: MetricSpec
    state: tuple[StateSpec, ...]
    weights: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Mapping[str, Any]]
    fixed_inputs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    source_sha256: str = ""
    teacher_sha256: str = ""
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    def changing(self) -> Iterator[StateSpec]:
        """The state tensors that have a next value."""
        return (spec for spec in self.state if spec.output is not None)

    def to_text(self, files: Mapping[str, Sequence[str]] | None = None) -> str:
        """The layout as JSON, with the names of the files that belong to it."""
        plain = {"format": FORMAT, "files": dict(files or {}), **asdict(self)}
        return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_text(cls, text: str, where: str) -> "Layout":
        """Reads what `to_text` wrote.

        Raises:
            InvalidModelError: it is damaged, or of a newer kind; the message names `where`.
        """
        try:
            plain = json.loads(text)
            if plain.pop("format") != FORMAT:
                raise InvalidModelError(
                    f"{where} is of another kind than this version reads ({FORMAT}); run "
                    "train-graph again."
                )
            plain.pop("files")
            labels = plain.pop("labels")
            return cls(
                inputs=tuple(TensorSpec(**_tupled(spec)) for spec in plain.pop("inputs")),
                labels=LabelSpec(**_tupled(labels)) if labels is not None else None,
                metric=MetricSpec(**plain.pop("metric")),
                state=tuple(StateSpec(**_tupled(spec)) for spec in plain.pop("state")),
                weights=tuple(plain.pop("weights")),
                **plain,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidModelError(
                f"{where} is damaged ({type(error).__name__}: {error}); run train-graph again."
            ) from error


def _tupled(spec: dict[str, Any]) -> dict[str, Any]:
    return spec | {"shape": tuple(spec["shape"])}
