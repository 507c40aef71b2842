"""Task metrics: one number for one model, by name or by a function of the user's.

Named metrics hold the first output against the data's labels. Percentages run from 0 to 100, so
that a drop of 0.5 is half a point.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxslim_passes.errors import SamplesError, UsageError, unknown_name
from onnxslim_passes.evaluation.functions import UserFunction, is_function_spec
from onnxslim_passes.runtime import Array, InputSpec, Session

# Reads labelled feeds for a model's inputs, from the start at each call.
LabelledData: TypeAlias = Callable[
    [Sequence[InputSpec]], Iterable[tuple[Mapping[str, Array], Array]]
]
# (output, labels) -> (sum, count); the metric is the sum of sums over the sum of counts.
Score: TypeAlias = Callable[[Array, Array], tuple[float, float]]


@dataclass(frozen=True)
class Metric:
    """A number that says how well a model does its task.

    Attributes:
        name: As the user wrote it.
        higher_is_better: The direction.
        measure: Session -> number.
    """

    name: str
    higher_is_better: bool
    measure: Callable[[Session], float]

    def __call__(self, session: Session) -> float:
        """Measures a model.

        Raises:
            SamplesError: Data or labels do not fit the model.
            UsageError: The user's function failed or returned no number.
            RuntimeRefusedError: The model does not run.
        """
        return self.measure(session)

    def drop(self, before: float, after: float) -> float:
        """By how much it got worse; negative if it got better."""
        return before - after if self.higher_is_better else after - before


@dataclass(frozen=True)
class NamedMetric:
    """A metric that comes with the package.

    Attributes:
        summary: One line for listings.
        higher_is_better: The direction.
        score: The sum and the count of one feed.
    """

    summary: str
    higher_is_better: bool
    score: Score


def open_metric(spec: str, data: LabelledData | None) -> Metric:
    """The metric called `spec`.

    Args:
        spec: A name of `METRICS`, or `file.py:function`, called with the
            `onnxruntime.InferenceSession`; it returns a number, and higher is better.
        data: What named metrics are measured on, e.g. `samples.labelled`.

    Raises:
        UnknownNameError: There is no such metric.
        UsageError: There is no such file or function, or a named metric has no data.
    """
    if is_function_spec(spec):
        function = UserFunction(spec, UsageError, arguments=1)
        return Metric(spec, True, lambda session: _number(function(session.raw), spec))
    if spec not in METRICS:
        raise unknown_name("metric", spec, METRICS)
    if data is None:
        raise UsageError(
            f"Metric {spec!r} needs evaluation data with an array 'labels'; give --evaluation."
        )
    named, source = METRICS[spec], data
    return Metric(spec, named.higher_is_better, lambda s: _mean(named.score, s, source, spec))


def _number(value: Any, spec: str) -> float:
    """What a user's function returned, as a number."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if not isinstance(value, numbers.Real) or math.isnan(float(value)):
        raise UsageError(f"{spec}: returned {value!r}, expected a number.")
    return float(value)


def _mean(score: Score, session: Session, data: LabelledData, name: str) -> float:
    """The metric over all data, a feed at a time."""
    first = session.outputs[0].name
    total = count = 0.0
    for feed, labels in data(session.inputs):
        output = session.run(feed, [first])[first]
        if not isinstance(output, np.ndarray):
            raise SamplesError(
                f"Metric {name!r}: output {first!r} is no tensor but {session.outputs[0].type}; "
                "write a metric of your own as file.py:function."
            )
        part = score(output, np.asarray(labels))
        total, count = total + part[0], count + part[1]
    if count == 0:
        raise SamplesError(f"Metric {name!r}: there are no samples.")
    return total / count


def _top_k(k: int) -> Score:
    """Percent of labels among the k highest scores along the last axis."""

    def score(output: Array, labels: Array) -> tuple[float, float]:
        if output.dtype.kind in "iubOSU":  # classes already, as scikit-learn's exporter gives them
            right = output.reshape(-1) == _fitted(labels, output.shape).reshape(-1)
        else:
            if output.ndim == 0 or output.shape[-1] < 2:
                raise SamplesError(
                    f"Metric 'top{k}': the output has shape {output.shape}, expected a score for "
                    "each class along the last axis."
                )
            wanted = _fitted(labels, output.shape[:-1])[..., None]
            best = np.argsort(-output.astype(np.float64), axis=-1, kind="stable")[..., :k]
            right = (best == wanted).any(axis=-1)
        return 100.0 * float(np.sum(right)), float(np.size(right))

    return score


def _squared(output: Array, labels: Array) -> tuple[float, float]:
    error = output.astype(np.float64) - _fitted(labels, output.shape)
    return float(np.sum(error**2)), float(error.size)


def _absolute(output: Array, labels: Array) -> tuple[float, float]:
    error = output.astype(np.float64) - _fitted(labels, output.shape)
    return float(np.sum(np.abs(error))), float(error.size)


def _cosine(output: Array, labels: Array) -> tuple[float, float]:
    """The cosine of each sample's output with its label; 0 where one of them is all zero."""
    rows = len(output) if output.ndim else 1
    x = output.astype(np.float64).reshape(rows, -1)
    y = _fitted(labels, output.shape).astype(np.float64).reshape(rows, -1)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    products = (x * y).sum(axis=1)
    return float(np.sum(products / np.where(norms > 0, norms, np.inf))), float(rows)


def _fitted(labels: Array, shape: tuple[int, ...]) -> Array:
    """Labels in the shape of the predictions; axes of length 1 may be missing or too many."""
    if tuple(d for d in labels.shape if d != 1) != tuple(d for d in shape if d != 1):
        raise SamplesError(
            f"'labels' have shape {labels.shape} for predictions of shape {shape}; "
            "expected one label for each."
        )
    return labels.reshape(shape)


METRICS: dict[str, NamedMetric] = {
    "top1": NamedMetric("percent of samples whose highest score is the label's", True, _top_k(1)),
    "top5": NamedMetric("percent of samples with the label in the best five", True, _top_k(5)),
    "mse": NamedMetric("mean squared difference from the labels", False, _squared),
    "mae": NamedMetric("mean absolute difference from the labels", False, _absolute),
    "cosine": NamedMetric("mean cosine between output and label", True, _cosine),
}
