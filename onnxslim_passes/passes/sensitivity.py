"""What rounding activations does to the outputs, and which of them can be rounded.

Which tensors must not have 8 bits (masked scores, what a Softmax takes, sums with outliers) is
found by rounding them: in one session every activation is rounded if its flag says so, and runs
with some flags show their effect. Errors of single tensors are small and nearly independent, so
that their powers add up; tensors are tried in groups, and a group is split only if its error is
more than its share of what is allowed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from onnxslim_passes.calibration import Samples
from onnxslim_passes.evaluation.fidelity import OutputSums, worst_error
from onnxslim_passes.model import Model, Node, Variable
from onnxslim_passes.numerics.affine import AffineGrid
from onnxslim_passes.passes.base import Progress
from onnxslim_passes.runtime import Session, open_session

__all__ = ["decibels", "rounding_errors", "tolerable"]

_FEEDS = 2  # tensors that matter are told from others by factors, not by percents
_GROUP = 16  # of tensors that are tried together at first
_OPSET = 11  # the first with Round
_FLAGS = "rounding_flags"


def rounding_errors(
    model: Model,
    grids: Mapping[str, AffineGrid],
    samples: Samples,
    *,
    allowed: float,
    progress: Progress,
) -> dict[str, float]:
    """The error of the worst float output, power over signal power, with one tensor on its grid.

    Args:
        model: stays as it is.
        grids: of float32 tensors of the main graph, by name, in the order of the graph.
        samples: a few of them are run.
        allowed: the sum of errors that is of interest; of tensors that matter less, only the
            error of their group is known, divided by their number.
        progress: is shown the groups.

    Raises:
        UnsupportedModelError: the model cannot be brought to an opset with Round.
        RuntimeRefusedError: it does not run.
    """
    if not grids:
        return {}
    with open_session(_probe(model, grids)) as session:
        inputs = [spec for spec in session.inputs if spec.name != _FLAGS]
        feeds = list(samples.feeds(inputs, most=_FEEDS))
        names = list(grids)
        trial = _Trial(session, feeds, names)
        groups = [names[start : start + _GROUP] for start in range(0, len(names), _GROUP)]
        errors: dict[str, float] = {}
        for group in progress.track(groups, "Rounding activations", total=len(groups)):
            trial.measure(group, allowed / len(names), errors)
    return errors


class _Trial:
    """Runs with some tensors rounded."""

    def __init__(
        self, session: Session, feeds: Sequence[Mapping[str, Any]], names: list[str]
    ) -> None:
        self._names = np.array(names)
        self._session = session
        self._feeds = feeds
        self._expected = [self._run(feed, ()) for feed in feeds]

    def measure(self, group: Sequence[str], share: float, errors: dict[str, float]) -> None:
        """Enters the errors of a group of tensors, split where they are more than their share."""
        error = self._error(group)
        if len(group) == 1 or error <= share * len(group):
            errors.update(dict.fromkeys(group, error / len(group)))
            return
        middle = len(group) // 2
        self.measure(group[:middle], share, errors)
        self.measure(group[middle:], share, errors)

    def _error(self, group: Sequence[str]) -> float:
        sums = {spec.name: OutputSums(spec.name) for spec in self._session.outputs}
        for feed, expected in zip(self._feeds, self._expected, strict=True):
            for name, array in self._run(feed, group).items():
                sums[name].update(expected[name], array)
        return worst_error(sums.values())

    def _run(self, feed: Mapping[str, Any], group: Sequence[str]) -> Mapping[str, Any]:
        flags = np.isin(self._names, np.array(group, dtype=str))
        return self._session.run({**feed, _FLAGS: flags})


def tolerable(errors: Mapping[str, float], allowed: float) -> set[str]:
    """As many tensors as possible whose errors add up to no more than allowed."""
    kept, total = set(), 0.0
    for name, error in sorted(errors.items(), key=lambda item: item[1]):
        total += error
        if not total <= allowed:
            break
        kept.add(name)
    return kept


def decibels(error: float) -> float:
    """The SQNR in dB of an error over signal power."""
    return -10 * math.log10(error) if error > 0 else math.inf


def _probe(model: Model, grids: Mapping[str, AffineGrid]) -> Model:
    """A copy in which each tensor is rounded if its flag, one of the input `_FLAGS`, is true."""
    copy = model.copy()
    copy.at_least_opset(_OPSET)
    made = [tensor for node in copy.graph.nodes for tensor in node.outputs]
    known = {str(tensor.name): tensor for tensor in (*copy.graph.inputs, *made)}
    info = helper.make_tensor_value_info(_FLAGS, TensorProto.BOOL, [len(grids)])
    flags = Variable(_FLAGS, info)
    for index, (name, grid) in enumerate(grids.items()):
        _add_rounding(copy, known[name], grid, flags, index)
    copy.graph.inputs = [*copy.graph.inputs, flags]
    copy.graph.declared_inputs = [*copy.graph.declared_inputs, flags]
    return copy


def _add_rounding(
    copy: Model, tensor: Variable, grid: AffineGrid, flags: Variable, index: int
) -> None:
    graph = copy.graph
    takers: list[Node] = list(dict.fromkeys(tensor.outputs))
    lowest, highest = (int(end) - int(grid.zero_point) for end in (grid.qmin, grid.qmax))

    def number(value: float) -> Any:
        return graph.add_constant("rounding", np.array(value, np.float32))

    def add(op: str, *inputs: Any) -> Variable:
        made: Variable = graph.add_node(op, list(inputs)).outputs[0]
        return made

    scale = number(float(grid.scale))
    steps = add("Round", add("Div", tensor, scale))
    steps = add("Min", add("Max", steps, number(lowest)), number(highest))
    flag = add("Gather", flags, graph.add_constant("rounding", np.array(index)))
    rounded = add("Where", flag, add("Mul", steps, scale), tensor)
    copy.replace_uses(tensor, rounded, only=takers)
