"""Gradients of poolings.

What comes back to a window goes to the element that was the maximum, or in equal parts to all its
elements, or to each by its part in the norm.
"""

import numpy as np

from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.gradients.geometry import Geometry, geometry_of, scatter_windows
from onnxslim_passes.training.gradients.reductions import (
    spread_extremum,
    spread_mean,
    spread_norm,
)
from onnxslim_passes.training.gradients.step import Rule, Step


def max_pool(step: Step) -> tuple[Tensor]:
    """To the place that the operator's second output names, in the tensor as one row."""
    emit, x, node = step.emit, step.x, step.node
    if step.attr("storage_order", 0):
        # Column-major indices do not name places of the row-major tensor.
        attributes = {key: value for key, value in node.attrs.items() if key != "storage_order"}
        indices = emit.ops("MaxPool", x, count=2, **attributes)[1]
    else:
        indices = emit.add_output(node, 1)
    count = emit.op("Reshape", emit.op("Size", x), emit.ints(1))
    zeros = emit.op("Expand", emit.scalar(0, x), count)
    disjoint = geometry_of(step, step.attr("kernel_shape")).disjoint
    row = emit.op(
        "ScatterElements",
        zeros,
        emit.reshape(indices, [-1]),
        emit.reshape(step.dy, [-1]),
        axis=0,
        reduction="none" if disjoint else "add",
    )
    return (emit.op("Reshape", row, emit.target_shape(emit.shape(x), x)),)


def average_pool(step: Step) -> tuple[Tensor]:
    """In equal parts to all elements of the window that were counted."""
    emit, x = step.emit, step.x
    windows = geometry_of(step, step.attr("kernel_shape"))
    share = emit.div(step.dy, _counts(step, windows))
    return (_add_windows(emit, share, x, windows),)


def lp_pool(step: Step) -> tuple[Tensor]:
    """For y a p-norm over a window: sign(x) |x|^(p-1) times the sum of y^(1-p) dy."""
    emit, x, y = step.emit, step.x, step.y
    windows = geometry_of(step, step.attr("kernel_shape"))
    order = step.attr("p", 2)
    zero = emit.mask(emit.op("Equal", y, emit.scalar(0, y)), y)
    falling = emit.op("Pow", emit.add(y, zero), emit.scalar(1 - order, y))
    spread = _add_windows(emit, emit.mul(step.dy, falling), x, windows)
    grown = emit.op("Pow", emit.op("Abs", x), emit.scalar(order - 1, x))
    return (emit.mul(emit.mul(emit.op("Sign", x), grown), spread),)


def global_average_pool(step: Step) -> tuple[Tensor]:
    """Every one of n places has 1/n of the gradient."""
    return (spread_mean(step, step.dy, range(2, step.emit.rank(step.x))),)


def global_max_pool(step: Step) -> tuple[Tensor]:
    """The largest has all of it."""
    axes = range(2, step.emit.rank(step.x))
    return (spread_extremum(step, step.dy, step.y, axes),)


def global_lp_pool(step: Step) -> tuple[Tensor]:
    """The norm over all places."""
    return (spread_norm(step, step.dy, step.y, step.attr("p", 2)),)


def _add_windows(emit: Emitter, shares: Tensor, like: Tensor, windows: Geometry) -> Tensor:
    """Adds a number for each window to all elements of it, channel by channel."""
    channels = emit.size(like, 1)
    ones = emit.constant(np.ones((channels, 1, *windows.kernel), emit.dtype(like)))
    depthwise = Geometry(
        windows.kernel,
        windows.strides,
        windows.dilations,
        windows.begins,
        windows.ends,
        group=channels,
    )
    return scatter_windows(emit, shares, ones, like, depthwise)


def _counts(step: Step, windows: Geometry) -> Tensor:
    """By how much each window was divided: a scalar, or a tensor of the output's spatial shape."""
    emit, x = step.emit, step.x
    if not windows.padded and not step.attr("ceil_mode", 0):
        return emit.scalar(windows.taps, x)
    with_padding = step.attr("count_include_pad", 0)
    if with_padding and not step.attr("ceil_mode", 0):
        return emit.scalar(windows.taps, x)
    counts = np.ones((1,) * windows.rank)
    for axis in range(windows.rank):
        size, windows_here = emit.size(x, axis + 2), emit.size(step.y, axis + 2)
        begin, end = windows.begins[axis], windows.ends[axis]
        starts = np.arange(windows_here) * windows.strides[axis] - begin
        places = starts[:, None] + np.arange(windows.kernel[axis]) * windows.dilations[axis]
        low, high = (-begin, size + end) if with_padding else (0, size)
        counted = ((places >= low) & (places < high)).sum(1)
        counts = counts * counted.reshape([-1 if a == axis else 1 for a in range(windows.rank)])
    return emit.constant(counts.astype(emit.dtype(x)))


POOLING: dict[str, Rule] = {
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalLpPool": global_lp_pool,
    "GlobalMaxPool": global_max_pool,
    "LpPool": lp_pool,
    "MaxPool": max_pool,
}
