"""Channels whose value no input of the model changes.

A layer whose weights of output channel o are all zero gives bias[o] everywhere. What follows keeps
it a constant: activations and normalizations, pooling, sums with other constants, and layers that
take nothing but constants where their weights are not zero. Padding with zeros ends it, unless the
constant is zero.

Values are computed in ONNX Runtime with the model's own nodes, on one element a channel.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Constant, Graph, Model, Node, Variable
from onnxslim_passes.passes.channels.labels import Channels
from onnxslim_passes.passes.channels.layers import Layer, is_padded, optional_input
from onnxslim_passes.passes.channels.state import Trace
from onnxslim_passes.passes.channels.tracing import ELEMENTWISE
from onnxslim_passes.passes.folding import evaluate

__all__ = ["Values", "constant_channels"]

Values: TypeAlias = npt.NDArray[np.float64]
"""Shape (C,): the value of each constant channel, NaN for the others."""

_COMPUTED = (*(op for op in ELEMENTWISE if op != "Dropout"), "BatchNormalization")
_UNCHANGED = (
    *("MaxPool", "GlobalMaxPool", "GlobalAveragePool", "ReduceMean", "ReduceMax", "ReduceMin"),
    *("Transpose", "Squeeze", "Unsqueeze", "Resize", "Upsample"),
)


def constant_channels(trace: Trace) -> dict[Variable, Values]:
    """The values of the constant channels of every traced tensor that has some."""
    return _Propagation(trace).run()


class _Propagation:
    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._layers = {layer.node: layer for layer in trace.layers}
        self._values: dict[Variable, Values] = {}

    def run(self) -> dict[Variable, Values]:
        for node in self._trace.order:
            output = next(iter(node.outputs), None)
            channels = None if output is None else self._trace.labels.tensors.get(output)
            if output is None or channels is None:
                continue
            values = self._of(node, channels)
            if values is not None and np.isfinite(values).any():
                self._values[output] = np.where(np.isfinite(values), values, np.nan)
        return self._values

    def _of(self, node: Node, channels: Channels) -> Values | None:
        """The values in a node's first output, or None if it keeps no constants."""
        if node in self._layers:
            return self._layer(self._layers[node])
        if node.op == "Conv":
            return self._depthwise(node)
        if node.op == "Concat":
            return self._concat(node, channels)
        if all(self._values.get(tensor) is None for tensor in node.inputs):
            return None
        if node.op in _COMPUTED:
            return self._computed(node, channels)
        taken = self._values.get(node.inputs[0])
        if taken is None or node.op in _UNCHANGED:
            return taken
        if node.op in ("Flatten", "Reshape"):
            inner = self._trace.labels.tensors[node.inputs[0]].ids.size
            # The channels lie on the second axis or, between sizes, repeat in their order.
            return taken if inner == channels.ids.size else self._spread(node, taken)
        if node.op == "Dropout":
            return taken if len(node.inputs) < 3 else None
        if node.op == "AveragePool":
            reaches_out = is_padded(node) or node.attr("ceil_mode", 0)
            counts_zeros = reaches_out and node.attr("count_include_pad", 0)
            return _only_zeros(taken) if counts_zeros else taken
        # Pad, ReduceSum, ReduceL2.
        return _only_zeros(taken) if node.op != "Pad" or _pads_zeros(node) else None

    def _spread(self, node: Node, taken: Values) -> Values | None:
        """The values behind a flattening, in the order in which it lays the channels out."""
        before = self._trace.labels.tensors[node.inputs[0]]
        shape = self._trace.shape(node.inputs[0])
        assert shape is not None  # it was traced
        inner = int(np.prod([int(size) for size in shape[before.axis + 1 :] if size is not None]))
        outer = int(np.prod([int(size) for size in shape[1 : before.axis] if size is not None]))
        spread: Values = np.tile(np.repeat(taken, inner), outer)
        return spread

    # ---- layers

    def _layer(self, layer: Layer) -> Values | None:
        bias = self._bias(layer)
        if bias is None:
            return None
        count = layer.inputs.size
        taken = self._values.get(layer.node.inputs[0], np.full(count, np.nan))
        matrix = layer.matrix()
        used = (matrix != 0).any(axis=2)
        known = np.isfinite(taken) if layer.shows_constants else taken == 0
        constant = ~used[:, ~known].any(axis=1)
        if not constant.any():
            return None
        sums = matrix[constant][:, known].sum(axis=2, dtype=np.float64) @ taken[known]
        values = np.full(layer.outputs.size, np.nan)
        values[constant] = layer.factor * sums + bias[constant]
        return values

    def _bias(self, layer: Layer) -> Values | None:
        """The bias that the node itself adds, shape (O,); None if it is not one value a channel."""
        given = optional_input(layer.node, 2)
        if given is None:
            return np.zeros(layer.outputs.size)
        assert isinstance(given, Constant)  # others are not traced
        if given.size not in (1, given.shape[-1]):
            return None
        values = given.values.astype(np.float64).reshape(-1) * layer.bias_factor
        return np.broadcast_to(values, layer.outputs.size)

    def _depthwise(self, node: Node) -> Values:
        weight = node.inputs[1].values.astype(np.float64)
        kernels = weight.reshape(weight.shape[0], -1)
        bias = optional_input(node, 2)
        shift = bias.values.astype(np.float64) if isinstance(bias, Constant) else 0.0
        taken = self._values.get(node.inputs[0], np.full(len(kernels), np.nan))
        shown = _only_zeros(taken) if is_padded(node) else taken
        product = np.where((kernels != 0).any(axis=1), shown * kernels.sum(axis=1), 0.0)
        values: Values = product + shift
        return values

    # ---- the rest

    def _concat(self, node: Node, channels: Channels) -> Values | None:
        parts = [
            self._values.get(tensor, np.full(self._width(tensor, channels), np.nan))
            for tensor in node.inputs
        ]
        if int(node.attr("axis", 0)) % channels.rank == channels.axis:
            return np.concatenate(parts)
        same = np.all([part == parts[0] for part in parts], axis=0)
        return np.where(same, parts[0], np.nan)

    def _width(self, tensor: Variable, channels: Channels) -> int:
        known = self._trace.of(tensor)
        if known is not None:
            return known.ids.size
        shape = self._trace.shape(tensor)
        assert shape is not None  # it was traced
        size = shape[channels.from_right]
        assert isinstance(size, int)
        return size

    def _computed(self, node: Node, channels: Channels) -> Values | None:
        """Runs the node on one element a channel."""
        known, constant = {}, np.ones(channels.ids.size, np.bool_)
        for tensor in node.inputs:
            if tensor.is_empty() or isinstance(tensor, Constant):
                continue
            values, carried = self._values.get(tensor), self._trace.of(tensor)
            dtype = self._trace.types.of(tensor)
            if values is None or carried is None or dtype is None or dtype.dtype is None:
                return None
            shape = np.ones(carried.rank, np.int64)
            shape[carried.axis] = values.size
            constant &= np.isfinite(values)
            known[tensor] = np.nan_to_num(values).astype(dtype.dtype).reshape(shape)
        result = _run(self._trace.model, node, known)
        if result is None or result.size != channels.ids.size:
            return None
        return np.where(constant, result.astype(np.float64).reshape(-1), np.nan)


def _run(
    model: Model, node: Node, known: dict[Variable, npt.NDArray[Any]]
) -> npt.NDArray[Any] | None:
    """The node's first output, or None if it cannot be computed by itself."""
    output = node.outputs[0]
    done = evaluate(model, _scope(node.graph), [node], known, [output])
    return done.values.get(output)


def _scope(graph: Graph) -> Graph:
    while graph.parent is not None:
        graph = graph.parent
    return graph


def _only_zeros(values: Values) -> Values:
    return np.where(values == 0, values, np.nan)


def _pads_zeros(node: Node) -> bool:
    """Whether what a `Pad` adds is zeros, or copies of what is there."""
    if node.attr("mode", "constant") != "constant":
        return True
    fill = optional_input(node, 2)
    if fill is None:
        return not node.attr("value", 0.0)
    return isinstance(fill, Constant) and not fill.values.any()
