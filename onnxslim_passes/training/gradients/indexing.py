"""Gradients of operators that choose elements by indices.

What was gathered is scattered back, added where an index occurs more than once; what was scattered
is gathered.
"""

from collections.abc import Callable

import numpy as np

from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.gradients.movement import by_places
from onnxslim_passes.training.gradients.step import Rule, Step

# (emit, data, updates, reduction) -> data with the updates at the indices of the node.
Scatter = Callable[[Emitter, Tensor, Tensor, str], Tensor]
# (emit, data) -> what stands in data at the indices of the node.
Collect = Callable[[Emitter, Tensor], Tensor]


def gather(step: Step) -> tuple[Tensor]:
    """Slices added back at their indices along one axis."""
    emit, (x, indices) = step.emit, step.inputs
    rank, count = emit.rank(x), emit.rank(indices)
    axis = step.attr("axis", 0) % rank
    chosen = emit.value(indices)
    size = emit.shape(x)[axis]
    if chosen is not None and chosen.size == 1 and isinstance(size, int):
        return (_put_back(step, axis, int(chosen.item()) % size, size),)
    # The chosen axis outermost: ScatterND adds whole slices.
    order = [axis, *(other for other in range(rank) if other != axis)]
    behind = [*range(axis, axis + count)]
    ahead = [other for other in range(rank - 1 + count) if other not in behind]
    dy = emit.transpose(step.dy, [*behind, *ahead])
    zeros = emit.transpose(emit.zeros_like(x), order) if axis else emit.zeros_like(x)
    places = emit.unsqueeze(emit.cast(indices, np.int64), [count])
    made = emit.op("ScatterND", zeros, places, dy, reduction="add")
    return (emit.transpose(made, [int(place) for place in np.argsort(order)]),)


def _put_back(step: Step, axis: int, index: int, size: int) -> Tensor:
    """One slice among zeros."""
    emit, rank = step.emit, step.emit.rank(step.x)
    count = emit.rank(step.inputs[1])
    slab = step.dy
    if count == 0:
        slab = emit.unsqueeze(slab, [axis])
    elif count > 1:
        slab = emit.squeeze(slab, range(axis, axis + count - 1))
    pads = [0] * 2 * rank
    pads[axis], pads[rank + axis] = index, size - 1 - index
    return emit.op("Pad", slab, emit.ints(*pads)) if any(pads) else slab


def gather_elements(step: Step) -> tuple[Tensor]:
    """Elements added back at their indices along one axis."""
    made = step.emit.op(
        "ScatterElements",
        step.emit.zeros_like(step.x),
        step.inputs[1],
        step.dy,
        axis=step.attr("axis", 0),
        reduction="add",
    )
    return (made,)


def gather_nd(step: Step) -> tuple[Tensor]:
    """Slices added back at their index tuples."""
    if step.attr("batch_dims", 0):
        return (by_places(step),)
    zeros = step.emit.zeros_like(step.x)
    made = step.emit.op("ScatterND", zeros, step.inputs[1], step.dy, reduction="add")
    return (made,)


def scatter_elements(step: Step) -> list[Tensor | None]:
    """Elements overwritten, added, multiplied or compared along one axis."""
    axis = step.attr("axis", 0)

    def scatter(emit: Emitter, data: Tensor, updates: Tensor, reduction: str) -> Tensor:
        indices = step.inputs[1]
        return emit.op("ScatterElements", data, indices, updates, axis=axis, reduction=reduction)

    def collect(emit: Emitter, data: Tensor) -> Tensor:
        return emit.op("GatherElements", data, step.inputs[1], axis=axis)

    return _scattered(step, scatter, collect)


def scatter_nd(step: Step) -> list[Tensor | None]:
    """Slices overwritten, added, multiplied or compared at index tuples."""

    def scatter(emit: Emitter, data: Tensor, updates: Tensor, reduction: str) -> Tensor:
        return emit.op("ScatterND", data, step.inputs[1], updates, reduction=reduction)

    def collect(emit: Emitter, data: Tensor) -> Tensor:
        return emit.op("GatherND", data, step.inputs[1])

    return _scattered(step, scatter, collect)


def _scattered(step: Step, scatter: Scatter, collect: Collect) -> list[Tensor | None]:
    """Gradients of data and updates, whatever the form of the indices.

    none: an overwritten element has no gradient. add: both have that of the sum. mul: each has the
    product of the others. max, min: those that are equal to the result share its gradient.
    """
    emit, (data, _, updates), dy = step.emit, step.inputs, step.dy
    reduction = step.attr("reduction", "none")
    if reduction == "none":
        return [scatter(emit, dy, emit.zeros_like(updates), "none"), None, collect(emit, dy)]
    if reduction == "add":
        return [dy, None, collect(emit, dy)]
    if reduction == "mul":
        others = scatter(emit, emit.ones_like(data), updates, "mul")
        back = emit.div(collect(emit, emit.mul(dy, step.y)), updates)
        return [emit.mul(dy, others), None, back]
    kept = emit.mask(emit.op("Equal", data, step.y), data)
    taken = emit.mask(emit.op("Equal", updates, collect(emit, step.y)), updates)
    share = emit.div(dy, scatter(emit, kept, taken, "add"))
    return [emit.mul(share, kept), None, emit.mul(collect(emit, share), taken)]


def top_k(step: Step) -> tuple[Tensor]:
    """Values back to where the indices say."""
    emit = step.emit
    made = emit.op(
        "ScatterElements",
        emit.zeros_like(step.x),
        emit.add_output(step.node, 1),
        step.dy,
        axis=step.attr("axis", -1),
        reduction="none",
    )
    return (made,)


def compress(step: Step) -> tuple[Tensor]:
    """What was chosen by a condition, back to its place."""
    return (by_places(step),)


def one_hot(step: Step) -> list[Tensor | None]:
    """The two values: what lies where the other one does not."""
    emit = step.emit
    zero_one = emit.constant(np.array([0, 1], emit.dtype(step.y)))
    axis = step.attr("axis", -1)
    hot = emit.op("OneHot", step.inputs[0], step.inputs[1], zero_one, axis=axis)
    on = emit.reduce_sum(emit.mul(step.dy, hot))
    off = emit.sub(emit.reduce_sum(step.dy), on)
    pair = [emit.unsqueeze(number, [0]) for number in (off, on)]
    return [None, None, emit.op("Concat", *pair, axis=0)]


INDEXING: dict[str, Rule] = {
    "Compress": compress,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "OneHot": one_hot,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "TopK": top_k,
}
