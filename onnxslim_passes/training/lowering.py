"""The training copy of a model: one flat graph of operators that have gradients.

The user's model is never edited. In the copy, calls of model-local functions are replaced by their
nodes, an If whose condition is known by the branch that is taken, fixed inputs by constants, and
the opset is one in which every operator that training emits exists. Weights keep their names, so
that what was learned can be written back into the original.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from onnxslim_passes.errors import unknown_name
from onnxslim_passes.model import Constant, Model, Variable
from onnxslim_passes.model.inlining import inline_functions
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.branches import choose_branches, unknown_branches
from onnxslim_passes.training.builder import MINIMUM_OPSET
from onnxslim_passes.training.shapes import Array

BatchNorm = Literal["frozen", "batch"]


@dataclass(frozen=True)
class StateTensor:
    """A weight that a step of training changes without a gradient: a running mean or variance.

    Attributes:
        weight: the weight.
        next: its value after the step.
    """

    weight: Constant
    next: Variable


@dataclass(frozen=True)
class Lowered:
    """A training copy.

    Attributes:
        model: the copy.
        decisions: what was done to which node, and what was passed over.
        state: running statistics, where normalization uses those of the batch.
    """

    model: Model
    decisions: tuple[Decision, ...]
    state: tuple[StateTensor, ...] = ()

    def weight(self, name: str) -> Constant:
        """The weight of this name.

        Raises:
            UnknownNameError: there is none.
        """
        constants = {constant.name: constant for constant in self.model.constants()}
        if name not in constants:
            raise unknown_name("weight", name, constants)
        return constants[name]


def lower(
    model: Model,
    *,
    fixed_inputs: Mapping[str, Array] | None = None,
    sizes: Mapping[str, int] | None = None,
    batch_norm: BatchNorm = "frozen",
) -> Lowered:
    """Makes the training copy of a model.

    Args:
        model: any model; stays as it is.
        fixed_inputs: values of inputs that are the same in all of training, e.g. a sampling rate
            that an If asks for; they are inputs no more.
        sizes: of free dimensions that are the same in all of training, by the symbol of the
            dimension or as "INPUT/AXIS".
        batch_norm: "frozen" keeps the running statistics; "batch" normalizes with those of the
            batch and updates the running ones (`Lowered.state`).

    Raises:
        UnknownNameError: a fixed input or size that the model does not have.
        UnsupportedModelError: its opset or functions cannot be converted.
    """
    copy = inline_functions(model) if model.functions else model.copy()
    copy.fix_overridable_weights()
    copy.at_least_opset(MINIMUM_OPSET)
    decisions = list(fix_inputs(copy, fixed_inputs or {}))
    decisions += _fix_sizes(copy, sizes or {})
    decisions += choose_branches(copy)
    decisions += unknown_branches(copy)
    copy.remove_unused()
    state: list[StateTensor] = []
    if batch_norm == "batch":
        decisions += _use_batch_statistics(copy, state)
    _hand_out_batch_statistics(copy)
    return Lowered(copy, tuple(decisions), tuple(state))


def fix_inputs(model: Model, values: Mapping[str, Array]) -> list[Decision]:
    """Makes inputs constants, each of the value given.

    Raises:
        UnknownNameError: there is no such input.
    """
    graph = model.graph
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    decisions = []
    for name, value in values.items():
        if name not in inputs:
            raise unknown_name("input", name, inputs)
        tensor = inputs[name]
        array = np.asarray(value, tensor.dtype)
        graph.inputs = [one for one in graph.inputs if one is not tensor]
        graph.declared_inputs = [one for one in graph.declared_inputs if one is not tensor]
        model.replace_uses(tensor, graph.add_constant(name, array))
        decisions.append(Decision(where=name, taken=True, reason="input fixed to one value"))
    return decisions


def _fix_sizes(model: Model, sizes: Mapping[str, int]) -> list[Decision]:
    dims: dict[str, list[tuple[Variable, int]]] = {}
    for tensor in model.graph.inputs:
        for axis, size in enumerate(tensor.shape or ()):
            if not isinstance(size, int) or size < 0:
                dims.setdefault(size if isinstance(size, str) else "", []).append((tensor, axis))
                dims[f"{tensor.name}/{axis}"] = [(tensor, axis)]
    dims.pop("", None)
    decisions = []
    for name, size in sizes.items():
        if name not in dims:
            raise unknown_name("free dimension", name, dims)
        for tensor, axis in dims[name]:
            _set_size(tensor, axis, size)
        decisions.append(Decision(where=name, taken=True, reason=f"dimension fixed to {size}"))
    return decisions


def _set_size(tensor: Variable, axis: int, size: int) -> None:
    info = onnx.ValueInfoProto()
    info.CopyFrom(tensor.info)
    info.type.tensor_type.shape.dim[axis].dim_value = size
    tensor.info = info
    tensor.shape = [size if place == axis else one for place, one in enumerate(tensor.shape or ())]


def _use_batch_statistics(model: Model, state: list[StateTensor]) -> list[Decision]:
    decisions = []
    for node in model.graph.nodes:
        if node.op != "BatchNormalization" or node.domain:
            continue
        statistics = node.inputs[3:5]
        if not all(isinstance(tensor, Constant) for tensor in statistics):
            reason = "its running statistics are not weights"
            decisions.append(Decision(where=node.where, taken=False, reason=reason))
            continue
        node.attrs["training_mode"] = 1
        node.outputs = list(node.outputs)[:1]
        for tensor, label in zip(statistics, ("mean", "var"), strict=True):
            made = Variable(model.fresh_name(f"{tensor.name}/next_{label}"))
            node.outputs.append(made)
            state.append(StateTensor(tensor, made))
        reason = "normalizes with the statistics of the batch"
        decisions.append(Decision(where=node.where, taken=True, reason=reason))
    return decisions


def _hand_out_batch_statistics(model: Model) -> None:
    """Lets normalizations with statistics of the batch hand those out, as gradients need them.

    With momentum 0 the operator's running statistics are the batch's; the weighted means that
    they were become nodes of their own.
    """
    graph = model.graph
    for node in list(graph.nodes):
        if node.op != "BatchNormalization" or node.domain or not node.attr("training_mode", 0):
            continue
        momentum = node.attr("momentum", 0.9)
        node.attrs["momentum"] = 0.0
        for place, before in enumerate(node.inputs[3:5], start=1):
            if place >= len(node.outputs) or node.outputs[place].is_empty():
                continue
            running = node.outputs[place]
            batch = node.outputs[place] = Variable(model.fresh_name(f"{running.name}/batch"))
            kept, taken, nothing = (
                graph.add_node("Mul", [tensor, _scalar(model, factor, before)]).outputs[0]
                for tensor, factor in ((before, momentum), (batch, 1 - momentum), (before, 0))
            )
            graph.add_node("Add", [kept, taken], outputs=[running])
            # ONNX Runtime (1.32) writes these outputs over these inputs, whoever else reads them.
            node.inputs[2 + place] = nothing


def _scalar(model: Model, value: float, like: Variable | Constant) -> Constant:
    return model.graph.add_constant("factor", np.array(value, like.dtype or np.float32))
