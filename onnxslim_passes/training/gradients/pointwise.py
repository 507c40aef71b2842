"""Gradients of operators that work element by element.

For y = f(x), dx = dy * f'(x). Each derivative is written in whichever of x and y it takes less to
compute it from. Where f has a corner, the derivative of one side is taken, as all frameworks do:
that of the left side for Relu at 0, that of the inside for Clip at its limits.

A binary operator that repeats an operand along an axis adds up what comes back along that axis.
"""

import math
from collections.abc import Callable

from onnxslim_passes.training.emitter import Tensor
from onnxslim_passes.training.gradients.step import Rule, Step

Derivative = Callable[[Step], Tensor]


def elementwise(derivative: Derivative) -> Rule:
    """The rule of y = f(x) from f'(x)."""

    def rule(step: Step) -> tuple[Tensor]:
        return (step.emit.mul(step.dy, derivative(step)),)

    return rule


def identity(step: Step) -> tuple[Tensor]:
    """The gradient passes: dx = dy."""
    return (step.dy,)


# ---- y = f(x)


def absolute(step: Step) -> Tensor:
    """|x|' = sign(x)."""
    return step.emit.op("Sign", step.x)


def exponential(step: Step) -> Tensor:
    """(e^x)' = y."""
    return step.y


def square_root(step: Step) -> Tensor:
    """(sqrt x)' = 1 / (2 y)."""
    return step.emit.div(step.emit.scalar(0.5, step.x), step.y)


def reciprocal(step: Step) -> Tensor:
    """(1/x)' = -y^2."""
    return step.emit.neg(step.emit.square(step.y))


def hyperbolic_tangent(step: Step) -> Tensor:
    """Tanh' = 1 - y^2."""
    return step.emit.one_minus(step.emit.square(step.y))


def sigmoid(step: Step) -> Tensor:
    """S' = y (1 - y)."""
    return step.emit.mul(step.y, step.emit.one_minus(step.y))


def relu(step: Step) -> Tensor:
    """1 where y > 0."""
    emit = step.emit
    return emit.mask(emit.op("Greater", step.y, emit.scalar(0, step.y)), step.x)


def error_function(step: Step) -> Tensor:
    """Erf' = 2 / sqrt(pi) e^(-x^2)."""
    emit = step.emit
    bell = emit.op("Exp", emit.neg(emit.square(step.x)))
    return emit.scale(bell, 2 / math.sqrt(math.pi))


def logarithm(step: Step) -> tuple[Tensor]:
    """(ln x)' = 1/x, as one division."""
    return (step.emit.div(step.dy, step.x),)


def negative(step: Step) -> tuple[Tensor]:
    """(-x)' = -1."""
    return (step.emit.neg(step.dy),)


# ---- y = f(a, b)


def add(step: Step) -> list[Tensor | None]:
    """Every term has the gradient of the sum."""
    return [
        step.emit.sum_to(step.dy, tensor) if step.wants(index) else None
        for index, tensor in enumerate(step.inputs)
    ]


def subtract(step: Step) -> list[Tensor | None]:
    """For y = a - b: da = dy, db = -dy."""
    emit, (a, b) = step.emit, step.inputs
    return [
        emit.sum_to(step.dy, a) if step.wants(0) else None,
        emit.neg(emit.sum_to(step.dy, b)) if step.wants(1) else None,
    ]


def multiply(step: Step) -> list[Tensor | None]:
    """For y = a b: da = dy b, db = dy a."""
    emit, (a, b) = step.emit, step.inputs
    return [
        emit.sum_to(emit.mul(step.dy, b), a) if step.wants(0) else None,
        emit.sum_to(emit.mul(step.dy, a), b) if step.wants(1) else None,
    ]


def divide(step: Step) -> list[Tensor | None]:
    """For y = a / b: da = dy / b, db = -y dy / b."""
    emit, (a, b) = step.emit, step.inputs
    da = emit.div(step.dy, b)
    return [
        emit.sum_to(da, a) if step.wants(0) else None,
        emit.neg(emit.sum_to(emit.mul(da, step.y), b)) if step.wants(1) else None,
    ]


POINTWISE: dict[str, Rule] = {
    "Abs": elementwise(absolute),
    "Add": add,
    "Div": divide,
    "Erf": elementwise(error_function),
    "Exp": elementwise(exponential),
    "Identity": identity,
    "Log": logarithm,
    "Mul": multiply,
    "Neg": negative,
    "Reciprocal": elementwise(reciprocal),
    "Relu": elementwise(relu),
    "Sigmoid": elementwise(sigmoid),
    "Sqrt": elementwise(square_root),
    "Sub": subtract,
    "Sum": add,
    "Tanh": elementwise(hyperbolic_tangent),
}
