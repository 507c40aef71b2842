"""Ranges without the ends that nobody can tell apart.

A convolution's output often goes through functions that are flat at one end: HardSwish is 0 below
-3, SiLU and GELU nearly so below -8, a Clip or Sigmoid is flat on both sides. Codes spent on such
an end are lost; saturating there changes nothing behind the function. No function is known by its
name: the chain of elementwise operators with scalar constants behind a tensor is run on a ramp
over the tensor's range, and the ends on which no result of the chain moves are cut off.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import onnx

from onnxslim_passes.model import Constant, Model, Node, Variable
from onnxslim_passes.passes.placement.schemes import Ranges
from onnxslim_passes.runtime import open_session

POINTWISE = frozenset(
    (
        *("Abs", "Add", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish"),
        *("LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Relu", "Selu"),
        *("Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu"),
    )
)
"""Operators whose every output element depends on the input element at the same place alone."""

_POINTS = 4097
_TOLERANCE = 1 / 1024  # of the result's range: a quarter of a step of 8 bits


def without_flat_ends(model: Model, tensors: Iterable[Variable], ranges: Ranges) -> Ranges:
    """The ranges, narrowed for those of `tensors` that only go through functions with flat ends.

    Args:
        model: stays as it is.
        tensors: of its main graph, float32, made by nodes.
        ranges: of at least these tensors.
    """
    chains = {}
    for tensor in tensors:
        ends = _ends(model, tensor)
        low, high = ranges[tensor.name]
        if ends and low < high:
            chains[tensor.name] = [end.name for end in ends]
    if not chains:
        return ranges
    ramps = {name: np.linspace(*ranges[name], _POINTS, dtype=np.float32) for name in chains}
    results = _run_chains(model, chains, ramps)
    narrowed = dict(ranges)
    for name, ends in chains.items():
        narrowed[name] = _narrowed(ramps[name], [results[end] for end in ends])
    return narrowed


def _ends(model: Model, tensor: Variable) -> list[Variable]:
    """What others take of the pointwise nodes behind `tensor`; [] if they take `tensor` itself."""
    inside: dict[Variable, None] = {tensor: None}
    pending = _takers(tensor)
    while pending:
        node = pending.pop()
        if _is_chain_link(model, node, inside) and node.outputs[0] not in inside:
            inside[node.outputs[0]] = None
            # A node that waited for this second input is looked at again.
            pending.extend(_takers(node.outputs[0]))
    made = {found.inputs[0] for found in inside if found is not tensor}
    ends = [
        found
        for found in inside
        if found in model.graph.outputs or any(node not in made for node in found.outputs)
    ]
    return [] if tensor in ends else ends


def _takers(tensor: Variable) -> list[Node]:
    return list(dict.fromkeys(tensor.outputs))


def _is_chain_link(model: Model, node: Node, inside: Mapping[Variable, None]) -> bool:
    """Whether a node computes a scalar function of the tensor at the start."""
    if node.domain or node.op not in POINTWISE or node.graph is not model.graph:
        return False
    return all(
        tensor.is_empty() or tensor in inside or (isinstance(tensor, Constant) and tensor.size == 1)
        for tensor in node.inputs
    )


def _run_chains(
    model: Model,
    chains: Mapping[str, list[str]],
    ramps: Mapping[str, npt.NDArray[np.float32]],
) -> dict[str, npt.NDArray[np.float32]]:
    """The values of all ends, with each chain fed by its ramp."""
    copy = model.copy()
    tensors = {tensor.name: tensor for node in copy.graph.nodes for tensor in node.outputs}
    inputs, outputs, feed = [], {}, {}
    for name, ends in chains.items():
        start = _declared(copy, [_POINTS])
        copy.replace_uses(tensors[name], start, only=_takers(tensors[name]))
        inputs.append(start)
        feed[start.name] = ramps[name]
        for end in ends:
            outputs[end] = _declared(copy, None)
            copy.graph.add_node("Identity", [tensors[end]], outputs=[outputs[end]])
    for tensor in tensors.values():
        tensor.forget_type()  # a ramp has another shape
    copy.graph.inputs = inputs
    copy.graph.declared_inputs = list(inputs)
    copy.graph.outputs = list(outputs.values())
    copy.remove_unused()
    with open_session(copy) as session:
        results = session.run(feed)
    return {end: results[output.name] for end, output in outputs.items()}


def _declared(model: Model, shape: list[int] | None) -> Variable:
    """A new float32 tensor with the type that the runtime wants to see on inputs and outputs."""
    name = model.fresh_name("ramp")
    return Variable(name, onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))


def _narrowed(
    ramp: npt.NDArray[np.float32], results: Iterable[npt.NDArray[np.float32]]
) -> tuple[float, float]:
    """The part of the ramp outside of which no result moves by more than the tolerance."""
    first, last = len(ramp) - 1, 0
    for result in results:
        values = result.reshape(-1).astype(np.float64)
        if not np.isfinite(values).all():
            return float(ramp[0]), float(ramp[-1])
        room = _TOLERANCE * (values.max() - values.min())
        first = min(first, _flat(values, room))
        last = max(last, len(values) - 1 - _flat(values[::-1], room))
    if first >= last:
        return float(ramp[0]), float(ramp[-1])
    return float(ramp[first]), float(ramp[last])


def _flat(values: npt.NDArray[np.float64], room: float) -> int:
    """The last place up to which all values lie within `room` of the value there."""
    lowest, highest = np.minimum.accumulate(values), np.maximum.accumulate(values)
    flat = np.maximum(highest - values, values - lowest) <= room
    moved = np.flatnonzero(~flat)
    return int(moved[0]) - 1 if moved.size else len(values) - 1
