"""What other values of one weight do to the outputs, for many weights in one session.

Weights become inputs that have their values as defaults, so that a run that feeds other values of
one of them shows its effect.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from onnxslim_passes.evaluation.fidelity import OutputSums, worst_error
from onnxslim_passes.model import Constant, Model, Weight
from onnxslim_passes.runtime import Feed, Session, open_session

__all__ = ["WeightEffects", "is_measurable", "weight_effects"]

_DTYPES = frozenset(np.dtype(kind) for kind in (np.float16, np.float32, np.float64))


class WeightEffects:
    """Runs with other values of one weight; made by `weight_effects`."""

    def __init__(self, session: Session, feeds: Sequence[Feed]) -> None:
        self._session = session
        self._feeds = feeds
        self._expected = [session.run(feed) for feed in feeds]

    def error(self, weight: Weight, values: npt.NDArray[Any]) -> float:
        """The error of the worst float output, power over signal power; see `worst_error`."""
        sums = {spec.name: OutputSums(spec.name) for spec in self._session.outputs}
        for feed, expected in zip(self._feeds, self._expected, strict=True):
            for name, array in self._session.run({**feed, weight.name: values}).items():
                sums[name].update(expected[name], array)
        return worst_error(sums.values())


def is_measurable(model: Model, weight: Weight) -> bool:
    """Whether ONNX Runtime can be fed other values: of the main graph, and a type of NumPy's."""
    return weight.graph is model.graph and weight.dtype in _DTYPES


@contextmanager
def weight_effects(
    model: Model, weights: Sequence[Weight], feeds: Sequence[Feed]
) -> Iterator[WeightEffects]:
    """Opens a session for measuring.

    Args:
        model: stays as it is.
        weights: of `model`, measurable ones.
        feeds: what outputs are compared on.

    Raises:
        RuntimeRefusedError: the model does not load or run.
    """
    copy = model.copy()
    constants = _by_name(copy)
    for weight in weights:
        constant = constants[weight.name]
        if constant.input_info is None:
            constant.input_info = helper.make_tensor_value_info(
                weight.name, constant.elem_type, list(constant.shape)
            )
            copy.graph.declared_inputs = [*copy.graph.declared_inputs, constant]
    copy.ir_version = max(copy.ir_version, 4)  # the first in which such inputs need not be fed
    with open_session(copy) as session:
        yield WeightEffects(session, feeds)


def _by_name(model: Model) -> Mapping[str, Constant]:
    return {str(each.name): each for each in model.constants() if each.owner is model.graph}
