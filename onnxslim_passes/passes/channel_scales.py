"""Moving a factor of each channel from one layer into the next, without a trace in the outputs.

A tensor whose channels are divided by s on the way in and multiplied by s in the weights behind
leaves every output as it was. `sources` finds the constants in front of a tensor that have to be
divided; it looks through operators for which f(x / s) = f(x) / s, s > 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Constant, Model, Node, Variable

Array = npt.NDArray[Any]

HOMOGENEOUS = frozenset(("Abs", "Identity", "LeakyRelu", "Neg", "PRelu", "Relu"))
"""Operators with f(x / s) = f(x) / s on every element."""

HOMOGENEOUS_PER_PLANE = frozenset(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"))
"""The same where all of a channel's plane shares one s."""

LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))


@dataclass(frozen=True)
class Place:
    """A constant to divide: input `index` of `node`, whose channels lie on `axis`."""

    node: Node
    index: int
    axis: int

    @property
    def constant(self) -> Constant:
        """The constant as it stands."""
        constant: Constant = self.node.inputs[self.index]
        return constant


@dataclass(frozen=True)
class Sources:
    """Where the factor of a tensor can go.

    Attributes:
        places: all constants that have to be divided; the last one's node made the values.
        through: the tensors in between, whose values change with the factor.
    """

    places: tuple[Place, ...]
    through: tuple[Variable, ...]

    @property
    def maker(self) -> Node:
        """The node that the factor ends in."""
        return self.places[-1].node


def sources(model: Model, tensor: Variable, *, channels: int, last: bool) -> Sources | str:
    """The constants in front of a tensor, or why its channels cannot be scaled there.

    Args:
        model: stays as it is.
        tensor: of its main graph; the caller knows about its consumers.
        channels: length of the channel axis.
        last: the channels lie on the last axis, else on axis 1.
    """
    places: list[Place] = []
    through = [tensor]
    while True:
        current = through[-1]
        node = current.inputs[0] if current.inputs else None
        if (
            node is None
            or node.graph is not model.graph
            or node.domain
            or current not in (node.outputs[:1])
        ):
            return f"{current.name!r} is made by no layer"
        step = _step(node, channels, last)
        if isinstance(step, str):
            return step
        found, onward = step
        reasons = [reason for place in found if (reason := _unfit(place)) is not None]
        if reasons:
            return reasons[0]
        places += found
        if onward is None:
            return Sources(tuple(places), tuple(through))
        if len(onward.outputs) != 1 or onward in model.graph.outputs:
            return f"{onward.name!r} is taken by others, too"
        through.append(onward)


def _step(node: Node, channels: int, last: bool) -> tuple[list[Place], Variable | None] | str:
    """What to divide at one node, and where to go on; or why there is no way."""
    op = node.op
    if op in HOMOGENEOUS or (op in HOMOGENEOUS_PER_PLANE and not last):
        if op == "PRelu" and not isinstance(node.inputs[1], Constant):
            return f"the slope of {node.where} is not constant"
        return [], node.inputs[0]
    if op in LAYERS:
        return _layer_places(node, channels, last)
    if op == "LayerNormalization" and last:
        return _rows(node, (1, 2), channels), None
    if op == "BatchNormalization" and not last:
        return _rows(node, (1, 2), channels), None
    if op in ("Add", "Mul") and last:
        for index, other in ((0, 1), (1, 0)):
            found = _rows(node, (index,), channels)
            if found and isinstance(node.inputs[other], Variable):
                return found, (node.inputs[other] if op == "Add" else None)
    return f"it comes through {op} {node.where}, which a factor does not pass"


def _layer_places(
    node: Node, channels: int, last: bool
) -> tuple[list[Place], Variable | None] | str:
    weight = node.inputs[1]
    if (node.op in ("MatMul", "Gemm")) != last:
        return f"the channels of {node.where} lie on another axis"
    if not isinstance(weight, Constant):
        return f"the weight of {node.where} is not constant"
    if node.op == "ConvTranspose" and node.attr("group", 1) != 1:
        return f"{node.where} is a grouped ConvTranspose"
    axis = {"Conv": 0, "ConvTranspose": 1}.get(node.op, len(weight.shape) - 1)
    if node.op == "Gemm" and node.attr("transB", 0):
        axis = 0
    if len(weight.shape) < 2 or weight.shape[axis] != channels:
        return f"the weight of {node.where} has shape {weight.shape}"
    places = []
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        places = _rows(node, (2,), channels)
        if not places:
            return f"the bias of {node.where} is not one number a channel"
    return [*places, Place(node, 1, axis)], None


def _rows(node: Node, indices: Sequence[int], channels: int) -> list[Place]:
    """Those inputs that are constants of one number a channel along their last axis, or one."""
    found = []
    for index in indices:
        tensor = node.inputs[index] if len(node.inputs) > index else None
        if isinstance(tensor, Constant) and tensor.size in (1, channels):
            shape = tensor.shape
            if tensor.size == 1 or shape[-1] == channels:
                found.append(Place(node, index, -1))
    return found


def _unfit(place: Place) -> str | None:
    constant = place.constant
    if constant.dtype != np.dtype(np.float32):
        return f"{constant.name!r} is {constant.dtype.name}; float32 was expected"
    if constant.input_info is not None:
        return f"{constant.name!r} is also an input of the model, which a caller may override"
    if not np.isfinite(constant.values).all():
        return f"{constant.name!r} holds NaN or infinity"
    return None


def divide(model: Model, place: Place, factors: Array) -> None:
    """Divides the channels of a constant; others that take it keep theirs.

    Args:
        model: whose constant it is.
        place: the constant.
        factors: float64 (C,), > 0.
    """
    values = place.constant.values.astype(np.float64)
    if values.size == 1:
        values = np.broadcast_to(values, (*values.shape[:-1], len(factors)))
    _replace(model, place.node, place.index, values / _aligned(factors, values.ndim, place.axis))


def input_axis(node: Node) -> int:
    """The axis of a MatMul's or Gemm's weight that is summed over."""
    return 1 if node.op == "Gemm" and node.attr("transB", 0) else 0


def unfit_layer(node: Node) -> str | None:
    """Why the channels of a layer's weight cannot be scaled on either side, or None."""
    weight = node.inputs[1]
    if node.op in ("Gemm", "MatMul") and len(weight.shape) != 2:
        return f"it has shape {weight.shape}; a matrix is needed"
    if len(weight.shape) < 2 or weight.size == 0:
        return f"it has shape {weight.shape}: nothing to scale"
    if node.op == "Gemm" and node.attr("transA", 0):
        return f"the data of {node.where} is transposed"
    if isinstance(node.inputs[0], Constant):
        return f"{node.where} takes constants only; run fold-constants first"
    return _unfit(Place(node, 1, 0))


def multiply_inputs(model: Model, node: Node, factors: Array) -> None:
    """Multiplies what a layer's weight does with each input channel, (C,) > 0; any groups."""
    values = node.inputs[1].values.astype(np.float64)
    if node.op == "ConvTranspose":
        scaled = values * _aligned(factors, values.ndim, 0)
    elif node.op == "Conv":
        groups = int(node.attr("group", 1))
        blocks = values.reshape(groups, -1, values.shape[1], int(np.prod(values.shape[2:])))
        scaled = (blocks * factors.reshape(groups, 1, -1, 1)).reshape(values.shape)
    else:
        scaled = values * _aligned(factors, 2, input_axis(node))
    _replace(model, node, 1, scaled)


def channel_peaks(node: Node) -> Array:
    """The largest magnitude between each output and input channel of a layer.

    Returns:
        float64, shape (groups, outputs / groups, inputs / groups).
    """
    values = np.abs(node.inputs[1].values.astype(np.float64))
    if node.op in ("Gemm", "MatMul"):
        return np.asarray(values if input_axis(node) else values.T)[None]
    groups = int(node.attr("group", 1))
    kernel = int(np.prod(values.shape[2:]))
    peaks = values.reshape(groups, -1, values.shape[1], kernel).max(axis=3)
    return np.asarray(np.swapaxes(peaks, 1, 2) if node.op == "ConvTranspose" else peaks)


def input_channel_peaks(node: Node) -> Array:
    """The largest magnitude that a layer's weight has for each input channel, float64 (C,)."""
    return np.asarray(channel_peaks(node).max(axis=1).reshape(-1))


def _aligned(factors: Array, rank: int, axis: int) -> Array:
    if axis < 0 or rank == 0:
        return factors
    shape = [1] * rank
    shape[axis] = len(factors)
    return factors.reshape(shape)


def _replace(model: Model, node: Node, index: int, values: Array) -> None:
    """New values for one use of a constant."""
    constant: Constant = node.inputs[index]
    if len(constant.outputs) == 1 and constant not in model.graph.outputs:
        constant.values = values.astype(np.float32)
        return
    owner = constant.owner or node.graph
    node.inputs[index] = owner.add_constant(f"{constant.name}_scaled", values.astype(np.float32))
