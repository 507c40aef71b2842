"""Gradients of reductions: what comes back is spread over the axes that were reduced."""

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


def with_axes(step: Step, tensor: Tensor, axes: list[int]) -> Tensor:
    """Output or gradient of a reduction with the reduced axes as axes of size 1."""
    return tensor if step.attr("keepdims", 1) else step.emit.unsqueeze(tensor, axes)


def reduce_sum(step: Step) -> tuple[Tensor]:
    """Every term has the gradient of the sum."""
    axes = reduced_axes(step)
    return (step.emit.expand_like(with_axes(step, step.dy, axes), step.x),)


def reduce_mean(step: Step) -> tuple[Tensor]:
    """Every one of n terms has 1/n of the gradient of the mean."""
    emit, axes = step.emit, reduced_axes(step)
    share = emit.div(with_axes(step, step.dy, axes), emit.element_count(step.x, axes))
    return (emit.expand_like(share, step.x),)


REDUCTIONS: dict[str, Rule] = {
    "ReduceMean": reduce_mean,
    "ReduceSum": reduce_sum,
}
