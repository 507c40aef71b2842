"""Gradients of arithmetic that works element by element.

For y = f(x), dx = dy * f'(x). Each derivative is written in whichever of x and y it takes less to
compute it from. A binary operator that repeats an operand along an axis adds up what comes back
along that axis.
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
    """The gradient passes: dx = dy. For Round this is the straight-through estimator."""
    return (step.dy,)


def cast(step: Step) -> tuple[Tensor]:
    """Cast, CastLike: the element type of x again."""
    return (step.emit.cast_like(step.dy, step.x),)


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


def sine(step: Step) -> Tensor:
    """Sin' = cos."""
    return step.emit.op("Cos", step.x)


def cosine(step: Step) -> Tensor:
    """Cos' = -sin."""
    return step.emit.neg(step.emit.op("Sin", step.x))


def tangent(step: Step) -> Tensor:
    """Tan' = 1 + y^2."""
    return step.emit.shift(step.emit.square(step.y), 1)


def hyperbolic_sine(step: Step) -> Tensor:
    """Sinh' = cosh."""
    return step.emit.op("Cosh", step.x)


def hyperbolic_cosine(step: Step) -> Tensor:
    """Cosh' = sinh."""
    return step.emit.op("Sinh", step.x)


def hyperbolic_tangent(step: Step) -> Tensor:
    """Tanh' = 1 - y^2."""
    return step.emit.one_minus(step.emit.square(step.y))


def arc_sine(step: Step) -> Tensor:
    """Asin' = 1 / sqrt(1 - x^2)."""
    emit = step.emit
    return emit.op("Reciprocal", emit.op("Sqrt", emit.one_minus(emit.square(step.x))))


def arc_cosine(step: Step) -> Tensor:
    """Acos' = -asin'."""
    return step.emit.neg(arc_sine(step))


def arc_tangent(step: Step) -> Tensor:
    """Atan' = 1 / (1 + x^2)."""
    emit = step.emit
    return emit.op("Reciprocal", emit.shift(emit.square(step.x), 1))


def area_sine(step: Step) -> Tensor:
    """Asinh' = 1 / sqrt(x^2 + 1)."""
    emit = step.emit
    return emit.op("Reciprocal", emit.op("Sqrt", emit.shift(emit.square(step.x), 1)))


def area_cosine(step: Step) -> Tensor:
    """Acosh' = 1 / sqrt(x^2 - 1)."""
    emit = step.emit
    return emit.op("Reciprocal", emit.op("Sqrt", emit.shift(emit.square(step.x), -1)))


def area_tangent(step: Step) -> Tensor:
    """Atanh' = 1 / (1 - x^2)."""
    emit = step.emit
    return emit.op("Reciprocal", emit.one_minus(emit.square(step.x)))


# ---- y = f(a, b, ...)


def add(step: Step) -> list[Tensor | None]:
    """Add, Sum: every term has the gradient of the sum."""
    return [
        step.emit.sum_to(step.dy, tensor) if step.wants(index) else None
        for index, tensor in enumerate(step.inputs)
    ]


def mean(step: Step) -> list[Tensor | None]:
    """Each of n terms has 1/n of the gradient."""
    share = step.emit.scale(step.dy, 1 / len(step.inputs))
    return [
        step.emit.sum_to(share, tensor) if step.wants(index) else None
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


def power(step: Step) -> list[Tensor | None]:
    """For y = a^b: da = b a^(b-1) dy, db = y ln(a) dy, which is 0 where a is not positive."""
    emit, (a, b) = step.emit, step.inputs
    result: list[Tensor | None] = [None, None]
    if step.wants(0):
        exponent = emit.value(b)
        if exponent is not None and exponent.size == 1 and exponent.item() == 2:
            slope: Tensor = emit.add(a, a)
        else:
            raised = emit.op("Pow", a, emit.shift(b, -1))
            slope = emit.mul(emit.cast_like(b, a), raised)
        result[0] = emit.sum_to(emit.mul(step.dy, slope), a)
    if step.wants(1):
        positive = emit.op("Greater", a, emit.scalar(0, a))
        log = emit.op("Log", emit.where(positive, a, emit.scalar(1, a)))
        grown = emit.mul(emit.mul(step.dy, step.y), log)
        result[1] = emit.cast_like(emit.sum_to(grown, b), b)
    return result


def modulo(step: Step) -> list[Tensor | None]:
    """For y = a - trunc(a / b) b: da = dy, db = -trunc(a / b) dy."""
    emit, (a, b) = step.emit, step.inputs
    result: list[Tensor | None] = [None, None]
    if step.wants(0):
        result[0] = emit.sum_to(step.dy, a)
    if step.wants(1):
        # (a - y) / b is a whole number up to rounding.
        whole = emit.op("Round", emit.div(emit.sub(a, step.y), b))
        result[1] = emit.neg(emit.sum_to(emit.mul(step.dy, whole), b))
    return result


def extremum(step: Step) -> list[Tensor | None]:
    """Max, Min: the gradient goes to the operand that was chosen, in equal parts to equal ones."""
    emit, y = step.emit, step.y
    masks = {
        index: emit.mask(emit.op("Equal", tensor, y), y)
        for index, tensor in enumerate(step.inputs)
        if step.wants(index)
    }
    share = step.dy
    if len(masks) > 1:
        share = emit.div(share, emit.op("Sum", *masks.values()))
    return [
        emit.sum_to(emit.mul(share, masks[index]), tensor) if index in masks else None
        for index, tensor in enumerate(step.inputs)
    ]


def choose(step: Step) -> list[Tensor | None]:
    """Where: the gradient goes to the side that was chosen."""
    emit, (condition, a, b) = step.emit, step.inputs
    mask = emit.mask(condition, step.y)
    return [
        None,
        emit.sum_to(emit.mul(step.dy, mask), a) if step.wants(1) else None,
        emit.sum_to(emit.mul(step.dy, emit.one_minus(mask)), b) if step.wants(2) else None,
    ]


POINTWISE: dict[str, Rule] = {
    "Abs": elementwise(absolute),
    "Acos": elementwise(arc_cosine),
    "Acosh": elementwise(area_cosine),
    "Add": add,
    "Asin": elementwise(arc_sine),
    "Asinh": elementwise(area_sine),
    "Atan": elementwise(arc_tangent),
    "Atanh": elementwise(area_tangent),
    "Cast": cast,
    "CastLike": cast,
    "Cos": elementwise(cosine),
    "Cosh": elementwise(hyperbolic_cosine),
    "Div": divide,
    "Erf": elementwise(error_function),
    "Exp": elementwise(exponential),
    "Identity": identity,
    "Log": logarithm,
    "Max": extremum,
    "Mean": mean,
    "Min": extremum,
    "Mod": modulo,
    "Mul": multiply,
    "Neg": negative,
    "Pow": power,
    "Reciprocal": elementwise(reciprocal),
    "Round": identity,
    "Sin": elementwise(sine),
    "Sinh": elementwise(hyperbolic_sine),
    "Sqrt": elementwise(square_root),
    "Sub": subtract,
    "Sum": add,
    "Tan": elementwise(tangent),
    "Tanh": elementwise(hyperbolic_tangent),
    "Where": choose,
}
