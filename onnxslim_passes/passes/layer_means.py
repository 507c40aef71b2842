"""Models whose outputs are the channel means of their layers, or what those means lack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from onnxslim_passes.model import Graph, Model, Variable

_REDUCE_AXES_OPSET = 18  # from here on ReduceMean takes its axes as an input


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantized layer, by names, so that it is the same in copies of the model.

    Attributes:
        where: the node, for messages.
        made: the name of the node's output.
        output: the name of the output behind the bias; another one where an Add holds the bias.
        original: the name of the same tensor in the float model.
        channels: output channels.
        rank: number of axes where the channels are on axis 1; None where they are on the last.
    """

    where: str
    made: str
    output: str
    original: str
    channels: int
    rank: int | None


def with_means(model: Model, layers: Sequence[Layer]) -> Model:
    """A copy whose outputs are, for each layer, its channel means (C,) and its size."""
    copy = model.copy()
    tensors = {str(t.name): t for node in copy.graph.nodes for t in node.outputs}
    outputs = []
    for layer in layers:
        tensor = tensors[layer.original]
        mean = _channel_means(copy, tensor, layer)
        size = copy.graph.add_node("Size", [tensor]).outputs[0]
        _declare(mean, TensorProto.FLOAT, [layer.channels])
        _declare(size, TensorProto.INT64, [])
        outputs += [mean, size]
    copy.graph.outputs = outputs
    copy.remove_unused()
    return copy


def with_feedback(model: Model, layers: Sequence[Layer]) -> Model:
    """A copy with an input for each layer's wanted mean and its correction as output."""
    copy = model.copy()
    graph = copy.graph
    tensors = {str(t.name): t for node in graph.nodes for t in node.outputs}
    outputs, inputs = [], []
    for index, layer in enumerate(layers):
        tensor = tensors[layer.output]
        takers = list(dict.fromkeys(tensor.outputs))
        target = Variable(graph.fresh_name(f"mean_{index}"))
        _declare(target, TensorProto.FLOAT, [layer.channels])
        mean = _channel_means(copy, tensor, layer)
        correction = graph.add_node("Sub", [target, mean]).outputs[0]
        _declare(correction, TensorProto.FLOAT, [layer.channels])
        inputs.append(target)
        outputs.append(correction)
        shift = _aligned(graph, correction, layer)
        corrected = graph.add_node("Add", [tensor, shift]).outputs[0]
        copy.replace_uses(tensor, corrected, only=takers)
    graph.inputs = [*graph.inputs, *inputs]
    graph.declared_inputs = [*graph.declared_inputs, *inputs]
    graph.outputs = outputs
    copy.remove_unused()
    return copy


def _channel_means(model: Model, tensor: Variable, layer: Layer) -> Variable:
    """The mean over all axes but the channels', float32 (C,)."""
    graph, axes = model.graph, [0]
    if layer.rank is not None:
        axes = [axis for axis in range(layer.rank) if axis != 1]
    else:
        rows = graph.add_constant("rows", np.array([-1, layer.channels], np.int64))
        tensor = graph.add_node("Reshape", [tensor, rows]).outputs[0]
    return _reduced(model, "ReduceMean", tensor, axes)


def _reduced(model: Model, op: str, tensor: Variable, axes: list[int]) -> Variable:
    if model.opset < _REDUCE_AXES_OPSET:
        attrs: dict[str, Any] = {"axes": axes, "keepdims": 0}
        made = model.graph.add_node(op, [tensor], attrs=attrs)
    else:
        held = model.graph.add_constant("axes", np.array(axes, np.int64))
        made = model.graph.add_node(op, [tensor, held], attrs={"keepdims": 0})
    result: Variable = made.outputs[0]
    return result


def _aligned(graph: Graph, row: Variable, layer: Layer) -> Variable:
    """A row (C,) shaped so that it broadcasts along the layer's channels."""
    if layer.rank is None:
        return row
    shape = np.array([1, layer.channels] + [1] * (layer.rank - 2), np.int64)
    held = graph.add_constant("aligned", shape)
    result: Variable = graph.add_node("Reshape", [row, held]).outputs[0]
    return result


def _declare(tensor: Variable, elem_type: int, shape: Sequence[int]) -> None:
    tensor.info = helper.make_tensor_value_info(tensor.name, elem_type, shape)
    tensor.dtype = helper.tensor_dtype_to_np_dtype(elem_type)
