"""Gradients of reductions: what comes back is spread over the axes that were reduced."""

from collections.abc import Sequence

from onnxslim_passes.training.emitter import Tensor
from onnxslim_passes.training.gradients.step import Rule, Step


def reduced_axes(step: Step) -> list[int]:
    """The axes that a Reduce operator reduces, counted from the front, in order.

    Raises:
        DifferentiationError: they are an input that is not known before the run.
    """
    rank = step.emit.rank(step.x)
    axes = step.attr("axes")
    if axes is None and step.input(1) is not None:
        axes = step.value(1, "the axes").tolist()
    if not axes:
        return [] if step.attr("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(axis % rank for axis in axes)


def with_axes(step: Step, tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """Output or gradient of a reduction with the reduced axes as axes of size 1."""
    return tensor if step.attr("keepdims", 1) else step.emit.unsqueeze(tensor, axes)


def spread_mean(step: Step, dy: Tensor, axes: Sequence[int]) -> Tensor:
    """The gradient of a mean over `axes` of x, from that of the mean with axes of size 1."""
    emit = step.emit
    return emit.expand_like(emit.div(dy, emit.element_count(step.x, axes)), step.x)


def spread_extremum(step: Step, dy: Tensor, y: Tensor, axes: Sequence[int]) -> Tensor:
    """The gradient of a maximum or minimum y over `axes`: in equal parts to all that reach it."""
    emit = step.emit
    mask = emit.mask(emit.op("Equal", step.x, y), step.x)
    count = emit.reduce_sum(mask, axes, keepdims=True)
    return emit.mul(mask, emit.div(dy, count))


def spread_norm(step: Step, dy: Tensor, y: Tensor, order: float) -> Tensor:
    """The gradient of y = (sum |x|^p)^(1/p): sign(x) |x|^(p-1) y^(1-p) dy; 0 where y is 0."""
    emit, x = step.emit, step.x
    if order == 1:
        return emit.mul(emit.op("Sign", x), dy)
    zero = emit.mask(emit.op("Equal", y, emit.scalar(0, y)), y)
    safe: Tensor = emit.add(y, zero)
    if order == 2:
        return emit.mul(x, emit.div(dy, safe))
    falling = emit.op("Pow", safe, emit.scalar(1 - order, y))
    grown = emit.op("Pow", emit.op("Abs", x), emit.scalar(order - 1, x))
    return emit.mul(emit.mul(emit.op("Sign", x), grown), emit.mul(dy, falling))


def reduce_sum(step: Step) -> tuple[Tensor]:
    """Every term has the gradient of the sum."""
    axes = reduced_axes(step)
    return (step.emit.expand_like(with_axes(step, step.dy, axes), step.x),)


def reduce_mean(step: Step) -> tuple[Tensor]:
    """Every one of n terms has 1/n of the gradient of the mean."""
    axes = reduced_axes(step)
    return (spread_mean(step, with_axes(step, step.dy, axes), axes),)


def reduce_extremum(step: Step) -> tuple[Tensor]:
    """ReduceMax, ReduceMin."""
    axes = reduced_axes(step)
    dy, y = (with_axes(step, tensor, axes) for tensor in (step.dy, step.y))
    return (spread_extremum(step, dy, y, axes),)


def reduce_l1(step: Step) -> tuple[Tensor]:
    """For y = sum |x|, dx = sign(x) dy."""
    axes = reduced_axes(step)
    return (spread_norm(step, with_axes(step, step.dy, axes), step.y, 1),)


def reduce_l2(step: Step) -> tuple[Tensor]:
    """For y = sqrt(sum x^2), dx = x dy / y."""
    axes = reduced_axes(step)
    dy, y = (with_axes(step, tensor, axes) for tensor in (step.dy, step.y))
    return (spread_norm(step, dy, y, 2),)


def reduce_sum_square(step: Step) -> tuple[Tensor]:
    """For y = sum x^2, dx = 2 x dy."""
    emit, axes = step.emit, reduced_axes(step)
    return (emit.mul(emit.scale(step.x, 2), with_axes(step, step.dy, axes)),)


def reduce_log_sum(step: Step) -> tuple[Tensor]:
    """For y = ln sum x, dx = dy e^(-y)."""
    emit, axes = step.emit, reduced_axes(step)
    share = emit.mul(step.dy, emit.op("Exp", emit.neg(step.y)))
    return (emit.expand_like(with_axes(step, share, axes), step.x),)


def reduce_log_sum_exp(step: Step) -> tuple[Tensor]:
    """For y = ln sum e^x, dx = e^(x - y) dy."""
    emit, axes = step.emit, reduced_axes(step)
    dy, y = (with_axes(step, tensor, axes) for tensor in (step.dy, step.y))
    return (emit.mul(emit.op("Exp", emit.sub(step.x, y)), dy),)


def reduce_product(step: Step) -> tuple[Tensor]:
    """The product of all other elements, exact where some are zero.

    With zeros replaced by ones, the product divided by an element is the product of the others,
    unless one of the others was a zero.
    """
    emit, axes, x = step.emit, reduced_axes(step), step.x
    zero = emit.mask(emit.op("Equal", x, emit.scalar(0, x)), x)
    safe = emit.add(x, zero)
    product = emit.reduce("ReduceProd", safe, axes, keepdims=True)
    zeros = emit.reduce_sum(zero, axes, keepdims=True)
    alone = emit.mask(emit.op("Equal", zeros, zero), x)
    others = emit.mul(emit.div(product, safe), alone)
    return (emit.mul(others, with_axes(step, step.dy, axes)),)


REDUCTIONS: dict[str, Rule] = {
    "ReduceL1": reduce_l1,
    "ReduceL2": reduce_l2,
    "ReduceLogSum": reduce_log_sum,
    "ReduceLogSumExp": reduce_log_sum_exp,
    "ReduceMax": reduce_extremum,
    "ReduceMean": reduce_mean,
    "ReduceMin": reduce_extremum,
    "ReduceProd": reduce_product,
    "ReduceSum": reduce_sum,
    "ReduceSumSquare": reduce_sum_square,
}
