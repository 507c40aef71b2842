"""What a loss is: numbers in the graph, and what it needs of the labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxslim_passes.model import Variable
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.shapes import Tensor

__all__ = ["LabelSpec", "Loss", "Measure", "mean", "total"]

Size: TypeAlias = int | str


@dataclass(frozen=True)
class LabelSpec:
    """What the labels of a batch must be.

    Attributes:
        name: of the graph input.
        dtype: element type, e.g. "int64".
        shape: a size, or a symbol where it is free.
        classes: class numbers are in [0, classes); None if the labels are no class numbers, or if
            the model leaves the number of classes open.
        lowest: the smallest number allowed, where `classes` is given; -1 marks padding.
        what: in words, for messages.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    classes: int | None
    what: str
    lowest: int = 0


@dataclass(frozen=True)
class Measure:
    """A number that a person reads beside the loss.

    Attributes:
        name: e.g. "top1".
        value: the tensor, rank 0, float32: a mean over the batch.
        higher_is_better: the direction.
    """

    name: str
    value: Variable
    higher_is_better: bool


@dataclass(frozen=True)
class Loss:
    """A loss in the graph.

    Attributes:
        value: rank 0, float32: a mean over the batch.
        slope: the tensor whose gradient is the loss's; `value` itself, unless the gradient is
            written down instead of derived.
        metric: what is shown beside it.
        labels: what it is fed, or None if it needs no labels.
        decisions: what was chosen on the way.
    """

    value: Variable
    slope: Variable
    metric: Measure
    labels: LabelSpec | None = None
    decisions: tuple[Decision, ...] = ()


def mean(emit: Emitter, tensor: Tensor) -> Variable:
    """The mean over all elements, rank 0, float32."""
    return _scalar(emit, emit.reduce_mean(tensor))


def total(emit: Emitter, tensor: Tensor) -> Variable:
    """The sum over all elements, rank 0, float32."""
    return _scalar(emit, emit.reduce_sum(tensor))


def _scalar(emit: Emitter, tensor: Tensor) -> Variable:
    cast = emit.cast(tensor, np.float32)
    return cast if isinstance(cast, Variable) else emit.op("Identity", cast)


def without_axis(shape: Sequence[Any], axis: int) -> tuple[Any, ...]:
    """A shape without one of its axes."""
    return tuple(size for place, size in enumerate(shape) if place != axis)
