"""The task metric of a model before and after: `--metric` and `--evaluation`."""

import dataclasses
from typing import Any

from onnxslim_passes.calibration import Samples
from onnxslim_passes.evaluation import Metric, open_metric
from onnxslim_passes.runtime import Session

__all__ = ["TaskResult", "open_task"]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task metric of two models.

    Attributes:
        name: of the metric.
        before: of the original.
        after: of the result.
        higher_is_better: which way is good.
    """

    name: str
    before: float
    after: float
    higher_is_better: bool

    @property
    def drop(self) -> float:
        """How much worse the result is; negative if it is better."""
        change = self.before - self.after
        return change if self.higher_is_better else -change

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the drop."""
        return {**dataclasses.asdict(self), "drop": self.drop}


def open_task(metric: str, evaluation: str | None, session: Session) -> Metric:
    """The metric that a command line names, with its data checked against the model.

    Raises:
        UnknownNameError: no such metric; with the nearest name.
        UsageError: a named metric without evaluation data.
        SamplesError: the data does not fit the model.
    """
    if evaluation is None:
        return open_metric(metric, None)
    samples = Samples.open(evaluation)
    samples.check(session.inputs)
    return open_metric(metric, samples.labelled)
