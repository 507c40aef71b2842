"""Gradients of operators that move elements and do not change them.

Each input element goes to some outputs; its gradient is the sum of theirs. Where places are
exchanged one for one, that is the inverse movement. Where an operator has no inverse in ONNX, it is
applied to the numbers of the places, and what comes back is added at these numbers.
"""

import numpy as np

from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.gradients.step import Rule, Step


def reshape(step: Step) -> tuple[Tensor]:
    """Reshape, Flatten, Squeeze, Unsqueeze: the shape of x again."""
    return (step.emit.reshape_like(step.dy, step.x),)


def transpose(step: Step) -> tuple[Tensor]:
    """The inverse permutation; without an attribute the axes are reversed."""
    rank = step.emit.rank(step.x)
    perm = step.attr("perm", list(range(rank))[::-1])
    return (step.emit.transpose(step.dy, [int(axis) for axis in np.argsort(perm)]),)


def expand(step: Step) -> tuple[Tensor]:
    """The sum over the repeated axes."""
    return (step.emit.sum_to(step.dy, step.x),)


def concat(step: Step) -> list[Tensor | None]:
    """Each part of the gradient to where it came from."""
    emit = step.emit
    axis = step.attr("axis") % emit.rank(step.y)
    if len(step.inputs) == 1:
        return [step.dy]
    sizes = [emit.shape(tensor)[axis] for tensor in step.inputs]
    fixed = [size for size in sizes if isinstance(size, int)]
    if len(fixed) == len(sizes):
        split: Tensor = emit.ints(*fixed)
    else:
        ends = [emit.op("Shape", t, start=axis, end=axis + 1) for t in step.inputs]
        split = emit.op("Concat", *ends, axis=0)
    return list(emit.ops("Split", step.dy, split, count=len(sizes), axis=axis))


def split(step: Step) -> tuple[Tensor]:
    """The parts put together; zeros for a part that the loss does not depend on."""
    emit = step.emit
    parts = [
        emit.zeros_like(tensor) if dy is None else dy
        for tensor, dy in zip(step.node.outputs, step.dys, strict=True)
    ]
    return (emit.op("Concat", *parts, axis=step.attr("axis", 0)),)


def slice_(step: Step) -> tuple[Tensor]:
    """Zeros around what was cut out; between its elements too, if the step was not 1."""
    emit, x = step.emit, step.x
    rank = emit.rank(x)
    known = [emit.value(t) if (t := step.input(index)) is not None else None for index in range(5)]
    starts, ends = known[1], known[2]
    axes = range(len(starts)) if known[3] is None and starts is not None else known[3]
    given = all(step.input(index) is None or known[index] is not None for index in (1, 2, 3, 4))
    if not given or starts is None or ends is None or axes is None:
        return (by_places(step),)
    steps = [1] * len(starts) if known[4] is None else known[4].tolist()
    pads = [(0, 0)] * rank
    dy: Tensor = step.dy
    for start, end, axis, stride in zip(
        starts.tolist(), ends.tolist(), (int(a) % rank for a in axes), steps, strict=True
    ):
        size = emit.shape(x)[axis]
        if not isinstance(size, int):
            return (by_places(step),)
        places = range(size)[slice(start, None if stride < 0 and end < -size else end, stride)]
        if not places:
            return (emit.zeros_like(x),)
        if stride < 0:
            dy = reversed_along(emit, dy, axis)
            places = places[::-1]
        dy = _spaced(emit, dy, axis, places.step)
        pads[axis] = (places.start, size - places.start - len(places) * places.step)
    if any(pair != (0, 0) for pair in pads):
        both = [pair[0] for pair in pads] + [pair[1] for pair in pads]
        dy = emit.op("Pad", dy, emit.ints(*both))
    return (dy,)


def reversed_along(emit: Emitter, tensor: Tensor, axis: int) -> Tensor:
    """The elements along an axis in the opposite order."""
    lowest = emit.ints(np.iinfo(np.int64).min)
    return emit.op("Slice", tensor, emit.ints(-1), lowest, emit.ints(axis), emit.ints(-1))


def _spaced(emit: Emitter, tensor: Tensor, axis: int, step: int) -> Tensor:
    """With `step - 1` zeros behind every element along an axis of fixed size."""
    if step == 1:
        return tensor
    rank, size = emit.rank(tensor), emit.size(tensor, axis)
    apart = emit.unsqueeze(tensor, [axis + 1])
    pads = [0] * 2 * (rank + 1)
    pads[rank + 1 + axis + 1] = step - 1
    filled = emit.op("Pad", apart, emit.ints(*pads))
    shape = list(emit.shape(tensor))
    shape[axis] = size * step
    free = [place for place, length in enumerate(shape) if not isinstance(length, int)]
    if len(free) <= 1:
        return emit.reshape(filled, [s if isinstance(s, int) else -1 for s in shape])
    before = emit.op("Shape", tensor, start=0, end=axis)
    behind = emit.op("Shape", tensor, start=axis + 1)
    wanted = emit.op("Concat", before, emit.ints(size * step), behind, axis=0)
    return emit.op("Reshape", filled, wanted)


def pad(step: Step) -> list[Tensor | None]:
    """Constant: what is between the padding. Reflect, edge, wrap: by the numbers of the places."""
    emit, x = step.emit, step.x
    if step.attr("mode", "constant") != "constant":
        return [by_places(step)]
    kept = emit.op("Pad", step.dy, emit.neg(step.inputs[1]), None, step.input(3))
    if step.input(3) is None:
        kept = emit.op("Pad", step.dy, emit.neg(step.inputs[1]))
    result: list[Tensor | None] = [kept if emit.has_shape(kept) else emit.reshape_like(kept, x)]
    if step.wants(2):
        outside = emit.sub(emit.reduce_sum(step.dy), emit.reduce_sum(kept))
        result += [None, emit.reshape_like(outside, step.inputs[2])]
    return result


def tile(step: Step) -> tuple[Tensor]:
    """The sum over the repetitions."""
    emit = step.emit
    repeats = emit.value(step.inputs[1])
    sizes = emit.shape(step.x)
    free = sum(not isinstance(size, int) for size in sizes)
    if repeats is None or free > 1:
        return (by_places(step),)
    pairs = zip(repeats.tolist(), sizes, strict=True)
    apart = [n for times, size in pairs for n in (times, size if isinstance(size, int) else -1)]
    return (emit.reduce_sum(emit.reshape(step.dy, apart), range(0, len(apart), 2)),)


def depth_to_space(step: Step) -> tuple[Tensor]:
    """Blocks back to channels; the order of the channels depends on the mode."""
    emit, size = step.emit, step.attr("blocksize")
    dy = emit.op("SpaceToDepth", step.dy, blocksize=size)
    if step.attr("mode", "DCR") == "DCR":
        return (dy,)
    channels = emit.size(step.y, 1)
    apart = emit.op("Reshape", dy, emit.constant(np.array([0, size * size, channels, -1])))
    turned = emit.transpose(apart, [0, 2, 1, 3])
    return (emit.op("Reshape", turned, emit.target_shape(emit.shape(step.x), step.x)),)


def space_to_depth(step: Step) -> tuple[Tensor]:
    """Channels back to blocks."""
    emit, size = step.emit, step.attr("blocksize")
    mode = step.attr("mode", "DCR")
    return (emit.op("DepthToSpace", step.dy, blocksize=size, mode=mode),)


def cumulative_sum(step: Step) -> list[Tensor | None]:
    """The sum from the other end."""
    made = step.emit.op(
        "CumSum",
        step.dy,
        step.inputs[1],
        exclusive=step.attr("exclusive", 0),
        reverse=1 - step.attr("reverse", 0),
    )
    return [made]


def triangle(step: Step) -> tuple[Tensor]:
    """Trilu: the same triangle."""
    upper = step.attr("upper", 1)
    return (step.emit.op("Trilu", step.dy, step.input(1), upper=upper),)


def reverse_sequence(step: Step) -> tuple[Tensor]:
    """Reversing again."""
    batch, time = step.attr("batch_axis", 1), step.attr("time_axis", 0)
    lengths = step.inputs[1]
    made = step.emit.op("ReverseSequence", step.dy, lengths, batch_axis=batch, time_axis=time)
    return (made,)


def by_places(step: Step) -> Tensor:
    """The gradient of any movement of the first input, at the cost of an int64 copy of it.

    The operator is applied to the numbers 0, 1, ... in the shape of x; each element of y is then
    the number of the element of x that went there.
    """
    emit, x = step.emit, step.x
    whole = [emit.constant(np.array(number, np.int64)) for number in (0, 1)]
    count = emit.op("Size", x)
    numbers = emit.op("Reshape", emit.op("Range", whole[0], count, whole[1]), emit.shape_of(x))
    operands = [step.input(index) for index in range(1, len(step.inputs))]
    places = emit.op(step.node.op, numbers, *operands, **step.node.attrs)
    length = emit.op("Reshape", count, emit.ints(1))
    row = emit.op(
        "ScatterElements",
        emit.op("Expand", emit.scalar(0, x), length),
        emit.reshape(places, [-1]),
        emit.reshape(step.dy, [-1]),
        axis=0,
        reduction="add",
    )
    return emit.op("Reshape", row, emit.target_shape(emit.shape(x), x))


MOVEMENT: dict[str, Rule] = {
    "Concat": concat,
    "CumSum": cumulative_sum,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "Flatten": reshape,
    "Pad": pad,
    "Reshape": reshape,
    "ReverseSequence": reverse_sequence,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": reshape,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": triangle,
    "Unsqueeze": reshape,
}
