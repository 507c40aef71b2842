"""Operators that keep channels apart: element by element, by maps, or along other axes.

A rule gives the channels of the output and covers the inputs, or returns the reason why it cannot.
"""

from collections.abc import Sequence

import numpy as np

from onnxslim_passes.model import Constant, Node
from onnxslim_passes.passes.channels.labels import Channels, Ids
from onnxslim_passes.passes.channels.layers import constant_objection, optional_input
from onnxslim_passes.passes.channels.state import Tensor, Trace, constant_axes

__all__ = [
    "batch_normalization",
    "concat",
    "elementwise",
    "label_vector",
    "pad",
    "pooling",
    "reduction",
    "resize",
]


def elementwise(trace: Trace, node: Node) -> str:
    """An operation on elements, with broadcasting; constants may be one value a channel."""
    carriers = [(i, c) for i, t in enumerate(node.inputs) if (c := trace.of(t)) is not None]
    if not carriers:
        return "takes no tensor with channels"
    rank = max(_rank(trace, tensor) for tensor in node.inputs if not tensor.is_empty())
    if rank > max(channels.rank for _, channels in carriers) or not node.outputs:
        return "enlarges the tensor"
    _, first = carriers[0]
    for _, other in carriers[1:]:
        if other.from_right != first.from_right or other.ids.size != first.ids.size:
            return "combines tensors whose channels lie along different axes"
    objection = _fits(trace, node, first)
    if objection:
        return objection
    for index, channels in carriers:
        trace.labels.join(first.ids, channels.ids)
        trace.cover(node, index)
    for index, tensor in enumerate(node.inputs):
        if isinstance(tensor, Constant) and _size_at(tensor.shape, first.from_right) > 1:
            label_vector(trace, node, index, first.from_right, first.ids)
    trace.give(node.outputs[0], first.moved(rank + first.from_right, rank))
    return ""


def _fits(trace: Trace, node: Node, channels: Channels) -> str:
    """Why an operand does not go along with the channels of the others, or ""."""
    for tensor in node.inputs:
        if tensor.is_empty() or trace.of(tensor) is not None:
            continue
        size = _size_at(trace.shape(tensor), channels.from_right)
        if size == 1:
            continue
        if not isinstance(tensor, Constant):
            return f"combines it with {tensor.name!r}, whose channels are not traced"
        if tensor.input_info is not None:
            return f"takes {tensor.name!r}, a graph input, whose value a caller may override"
        if size != channels.ids.size:
            return f"enlarges it by {tensor.name!r}"
    return ""


def _size_at(shape: Sequence[int | str | None] | None, from_right: int) -> int:
    """The size of an operand along an axis: 1 where broadcasting adds it, -1 if unknown."""
    if shape is None:
        return -1
    if -from_right > len(shape):
        return 1
    size = shape[from_right]
    return size if isinstance(size, int) else -1


def label_vector(trace: Trace, node: Node, index: int, from_right: int, ids: Ids) -> None:
    """Labels the channel axis of a constant operand, if it has one value a channel."""
    shape = node.inputs[index].shape
    if _size_at(shape, from_right) == ids.size:
        trace.label_weight(node, index, len(shape) + from_right, ids)


def _rank(trace: Trace, tensor: Tensor) -> int:
    channels = trace.of(tensor)
    if channels is not None:
        return channels.rank
    shape = trace.shape(tensor)
    return 0 if shape is None else len(shape)


def batch_normalization(trace: Trace, node: Node) -> str:
    """One scale and one shift a channel."""
    channels = trace.of(node.inputs[0])
    if channels is None or channels.axis != 1:
        return "normalizes along another axis than that of the channels"
    if any(tensor.name for tensor in node.outputs[1:]) or node.attr("training_mode", 0):
        return "is in training mode: it computes mean and variance of its input"
    for tensor in node.inputs[1:5]:
        if objection := constant_objection(tensor):
            return f"has a parameter that {objection}"
        if tensor.shape != (channels.ids.size,):
            return "has parameters that are not one value a channel"
    for index in range(1, 5):
        trace.label_weight(node, index, 0, channels.ids)
    trace.cover(node, 0)
    trace.give(node.outputs[0], channels)
    return ""


def pooling(trace: Trace, node: Node) -> str:
    """Works on the axes behind the second one."""
    channels = trace.of(node.inputs[0])
    if channels is None or channels.axis != 1:
        return "pools along the axis of the channels"
    if any(tensor.name for tensor in node.outputs[1:]):
        return "gives the places of the largest elements, too"
    trace.cover(node, 0)
    trace.give(node.outputs[0], channels)
    return ""


def reduction(trace: Trace, node: Node) -> str:
    """A reduction of other axes than that of the channels."""
    channels = trace.of(node.inputs[0])
    axes = constant_axes(node, channels.rank if channels else 0)
    if channels is None or not axes or channels.axis in axes:
        return "reduces the axis of the channels"
    if not node.attr("keepdims", 1):
        axis = channels.axis - sum(other < channels.axis for other in axes)
        channels = channels.moved(axis, channels.rank - len(axes))
    trace.cover(node, 0)
    trace.give(node.outputs[0], channels)
    return ""


def concat(trace: Trace, node: Node) -> str:
    """Channels behind each other; or tensors with the same channels along another axis."""
    carriers = [trace.of(tensor) for tensor in node.inputs]
    known = next((channels for channels in carriers if channels is not None), None)
    if known is None:
        return "takes no tensor with channels"
    along = int(node.attr("axis", 0)) % known.rank == known.axis
    parts: list[Ids] = []
    for tensor, channels in zip(node.inputs, carriers, strict=True):
        if channels is not None and channels.axis == known.axis:
            parts.append(channels.ids)
            continue
        size = _size_at(trace.shape(tensor), known.from_right)
        if channels is not None or not along or size < 1 or isinstance(tensor, Constant):
            return f"joins it with {tensor.name!r}, whose channels are not traced"
        parts.append(trace.labels.fresh(size))
        trace.labels.pin(parts[-1], f"{tensor.name!r} is not made by a layer that is traced")
    if not along and any(ids.size != known.ids.size for ids in parts):
        return "joins tensors of different numbers of channels"
    for ids in () if along else parts[1:]:
        trace.labels.join(known.ids, ids)
    trace.cover(node, *range(len(node.inputs)))
    trace.give(
        node.outputs[0],
        Channels(np.concatenate(parts) if along else known.ids, known.axis, known.rank),
    )
    return ""


def pad(trace: Trace, node: Node) -> str:
    """Padding of other axes than that of the channels."""
    channels = trace.of(node.inputs[0])
    amounts = node.attr("pads")
    if len(node.inputs) > 1 and isinstance(node.inputs[1], Constant):
        amounts = node.inputs[1].values.tolist()
    if channels is None or amounts is None or len(amounts) != 2 * channels.rank:
        return "has paddings that are not known"
    if amounts[channels.axis] or amounts[channels.axis + channels.rank]:
        return "pads the axis of the channels"
    trace.cover(node, 0)
    trace.give(node.outputs[0], channels)
    return ""


def resize(trace: Trace, node: Node) -> str:
    """Resizing by constant factors that leave the axis of the channels alone."""
    channels = trace.of(node.inputs[0])
    factors = node.attr("scales")
    if factors is None:
        taken = optional_input(node, 1 if node.op == "Upsample" else 2)
        factors = taken.values.tolist() if isinstance(taken, Constant) else None
    if channels is None or not factors or len(factors) != channels.rank or node.attr("axes"):
        return "has sizes that are not constant factors"
    if factors[channels.axis] != 1:
        return "resizes the axis of the channels"
    trace.cover(node, 0)
    trace.give(node.outputs[0], channels)
    return ""
