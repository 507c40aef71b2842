"""Takes channels out of everything that carries them, and constants into biases."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Constant, Graph, Node, Variable
from onnxslim_passes.passes.channels.layers import Layer
from onnxslim_passes.passes.channels.state import Trace

__all__ = ["cut_channels", "fold_into_bias"]

Keep: TypeAlias = npt.NDArray[np.bool_]
"""For each label whether it stays; shape (labels,)."""


def cut_channels(trace: Trace, keep: Keep) -> None:
    """Removes the positions whose label does not stay from all weights and tensors.

    Args:
        trace: of the model, before any edit.
        keep: by root; at least one position of every axis stays.
    """
    labels = trace.labels
    for (constant, axis), ids in labels.weights.items():
        stays = keep[labels.roots(ids)]
        if not stays.all():
            constant.values = np.compress(stays, constant.values, axis=axis)
    for resize in trace.resizes:
        stays = keep[labels.roots(resize.ids)]
        if not stays.all():
            _set_count(resize.node, resize.position, int(stays.sum()))
    for tensor, channels in labels.tensors.items():
        if not keep[labels.roots(channels.ids)].all():
            tensor.forget_type()
    for graph in trace.model.graphs():
        _forget_captured(graph)


def fold_into_bias(layer: Layer, shift: npt.NDArray[np.float64]) -> None:
    """Adds a number to each output channel of a layer, float64, shape (O,).

    The bias is replaced, not written into, if others share it; a new one is made if there is none.
    """
    graph, old = layer.node.graph, layer.bias
    shift = shift / layer.bias_factor
    if isinstance(old, Constant):
        bias = (old.values.astype(np.float64) + shift).astype(old.dtype)
        if len(old.outputs) == 1 and old.owner is graph:
            old.values = bias
            return
        _replace_input(layer.addition or layer.node, old, graph.add_constant(old.name, bias))
        return
    bias = shift.astype(layer.weight.dtype)
    constant = graph.add_constant(f"{layer.weight.name}_bias", bias)
    if layer.node.op == "MatMul":
        _add_behind(layer.node, constant)
    elif len(layer.node.inputs) > 2:
        layer.node.inputs[2] = constant
    else:
        layer.node.inputs.append(constant)


def _add_behind(node: Node, bias: Constant) -> None:
    """Puts an `Add` between a node and those that take its output, which keeps its name."""
    result = node.outputs[0]
    product = Variable(node.graph.fresh_name(f"{result.name}_product"))
    node.outputs[0] = product
    node.graph.add_node("Add", [product, bias], outputs=[result])


def _replace_input(node: Node, old: Constant, new: Constant) -> None:
    for index, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[index] = new


def _set_count(node: Node, position: int | None, count: int) -> None:
    """Writes a number of channels into a node: its `group`, or an entry of its shape."""
    if position is None:
        node.attrs["group"] = count
        return
    target = node.inputs[1]
    shape: npt.NDArray[Any] = np.array(target.values)
    shape[position] = count
    if len(target.outputs) == 1 and target.owner is node.graph:
        target.values = shape
    else:
        node.inputs[1] = node.graph.add_constant(target.name, shape)


def _forget_captured(graph: Graph) -> None:
    """Drops declarations of outer tensors, which may have changed."""
    graph.foreign_infos.clear()
