"""Gradients of Resize.

Whatever the mode, Resize is linear, and the same along every line of an axis: y = A_h x A_w^T for
two axes. Its gradient is dx = A_h^T dy A_w. The matrix of an axis is what the operator itself makes
of the identity matrix, so that all of its many modes are met without a formula. Where every element
is just repeated a whole number of times, the repetitions are added up instead.
"""

import math

import numpy as np
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxslim_passes.training.emitter import Tensor
from onnxslim_passes.training.gradients.step import Rule, Step

# Enough elements for the border and the middle to differ, if they ever do.
_PROBED = 5


def resize(step: Step) -> tuple[Tensor]:
    """Resize along any axes, in any mode."""
    emit = step.emit
    axes = _resized_axes(step)
    factors = [_repetitions(step, axis) for axis in axes]
    if axes and all(factor is not None for factor in factors):
        whole = [factor for factor in factors if factor is not None]
        return (_sum_repetitions(step, axes, whole),)
    dy: Tensor = step.dy
    for axis in axes:
        last = [*(a for a in range(emit.rank(dy)) if a != axis), axis]
        turned = emit.transpose(dy, last)
        product = emit.op("MatMul", turned, emit.swap_last(_matrix(step, axis)))
        dy = emit.transpose(product, [int(place) for place in np.argsort(last)])
    return (dy,)


def _resized_axes(step: Step) -> list[int]:
    sizes = zip(step.emit.shape(step.x), step.emit.shape(step.y), strict=True)
    changed = [axis for axis, (old, new) in enumerate(sizes) if old != new]
    if step.attr("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize":
        return changed
    return _listed_axes(step)


def _listed_axes(step: Step) -> list[int]:
    """The axes that scales, sizes and regions of interest are given for."""
    rank = step.emit.rank(step.x)
    return [axis % rank for axis in step.attr("axes", list(range(rank)))]


def _scale(step: Step, axis: int) -> float | None:
    """The factor of an axis, if it is given and known."""
    scales = step.input(2)
    value = None if scales is None else step.emit.value(scales)
    if value is None or not value.size:
        return None
    return float(value[_listed_axes(step).index(axis)])


def _repetitions(step: Step, axis: int) -> int | None:
    """How many times every element is repeated, or None if it is anything else."""
    if step.attr("mode", "nearest") != "nearest":
        return None
    old, new = step.emit.shape(step.x)[axis], step.emit.shape(step.y)[axis]
    scale = _scale(step, axis)
    if isinstance(old, int) and isinstance(new, int):
        scale = new / old
    if scale is None or scale != int(scale):
        return None
    factor = int(scale)
    node = helper.make_node(
        "Resize",
        ["x", "", "scales"],
        ["y"],
        coordinate_transformation_mode=step.attr("coordinate_transformation_mode", "half_pixel"),
        nearest_mode=step.attr("nearest_mode", "round_prefer_floor"),
        mode="nearest",
    )
    if step.attr("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return None
    probe = np.arange(_PROBED, dtype=np.float32)
    feed = {"x": probe, "scales": np.array([factor], np.float32)}
    (made,) = ReferenceEvaluator(node).run(None, feed)
    return factor if np.array_equal(made, probe.repeat(factor)) else None


def _sum_repetitions(step: Step, axes: list[int], factors: list[int]) -> Tensor:
    emit, x = step.emit, step.x
    if axes == list(range(2, emit.rank(x))):
        mean = emit.op("AveragePool", step.dy, kernel_shape=factors, strides=factors)
        return emit.scale(mean, float(math.prod(factors)))
    dy: Tensor = step.dy
    for axis, factor in zip(axes, factors, strict=True):
        before = emit.op("Shape", dy, start=0, end=axis)
        behind = emit.op("Shape", dy, start=axis + 1)
        apart = emit.op("Concat", before, emit.ints(-1, factor), behind, axis=0)
        dy = emit.reduce_sum(emit.op("Reshape", dy, apart), [axis + 1])
    return dy


def _matrix(step: Step, axis: int) -> Tensor:
    """What Resize makes of the rows of an identity matrix: (old size, new size)."""
    emit, x, y = step.emit, step.x, step.y
    old = emit.op("Shape", x, start=axis, end=axis + 1)
    new = emit.op("Shape", y, start=axis, end=axis + 1)
    zeros = emit.op("Expand", emit.scalar(0, x), emit.op("Concat", old, old, axis=0))
    identity = emit.op("EyeLike", zeros)
    attributes = {
        key: value
        for key, value in step.node.attrs.items()
        if key not in ("axes", "keep_aspect_ratio_policy")
    }
    # The value outside is added, not multiplied with x.
    attributes["extrapolation_value"] = 0.0
    place = _listed_axes(step).index(axis)
    region = _region(step, place)
    scale = _scale(step, axis)
    if scale is not None:
        scales = emit.constant(np.array([1, scale], np.float32))
        return emit.op("Resize", identity, region, scales, **attributes)
    sizes = emit.op("Concat", old, new, axis=0)
    return emit.op("Resize", identity, region, None, sizes, **attributes)


def _region(step: Step, place: int) -> Tensor | None:
    """The region of interest for the identity: all rows, and the part of one axis."""
    emit, given = step.emit, step.input(1)
    if step.attr("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize":
        return None
    if given is None:
        return None
    count = len(_listed_axes(step))
    start, end = (emit.op("Gather", given, emit.ints(index)) for index in (place, count + place))
    whole = [emit.constant(np.array([number], emit.dtype(given))) for number in (0, 1)]
    return emit.op("Concat", whole[0], start, whole[1], end, axis=0)


RESIZING: dict[str, Rule] = {
    "Resize": resize,
}
