"""Gradients of normalizations."""

from onnxslim_passes.training.emitter import Tensor
from onnxslim_passes.training.gradients.step import Rule, Step


def softmax(step: Step) -> tuple[Tensor]:
    """The gradient is dx = y dy - y sum(y dy)."""
    emit = step.emit
    axis = step.attr("axis", -1) % emit.rank(step.y)
    weighted = emit.mul(step.dy, step.y)
    total = emit.reduce_sum(weighted, [axis], keepdims=True)
    return (emit.sub(weighted, emit.mul(step.y, total)),)


def log_softmax(step: Step) -> tuple[Tensor]:
    """The gradient is dx = dy - e^y sum(dy)."""
    emit = step.emit
    axis = step.attr("axis", -1) % emit.rank(step.y)
    total = emit.reduce_sum(step.dy, [axis], keepdims=True)
    return (emit.sub(step.dy, emit.mul(emit.op("Exp", step.y), total)),)


NORMALIZATION: dict[str, Rule] = {
    "LogSoftmax": log_softmax,
    "Softmax": softmax,
}
