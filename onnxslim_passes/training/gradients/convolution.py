"""Gradients of convolutions.

Y = Conv(X, W): every window of X times W. Its transpose gives dX: every dY times W is added to the
window it came from (`scatter_windows`). dW is the product of dY with the windows, one matrix
product over batch and places: (O, N h w) x (N h w, C k k).

ConvTranspose(X, W) is the transpose of Conv(., W); so its dX is a Conv of dY, and its dW is that
of the Conv with dY as the input and X as the gradient of the output.
"""

import itertools
import math

import numpy as np

from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.gradients.geometry import Geometry, geometry_of, scatter_windows
from onnxslim_passes.training.gradients.step import Rule, Step

# Enough of both for a product with each element of the kernel to be efficient.
_MANY_WINDOWS, _MANY_CHANNELS = 64, 16

# Up to here a product of whole rows is faster than one element of the kernel after the other.
_LONG_ROW = 32


def conv(step: Step) -> list[Tensor | None]:
    """Convolution of any rank with groups, strides, dilations and padding."""
    emit, x, weight = step.emit, step.inputs[0], step.inputs[1]
    kernel = [emit.size(weight, axis) for axis in range(2, emit.rank(weight))]
    windows = geometry_of(step, kernel)
    result: list[Tensor | None] = [None, None, None]
    if step.wants(0):
        result[0] = scatter_windows(emit, step.dy, weight, x, windows)
    if step.wants(1):
        result[1] = weight_gradient(emit, x, step.dy, windows)
    if step.wants(2):
        result[2] = emit.reduce_sum(step.dy, [0, *windows.axes])
    return result


def conv_transpose(step: Step) -> list[Tensor | None]:
    """Transposed convolution of any rank."""
    emit, x, weight = step.emit, step.inputs[0], step.inputs[1]
    windows = _transposed_geometry(step)
    result: list[Tensor | None] = [None, None, None]
    if step.wants(0):
        made = emit.op(
            "Conv",
            step.dy,
            weight,
            group=windows.group,
            strides=list(windows.strides),
            dilations=list(windows.dilations),
            pads=windows.pads,
        )
        result[0] = _cut(emit, made, x)
    if step.wants(1):
        result[1] = weight_gradient(emit, step.dy, x, windows)
    if step.wants(2):
        result[2] = emit.reduce_sum(step.dy, [0, *windows.axes])
    return result


def weight_gradient(emit: Emitter, x: Tensor, dy: Tensor, windows: Geometry) -> Tensor:
    """The gradient of the weights of a convolution.

    Args:
        emit: where to.
        x: (N, C, ...), its input.
        dy: (N, O, ...), the gradient of its output.
        windows: its geometry.

    Returns:
        (O, C / group, kernel...).
    """
    spatial = (*emit.shape(x)[1:], *emit.shape(dy)[1:])
    if any(not isinstance(size, int) for size in spatial):
        return _by_convolution(emit, x, dy, windows)
    if windows.group == emit.size(x, 1) == emit.size(dy, 1) > 1:
        if emit.size(dy, -1) <= _LONG_ROW:
            return _by_rows(emit, x, dy, windows)
        return _by_elements(emit, x, dy, windows)
    return _by_windows(emit, x, dy, windows)


def _by_convolution(emit: Emitter, x: Tensor, dy: Tensor, windows: Geometry) -> Tensor:
    """As a convolution whose channels are the batch; any sizes may be free.

    (C / g, g N, ...) is convolved in g groups with (O, N, ...): where W stepped by its strides
    and its elements were dilated, dY is dilated by the strides and steps by the dilations.
    """
    group = windows.group
    channels, outputs = emit.size(x, 1), emit.size(dy, 1)
    each = channels // group
    swapped = emit.transpose(x, [1, 0, *windows.axes])
    if group > 1:
        split = emit.op("Reshape", swapped, _sizes(emit, [group, each, -1], swapped, windows))
        turned = emit.transpose(split, [1, 0, *range(2, 3 + windows.rank)])
        swapped = emit.op("Reshape", turned, _sizes(emit, [each, -1], swapped, windows))
    kernels = emit.transpose(dy, [1, 0, *windows.axes])
    made = emit.op(
        "Conv",
        swapped,
        kernels,
        group=group,
        strides=list(windows.dilations),
        dilations=list(windows.strides),
        pads=windows.pads,
    )
    # Elements that no window reached make the result larger than the kernel.
    cut = emit.op(
        "Slice",
        made,
        emit.constant([0] * windows.rank),
        emit.ints(*windows.kernel),
        emit.ints(*windows.axes),
    )
    turned = emit.transpose(cut, [1, 0, *windows.axes])
    return emit.reshape(turned, [outputs, each, *windows.kernel])


def _sizes(emit: Emitter, lead: list[int], like: Tensor, windows: Geometry) -> Tensor:
    """A shape that begins with `lead` and ends with the spatial sizes of `like`."""
    return emit.op("Concat", emit.ints(*lead), emit.op("Shape", like, start=2), axis=0)


def _by_windows(emit: Emitter, x: Tensor, dy: Tensor, windows: Geometry) -> Tensor:
    """As matrix products of the gradients with all windows, laid out side by side."""
    group = windows.group
    outputs = emit.size(dy, 1)
    each = emit.size(x, 1) // group
    turned = emit.transpose(dy, [1, 0, *windows.axes])
    taps = _taps(emit, x, dy, windows)
    if group > 1:
        rows = emit.reshape(turned, [group, outputs // group, -1])
        columns = [emit.reshape(tap, [group, each, -1]) for tap in taps]
        spread = columns[0] if len(columns) == 1 else emit.op("Concat", *columns, axis=1)
        return _kernels(emit, emit.op("MatMul", rows, emit.swap_last(spread)), outputs, windows)
    rows = emit.reshape(turned, [outputs, -1])
    columns = [emit.reshape(tap, [each, -1]) for tap in taps]
    places = math.prod(emit.size(dy, axis) for axis in windows.axes)
    if places < _MANY_WINDOWS or each < _MANY_CHANNELS:
        spread = columns[0] if len(columns) == 1 else emit.op("Concat", *columns, axis=0)
        return _kernels(emit, emit.op("Gemm", rows, spread, transB=1), outputs, windows)
    # To lay them out would take as long as a product with each.
    products = [emit.op("Gemm", rows, column, transB=1) for column in columns]
    if len(products) > 1:
        products = [emit.op("Concat", *(emit.unsqueeze(p, [2]) for p in products), axis=2)]
    return emit.reshape(products[0], [outputs, each, *windows.kernel])


def _by_rows(emit: Emitter, x: Tensor, dy: Tensor, windows: Geometry) -> Tensor:
    """One channel a group: products of whole rows, of which only some diagonals are wanted.

    For each place in the kernel but for its last axis, and for each channel, (width, N rows) times
    (N rows, windows in a row) has every element of a row against every window. Those that meet in
    element j of the kernel lie on a diagonal, which a product with zeros and ones adds up.
    """
    turned = _padded(emit, emit.transpose(x, [1, 0, *windows.axes]), windows)
    channels, width, count = windows.group, emit.size(turned, -1), emit.size(dy, -1)
    right = emit.reshape(emit.transpose(dy, [1, 0, *windows.axes]), [channels, -1, count])
    products = []
    for row in _cut_taps(emit, turned, dy, windows, whole_rows=True):
        left = emit.swap_last(emit.reshape(row, [channels, -1, width]))
        products.append(emit.unsqueeze(emit.op("MatMul", left, right), [1]))
    joined = products[0] if len(products) == 1 else emit.op("Concat", *products, axis=1)
    elements = np.arange(windows.kernel[-1]) * windows.dilations[-1]
    starts = np.arange(count) * windows.strides[-1]
    places = np.arange(width)[:, None, None]
    meets = (places == starts[:, None] + elements).astype(emit.dtype(x))
    rows = emit.reshape(joined, [channels * len(products), width * count])
    flat = emit.constant(meets.reshape(width * count, -1))
    return emit.reshape(emit.op("MatMul", rows, flat), [channels, 1, *windows.kernel])


def _by_elements(emit: Emitter, x: Tensor, dy: Tensor, windows: Geometry) -> Tensor:
    """One channel a group: for each element of the kernel, what it meets times the gradient."""
    places = [0, *windows.axes]
    sums = [
        emit.unsqueeze(emit.reduce_sum(emit.mul(tap, dy), places), [1])
        for tap in _cut_taps(emit, _padded(emit, x, windows), dy, windows)
    ]
    joined = sums[0] if len(sums) == 1 else emit.op("Concat", *sums, axis=1)
    return emit.reshape(joined, [windows.group, 1, *windows.kernel])


def _kernels(emit: Emitter, product: Tensor, outputs: int, windows: Geometry) -> Tensor:
    """Products in the order (O, kernel..., C / group) as weights."""
    last = windows.rank + 1
    split = emit.reshape(product, [outputs, *windows.kernel, -1])
    return emit.transpose(split, [0, last, *range(1, last)])


def _taps(emit: Emitter, x: Tensor, dy: Tensor, windows: Geometry) -> list[Tensor]:
    """For each element of the kernel what it meets: (C, N, windows...), C outermost."""
    turned = _padded(emit, emit.transpose(x, [1, 0, *windows.axes]), windows)
    return [turned] if windows.unit else _cut_taps(emit, turned, dy, windows)


def _padded(emit: Emitter, x: Tensor, windows: Geometry) -> Tensor:
    if not windows.padded:
        return x
    return emit.op("Pad", x, emit.ints(0, 0, *windows.begins, 0, 0, *windows.ends))


def _cut_taps(
    emit: Emitter, x: Tensor, dy: Tensor, windows: Geometry, *, whole_rows: bool = False
) -> list[Tensor]:
    """What each element of the kernel meets.

    Args:
        emit: where to.
        x: with its padding, spatial axes last.
        dy: gives the number of windows.
        windows: the geometry.
        whole_rows: leave the last axis as it is.
    """
    cut = windows.rank - whole_rows
    if not cut:
        return [x]
    axes = windows.axes[:cut]
    counts = [emit.size(dy, axis) for axis in axes]
    strides, dilations = windows.strides[:cut], windows.dilations[:cut]
    taps = []
    for place in itertools.product(*(range(size) for size in windows.kernel[:cut])):
        starts = [index * gap for index, gap in zip(place, dilations, strict=True)]
        ends = [
            start + (count - 1) * stride + 1
            for start, count, stride in zip(starts, counts, strides, strict=True)
        ]
        operands = (starts, ends, axes, strides)
        taps.append(emit.op("Slice", x, *(emit.ints(*numbers) for numbers in operands)))
    return taps


def _transposed_geometry(step: Step) -> Geometry:
    """The geometry of the convolution that a ConvTranspose is the transpose of."""
    emit, weight = step.emit, step.inputs[1]
    kernel = tuple(emit.size(weight, axis) for axis in range(2, emit.rank(weight)))
    rank = len(kernel)
    strides = tuple(step.attr("strides", [1] * rank))
    dilations = tuple(step.attr("dilations", [1] * rank))
    pads = list(step.attr("pads", [0] * 2 * rank))
    extra = step.attr("output_padding", [0] * rank)
    rule = step.attr("auto_pad", "NOTSET")
    bare = Geometry(kernel, strides, dilations, (), ())
    if step.attr("output_shape") is not None or rule.startswith("SAME"):
        pads = [0] * 2 * rank
        for axis in range(rank):
            full = strides[axis] * (emit.size(step.x, axis + 2) - 1) + bare.spans[axis]
            # Where the result is larger than all windows reach, nothing comes back.
            total = max(full + extra[axis] - emit.size(step.y, axis + 2), 0)
            less = total // 2
            # Only SAME_UPPER has the odd element at the end.
            pads[axis] = less if rule == "SAME_UPPER" else total - less
            pads[rank + axis] = total - pads[axis]
    return Geometry(
        kernel,
        strides,
        dilations,
        tuple(pads[:rank]),
        tuple(pads[rank:]),
        step.attr("group", 1),
    )


def _cut(emit: Emitter, made: Tensor, like: Tensor) -> Tensor:
    """Without the windows at the ends that `like` does not have."""
    if emit.shape(made) == emit.shape(like):
        return made
    rank = emit.rank(like) - 2
    axes = emit.ints(*range(2, 2 + rank))
    ends = emit.op("Slice", emit.shape_of(like), emit.ints(2), emit.ints(2 + rank))
    return emit.op("Slice", made, emit.constant([0] * rank), ends, axes)


CONVOLUTION: dict[str, Rule] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
}
