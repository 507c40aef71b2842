"""Runs a training program: one step, one evaluation, the state in between."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxslim_passes.model import Model
from onnxslim_passes.runtime import Recurrence, open_session
from onnxslim_passes.training.data import Batch, TrainingData
from onnxslim_passes.training.forward import state_name
from onnxslim_passes.training.journal import Epoch
from onnxslim_passes.training.lowering import fix_inputs
from onnxslim_passes.training.parameters import Array
from onnxslim_passes.training.program import TrainingProgram

__all__ = ["Score", "Trainer"]


@dataclass(frozen=True)
class Score:
    """Means over some samples.

    Attributes:
        loss: without penalties in an evaluation, with them in a step.
        metric: the number beside it.
    """

    loss: float
    metric: float


def _with_constants(graph: Model, values: Mapping[str, Array]) -> Model:
    """A graph whose inputs of these names, as far as it has them, are built in."""
    taken = {str(tensor.name) for tensor in graph.graph.inputs}
    copy = graph.copy()
    fix_inputs(copy, {name: array for name, array in values.items() if name in taken})
    return copy


class Trainer:
    """The sessions of a training program and the state between steps.

    Args:
        program: what to run.
        threads: of one operator; another number may give other last digits.

    Attributes:
        program: what is run.
        steps: done so far.
    """

    def __init__(self, program: TrainingProgram, *, threads: int = 1) -> None:
        self.program = program
        self.steps = 0
        layout = program.layout
        next_of = {spec.input: str(spec.output) for spec in layout.changing()}
        # As constants ONNX Runtime can lay them out once and for all; a teacher is all of them.
        frozen = {s.input: program.state[s.input] for s in layout.state if s.role == "frozen"}
        training = open_session(_with_constants(program.training, frozen), threads=threads)
        self._training = Recurrence(training, program.state, next_of)
        evaluation = open_session(_with_constants(program.evaluation, frozen), threads=threads)
        self._evaluation = Recurrence(evaluation, program.state, {})
        self._changing = [spec.input for spec in layout.changing()]
        self._kept = [spec.input for spec in layout.changing() if spec.role != "slot"]
        # Constraints may decide buffers again.
        buffers = [spec.input for spec in layout.state if spec.role == "buffer"]
        self._changing += buffers
        self._kept += buffers

    def step(self, batch: Batch, rate: float) -> Score:
        """One step of the optimizer, or one batch towards it where gradients are accumulated."""
        layout = self.program.layout
        feed = self._feed(batch)
        feed[layout.learning_rate] = np.array(rate, np.float32)
        feed[layout.step] = np.array(self.steps, np.int64)
        found = self._training.run(feed)
        self.steps += 1
        self._refresh()
        return self._score(found)

    def evaluate(self, data: TrainingData, batch_size: int) -> Score:
        """Loss and metric over all samples, with the state as it is now."""
        self._evaluation.write(self._training.read(self._kept))
        loss = metric = count = 0.0
        for place in data.in_order(batch_size):
            batch = data.batch(place)
            found = self._score(self._evaluation.run(self._feed(batch)))
            loss += found.loss * batch.count
            metric += found.metric * batch.count
            count += batch.count
        return Score(loss / count, metric / count)

    def read(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Copies of state tensors, by default of all that may change."""
        return self._training.read(self._changing if names is None else names)

    def write(self, arrays: Mapping[str, Array]) -> None:
        """Replaces state tensors, by name."""
        self._training.write(arrays)
        self._evaluation.write(arrays)

    def take_up(self, state: Mapping[str, Array], steps: int) -> None:
        """Goes back to a state after a number of steps."""
        self.write(state)
        self.steps = steps

    def kept(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """The part of a state that belongs into a model: no slots of the optimizer."""
        return {name: state[name] for name in self._kept}

    def is_better(self, one: Epoch, other: Epoch) -> bool:
        """Whether validation prefers `one`: by the metric, then by the loss."""
        return self._rank(one) > self._rank(other)

    def _rank(self, epoch: Epoch) -> tuple[float, float]:
        metric, loss = epoch.validation_metric, epoch.validation_loss
        assert metric is not None  # only validated epochs are compared
        assert loss is not None
        sign = 1 if self.program.layout.metric.higher_is_better else -1
        return sign * metric, -loss

    def _feed(self, batch: Batch) -> dict[str, Array]:
        layout = self.program.layout
        feed = dict(batch.feed)
        if layout.labels is not None:
            assert batch.labels is not None  # the data was fitted to the layout
            feed[layout.labels.name] = batch.labels
        return feed

    def _score(self, found: Mapping[str, Array]) -> Score:
        layout = self.program.layout
        return Score(float(found[layout.loss]), float(found[layout.metric.output]))

    def _refresh(self) -> None:
        """Lets constraints decide again what they decide on the host."""
        accumulation = int(self.program.layout.options["update"]["accumulation"])
        done, left = divmod(self.steps, accumulation)
        for constraint in self.program.constraints:
            if not constraint.refresh_steps or left or done % constraint.refresh_steps:
                continue
            keys = [*constraint.trainable(), *constraint.buffers()]
            names = {key: state_name(constraint, key) for key in keys}
            found = self._training.read(names.values())
            arrays = {key: found[name] for key, name in names.items()}
            fresh = constraint.refreshed(arrays)
            self.write({names[key]: array for key, array in fresh.items()})
