"""Gradients against finite differences, with ONNX Runtime computing both.

The loss of a check is the sum of all floating-point outputs, each element times a fixed random
weight. Its derivative along a random direction of the inputs, a central difference, must be the
product of direction and gradient: one number that every element of every gradient enters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes import runtime
from onnxslim_passes.errors import RuntimeRefusedError
from onnxslim_passes.model import Model, Variable
from onnxslim_passes.training import Emitter, gradients, lower

Array = npt.NDArray[Any]
Feed = dict[str, Array]

# Steps: the error of a central difference is O(h^2) from curvature and O(eps / h) from rounding.
STEP = {np.dtype(np.float64): 1e-6, np.dtype(np.float32): 1e-3}
# Relative to the size of the terms of the derivative. Double: rounding, 1e-16 / 1e-6, and constants
# that ONNX Runtime itself holds in single precision.
# Single: rounding of the outputs, 6e-8 / 1e-3 each, in sums of up to a few thousand.
TOLERANCE = {np.dtype(np.float64): 1e-6, np.dtype(np.float32): 5e-3}
DIRECTIONS = 2


@dataclass(frozen=True)
class Comparison:
    """Derivatives along some directions.

    Attributes:
        computed: by the gradients.
        measured: by finite differences.
        scale: the size of what was added up, which rounding is relative to.
        dtype: in which the model ran.
    """

    computed: list[float]
    measured: list[float]
    scale: float
    dtype: np.dtype[Any]

    @property
    def error(self) -> float:
        """The largest difference relative to the scale."""
        pairs = zip(self.computed, self.measured, strict=True)
        return max(abs(one - other) for one, other in pairs) / self.scale

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance of the type."""
        return self.error <= TOLERANCE[self.dtype]


class Differentiated:
    """A model with a loss and the gradients of some of its tensors.

    Args:
        model: the forward model.
        feed: its inputs.
        wrt: names of inputs or initializers.
        outputs: how many of the floating-point outputs enter the loss; all if None.
    """

    def __init__(
        self, model: Model, feed: Feed, wrt: Sequence[str], outputs: int | None = None
    ) -> None:
        self.wrt = list(wrt)
        self._forward, self._given = model, dict(feed)
        # Whole numbers and conditions are settings: axes, shapes, indices.
        fixed = {name: value for name, value in feed.items() if name not in wrt}
        given = {tensor.name for tensor in model.graph.inputs}
        fixed = {name: value for name, value in fixed.items() if name in given}
        self.feed = {name: value for name, value in feed.items() if name not in fixed}
        lowered = lower(model, fixed_inputs=fixed).model
        emit = Emitter(lowered)
        chosen = [t for t in lowered.graph.outputs if emit.is_float(t)][:outputs]
        for name in wrt:
            weight = next((c for c in lowered.constants() if c.name == name), None)
            if weight is not None:
                self.feed[name] = np.array(weight.values)
                emit.promote(weight)
        tensors = {tensor.name: tensor for tensor in lowered.graph.inputs}
        self.names = [tensor.name for tensor in chosen]
        self._weights = [f"weight of {tensor.name}" for tensor in chosen]
        loss = self._loss(emit, chosen)
        made = gradients(emit, loss, [tensors[name] for name in self.wrt])
        for name in self.wrt:
            emit.output(made[tensors[name]], f"gradient of {name}")
        self.model = lowered

    def _loss(self, emit: Emitter, outputs: Sequence[Variable]) -> Variable:
        terms = []
        for tensor, name in zip(outputs, self._weights, strict=True):
            weight = emit.input(name, emit.dtype(tensor), emit.shape(tensor))
            terms.append(emit.reduce_sum(emit.mul(tensor, weight)))
        return emit.op("Sum", *[emit.cast_like(term, terms[0]) for term in terms])

    def compare(self, *, optimize: runtime.Optimization = "basic") -> Comparison:
        """Runs the gradients once and the outputs twice a direction."""
        generator = np.random.default_rng(0)
        feed = {**self.feed, **self._random_weights(generator)}
        with runtime.open_session(self.model.to_proto(), optimize=optimize) as session:
            found = session.run(feed, [f"gradient of {name}" for name in self.wrt])
            computed, measured, scale = [], [], 1e-30
            for _ in range(DIRECTIONS):
                direction = {
                    name: generator.standard_normal(self.feed[name].shape) for name in self.wrt
                }
                terms = [
                    found[f"gradient of {name}"].astype(np.float64) * direction[name]
                    for name in self.wrt
                ]
                computed.append(sum(float(term.sum()) for term in terms))
                change = self._change(session, feed, direction)
                measured.append(sum(float(term.sum()) for term in change))
                scale = max(scale, *(float(np.abs(term).sum()) for term in (*terms, *change)))
        dtype = min((self.feed[name].dtype for name in self.wrt), key=lambda d: d.itemsize)
        return Comparison(computed, measured, scale, dtype)

    def _random_weights(self, generator: np.random.Generator) -> Feed:
        """A weight for each element of the outputs; 0 for infinite ones: masked scores."""
        with runtime.open_session(self._forward, optimize="none") as session:
            given = {spec.name for spec in session.inputs}
            feed = {name: value for name, value in self._given.items() if name in given}
            outputs = session.run(feed, self.names)
        weights = {}
        for name, output in outputs.items():
            signs = generator.choice([-1, 1], output.shape)
            weight = generator.uniform(0.5, 1.5, output.shape) * signs * np.isfinite(output)
            weights[f"weight of {name}"] = np.asarray(weight, output.dtype)
        return weights

    def _change(
        self, session: runtime.Session, feed: Feed, direction: Mapping[str, Array]
    ) -> list[Array]:
        """Every element's part in the central difference of the loss."""
        step = STEP[min((feed[name].dtype for name in direction), key=lambda d: d.itemsize)]
        moved = []
        for sign in (1, -1):
            shifted = {
                name: np.asarray(feed[name] + sign * step * way, feed[name].dtype)
                for name, way in direction.items()
            }
            moved.append(session.run({**feed, **shifted}, self.names))
        changes = []
        for name, weight in zip(self.names, self._weights, strict=True):
            one, other = (np.nan_to_num(side[name].astype(np.float64)) for side in moved)
            changes.append((one - other) * feed[weight].astype(np.float64) / (2 * step))
        return changes


def compare(
    proto: onnx.ModelProto,
    feed: Feed,
    wrt: Sequence[str] | None = None,
    *,
    outputs: int | None = None,
) -> Comparison:
    """Checks the gradients of the floating-point inputs, in double precision where it runs."""
    names = [name for name, value in feed.items() if value.dtype.kind == "f"]
    wrt = names if wrt is None else list(wrt)
    doubled = in_double(proto)
    twice = {
        name: value.astype(np.float64) if value.dtype == np.float32 else value
        for name, value in feed.items()
    }
    try:
        with runtime.open_session(doubled, optimize="none"):
            pass
        return Differentiated(Model.from_proto(doubled), twice, wrt, outputs).compare()
    except RuntimeRefusedError:
        return Differentiated(Model.from_proto(proto), feed, wrt, outputs).compare()


def in_double(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with double in place of single precision, wherever that is said."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.value_info[:]
    for info in (*copy.graph.input, *copy.graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in copy.graph.initializer:
        _double(tensor)
    for node in copy.graph.node:
        if node.op_type == "GroupNormalization":
            node.attribute.append(helper.make_attribute("stash_type", TensorProto.DOUBLE))
        for attribute in node.attribute:
            if attribute.name in ("to", "stash_type") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
            if attribute.HasField("t"):
                _double(attribute.t)
            if attribute.name == "value_float":
                array = np.array(attribute.f, np.float64)
                attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(array)))
    return copy


def _double(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        array = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
