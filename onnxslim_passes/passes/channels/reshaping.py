"""Operators that move, add, drop or merge axes.

A rule gives the channels of the output and covers the input, or returns the reason why it cannot.
"""

from collections.abc import Sequence

import numpy as np

from onnxslim_passes.model import Constant, Node
from onnxslim_passes.passes.channels.labels import Channels
from onnxslim_passes.passes.channels.layers import optional_input
from onnxslim_passes.passes.channels.state import Resize, Trace, constant_axes

__all__ = ["flatten", "reshape", "squeeze", "transpose", "unsqueeze"]


def transpose(trace: Trace, node: Node) -> str:
    """The axis of the channels goes where the permutation puts it."""
    channels = trace.of(node.inputs[0])
    if channels is None:
        return "takes a tensor without channels"
    order = list(node.attr("perm") or range(channels.rank)[::-1])
    trace.cover(node, 0)
    trace.give(node.outputs[0], channels.moved(order.index(channels.axis), channels.rank))
    return ""


def squeeze(trace: Trace, node: Node) -> str:
    """Axes of size 1 go, that of the channels not among them."""
    channels = trace.of(node.inputs[0])
    axes = constant_axes(node, channels.rank if channels else 0)
    if channels is None or not axes or channels.axis in axes:
        return "has axes that are not known"
    axis = channels.axis - sum(other < channels.axis for other in axes)
    trace.cover(node, 0)
    trace.give(node.outputs[0], channels.moved(axis, channels.rank - len(axes)))
    return ""


def unsqueeze(trace: Trace, node: Node) -> str:
    """Axes of size 1 come."""
    channels = trace.of(node.inputs[0])
    given = optional_input(node, 1)
    axes = given.values.reshape(-1).tolist() if isinstance(given, Constant) else node.attr("axes")
    if channels is None or not axes:
        return "has axes that are not known"
    rank = channels.rank + len(axes)
    added = {int(axis) % rank for axis in axes}
    kept = [axis for axis in range(rank) if axis not in added]
    trace.cover(node, 0)
    trace.give(node.outputs[0], channels.moved(kept[channels.axis], rank))
    return ""


def flatten(trace: Trace, node: Node) -> str:
    """(N, C, H, W) -> (N, C H W): every position of a map has the label of its channel."""
    channels = trace.of(node.inputs[0])
    if channels is None:
        return "takes a tensor without channels"
    if int(node.attr("axis", 1)) % max(channels.rank, 1) != 1:
        return "flattens the first axes, too"
    return _merge(trace, node, channels)


def _merge(trace: Trace, node: Node, channels: Channels) -> str:
    """All axes but the first become one."""
    shape = trace.shape(node.inputs[0])
    if channels.axis == 0 or shape is None:
        return "merges the channels with the first axis"
    before = _static_product(shape[1 : channels.axis])
    after = _static_product(shape[channels.axis + 1 :])
    if before < 0 or after < 0:
        return "merges the channels with axes of unknown size"
    ids = np.tile(np.repeat(channels.ids, after), before)
    trace.cover(node, 0)
    trace.give(node.outputs[0], Channels(ids, 1, 2))
    return ""


def reshape(trace: Trace, node: Node) -> str:
    """A flattening, or axes of size 1 that come or go behind the channels."""
    channels, target = trace.of(node.inputs[0]), optional_input(node, 1)
    if channels is None:
        return "takes a tensor without channels"
    if not isinstance(target, Constant) or target.input_info is not None:
        return "has a shape that is not a constant; fold-constants may make it one"
    sizes = target.values.tolist()
    source = trace.shape(node.inputs[0])
    if source is None or channels.axis != 1 or not _first_axis_stays(sizes, source, node):
        return "mixes the channels with other axes"
    width = _static_product(source[1:])
    if len(sizes) == 2 and sizes[1] in (-1, width) and width > 0:
        objection = _merge(trace, node, channels)
    elif _only_ones_differ(sizes, source) and sizes[1] in (-1, 0, channels.ids.size):
        trace.cover(node, 0)
        trace.give(node.outputs[0], channels.moved(1, len(sizes)))
        objection = ""
    else:
        objection = "mixes the channels with other axes"
    if not objection and sizes[1] > 0:
        trace.resizes.append(Resize(node, trace.labels.tensors[node.outputs[0]].ids, 1))
    return objection


def _first_axis_stays(sizes: list[int], source: Sequence[int | str | None], node: Node) -> bool:
    """Whether the first axis of the shape is surely that of the input."""
    if len(sizes) < 2:
        return False
    first = sizes[0]
    kept = first == source[0] or (first == 0 and not node.attr("allowzero", 0))
    # -1 is what is left of all elements: the first axis, if the other ones hold the rest.
    rest_is_known = all(size > 0 for size in sizes[1:])
    filled = first == -1 and rest_is_known
    return kept or (filled and _static_product(sizes[1:]) == _static_product(source[1:]))


def _only_ones_differ(sizes: list[int], source: Sequence[int | str | None]) -> bool:
    """Whether the axes behind the second one are all of size 1, before and after."""
    return len(sizes) >= 2 and all(size == 1 for size in (*sizes[2:], *source[2:]))


def _static_product(sizes: Sequence[int | str | None]) -> int:
    """The product of known sizes; -1 if one is not known."""
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        return -1
    return int(np.prod([int(size) for size in sizes if isinstance(size, int)], dtype=np.int64))
