"""Follows channels through a model, operator by operator.

A rule looks at one node whose inputs have been seen, gives the channels of its output, and returns
"" or the reason why it cannot. What takes a tensor without a rule that covers it pins the channels
of that tensor: so an operator that nobody knows is safe, it only keeps channels.
"""

from collections.abc import Callable
from typing import TypeAlias

import onnx

from onnxslim_passes.model import Constant, Graph, Model, Node
from onnxslim_passes.model.exporting import sorted_nodes
from onnxslim_passes.passes.channels.labels import Channels, Ids
from onnxslim_passes.passes.channels.layers import (
    Layer,
    constant_objection,
    optional_input,
    read_layer,
)
from onnxslim_passes.passes.channels.operators import (
    batch_normalization,
    concat,
    elementwise,
    label_vector,
    pad,
    pooling,
    reduction,
    resize,
)
from onnxslim_passes.passes.channels.reshaping import (
    flatten,
    reshape,
    squeeze,
    transpose,
    unsqueeze,
)
from onnxslim_passes.passes.channels.state import Resize, Tensor, Trace

__all__ = ["ELEMENTWISE", "trace_channels"]

Rule: TypeAlias = Callable[[Trace, Node], str]


def trace_channels(model: Model) -> Trace:
    """Labels the channels of all layers of a model, its bodies and functions included."""
    trace = Trace(model)
    for graph in (model.graph, *model.functions):
        _visit(trace, graph)
    _pin_what_is_taken(trace)
    return trace


def _visit(trace: Trace, graph: Graph) -> None:
    """Traces a graph and the bodies of its nodes."""
    for node in sorted_nodes(graph):
        trace.order.append(node)
        for _, body in node.bodies():
            _visit(trace, body)
        objection = _apply_rule(trace, node)
        if objection:
            trace.objections[node] = objection
            if node.op in LAYERS:
                trace.untraced[node] = objection


def _apply_rule(trace: Trace, node: Node) -> str:
    rule = RULES.get(node.op)
    if rule is None or node.domain:
        return "is not an operator that channels go through"
    if any(isinstance(value, onnx.AttributeProto) for value in node.attrs.values()):
        return "takes an attribute of the function it stands in"
    return rule(trace, node)


def _pin_what_is_taken(trace: Trace) -> None:
    """Pins the channels of outputs and of whatever a node takes that no rule covers."""
    outputs = {id(tensor) for graph in trace.model.graphs() for tensor in graph.outputs}
    carried: list[tuple[Tensor, Ids]] = [
        (tensor, channels.ids) for tensor, channels in trace.labels.tensors.items()
    ]
    carried += [(constant, ids) for (constant, _), ids in trace.labels.weights.items()]
    for tensor, ids in carried:
        if id(tensor) in outputs:
            trace.labels.pin(ids, f"{tensor.name!r} is an output")
        for node in dict.fromkeys(tensor.outputs):
            for index, taken in enumerate(node.inputs):
                if taken is tensor and (node, index) not in trace.covered:
                    reason = trace.objections.get(node, "takes it in another way, too")
                    trace.labels.pin(ids, f"{node.op} {node.where!r} {reason}")


def _layer(trace: Trace, node: Node) -> str:
    """Conv, ConvTranspose, Gemm, MatMul: one set of channels in, another out."""
    if node.op == "Conv" and _is_depthwise(node):
        return _depthwise(trace, node)
    read = read_layer(node)
    if isinstance(read, str):
        return read
    weight, input_axis, output_axis = read
    convolution = node.op.startswith("Conv")
    shape = trace.shape(node.inputs[0])
    rank = len(shape or ()) if node.op == "MatMul" else len(weight.shape)
    if rank == 0:
        return "takes a tensor of unknown rank"
    channel_axis = 1 if convolution else rank - 1
    inputs = _taken(trace, node.inputs[0], channel_axis, weight.shape[input_axis])
    if isinstance(inputs, str):
        return inputs
    bias = optional_input(node, 2)
    if bias is not None and (objection := constant_objection(bias)):
        return f"has a bias that {objection}"
    outputs = trace.labels.fresh(weight.shape[output_axis])
    trace.label_weight(node, 1, input_axis, inputs)
    trace.label_weight(node, 1, output_axis, outputs)
    if bias is not None:
        label_vector(trace, node, 2, -1, outputs)
    trace.cover(node, 0)
    trace.give(node.outputs[0], Channels(outputs, channel_axis, rank))
    layer = Layer(node, weight, input_axis, output_axis, _addition(node), inputs, outputs)
    trace.layers.append(layer)
    return ""


def _taken(trace: Trace, tensor: Tensor, axis: int, count: int) -> Ids | str:
    """The labels of the input channels of a layer, or why they cannot be followed."""
    known = trace.of(tensor)
    if known is None:
        ids = trace.labels.fresh(count)
        trace.labels.pin(ids, f"{tensor.name!r} is not made by a layer that is traced")
        return ids
    if known.axis != axis or known.ids.size != count:
        return f"multiplies along another axis than that of the channels of {tensor.name!r}"
    return known.ids


def _is_depthwise(node: Node) -> bool:
    weight = node.inputs[1]
    if not isinstance(weight, Constant) or len(weight.shape) < 3:
        return False
    groups = node.attr("group", 1)
    return bool(groups > 1 and weight.shape[0] == groups and weight.shape[1] == 1)


def _depthwise(trace: Trace, node: Node) -> str:
    """A convolution with one kernel a channel keeps channels apart."""
    channels = trace.of(node.inputs[0])
    if channels is None:
        return f"takes {node.inputs[0].name!r}, which is not made by a layer that is traced"
    for index in (1, 2):
        tensor = optional_input(node, index)
        if tensor is not None and (objection := constant_objection(tensor)):
            return f"has a {'weight' if index == 1 else 'bias'} that {objection}"
        if tensor is not None:
            trace.label_weight(node, index, 0, channels.ids)
    trace.cover(node, 0)
    trace.resizes.append(Resize(node, channels.ids, None))
    trace.give(node.outputs[0], channels)
    return ""


def _addition(node: Node) -> Node | None:
    """The `Add` of a constant vector that is the only one to take what a MatMul gives."""
    if node.op != "MatMul" or len(node.outputs[0].outputs) != 1:
        return None
    taker: Node = node.outputs[0].outputs[0]
    if taker.op != "Add" or taker.domain or taker.graph is not node.graph:
        return None
    constants = [t for t in taker.inputs if isinstance(t, Constant) and not constant_objection(t)]
    is_vector = len(constants) == 1 and constants[0].shape == node.inputs[1].shape[1:]
    return taker if is_vector else None


LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

ELEMENTWISE = (
    *("Abs", "Add", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Dropout", "Elu", "Erf", "Exp"),
    *("Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min"),
    *("Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid"),
    *("Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh"),
    "ThresholdedRelu",
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(LAYERS, _layer),
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"), pooling),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"), reduction),
    "BatchNormalization": batch_normalization,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Flatten": flatten,
    "Reshape": reshape,
    "Concat": concat,
    "Pad": pad,
    "Resize": resize,
    "Upsample": resize,
}
