"""Gradients of activation functions and of dropout.

dx = dy * f'(x). Where f has a corner, the derivative of one side is taken, as frameworks do: that
of the left side for Relu at 0, that of the inside for Clip at its limits. A piecewise derivative is
a sum of products with 0/1 masks: on a CPU, comparing and multiplying is several times faster than
Where.
"""

import math

from onnxslim_passes.training.emitter import Tensor
from onnxslim_passes.training.gradients.pointwise import elementwise
from onnxslim_passes.training.gradients.step import Rule, Step

_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875

# The largest float32 below 1/2.
_BELOW_HALF = 0.49999997


def _above(step: Step, tensor: Tensor, limit: float) -> Tensor:
    """1 where the tensor is above the limit, else 0."""
    emit = step.emit
    return emit.mask(emit.op("Greater", tensor, emit.scalar(limit, tensor)), tensor)


def _between(step: Step, tensor: Tensor, low: float, high: float) -> Tensor:
    """1 strictly between the limits, else 0."""
    emit = step.emit
    above = emit.op("Greater", tensor, emit.scalar(low, tensor))
    below = emit.op("Less", tensor, emit.scalar(high, tensor))
    return emit.mask(emit.op("And", above, below), tensor)


def relu(step: Step) -> Tensor:
    """1 where y > 0."""
    return _above(step, step.y, 0)


def leaky_relu(step: Step) -> Tensor:
    """1 where x > 0, else alpha."""
    alpha = step.attr("alpha", 0.01)
    return step.emit.shift(step.emit.scale(_above(step, step.x, 0), 1 - alpha), alpha)


def thresholded_relu(step: Step) -> Tensor:
    """1 where x > alpha."""
    return _above(step, step.x, step.attr("alpha", 1.0))


def elu(step: Step) -> Tensor:
    """1 where x > 0, else alpha e^x = y + alpha."""
    emit, positive = step.emit, _above(step, step.x, 0)
    grown = emit.shift(step.y, step.attr("alpha", 1.0))
    return emit.add(positive, emit.mul(emit.one_minus(positive), grown))


def selu(step: Step) -> Tensor:
    """Gamma where x > 0, else gamma alpha e^x = y + gamma alpha."""
    emit, positive = step.emit, _above(step, step.x, 0)
    alpha, gamma = step.attr("alpha", _SELU_ALPHA), step.attr("gamma", _SELU_GAMMA)
    grown = emit.shift(step.y, alpha * gamma)
    return emit.add(emit.scale(positive, gamma), emit.mul(emit.one_minus(positive), grown))


def celu(step: Step) -> Tensor:
    """1 where x > 0, else e^(x / alpha) = y / alpha + 1; for both the smaller of it and 1."""
    emit = step.emit
    grown = emit.shift(emit.scale(step.y, 1 / step.attr("alpha", 1.0)), 1)
    return emit.op("Min", grown, emit.scalar(1, grown))


def sigmoid(step: Step) -> Tensor:
    """S' = y (1 - y)."""
    return step.emit.mul(step.y, step.emit.one_minus(step.y))


def hard_sigmoid(step: Step) -> Tensor:
    """Alpha strictly between the limits 0 and 1 of y."""
    return step.emit.scale(_between(step, step.y, 0, 1), step.attr("alpha", 0.2))


def hard_swish(step: Step) -> Tensor:
    """For y = x h, h = clip(x / 6 + 1/2, 0, 1): h, plus x / 6 = h - 1/2 where it is not clipped.

    With k = h - 1/2, Shrink leaves of k what was clipped, |k| = 1/2.
    """
    emit = step.emit
    gate = emit.op("HardSigmoid", step.x, alpha=1 / 6, beta=0.5)
    middle = emit.shift(gate, -0.5)
    clipped = emit.op("Shrink", middle, lambd=_BELOW_HALF)
    return emit.sub(emit.add(gate, middle), clipped)


def softplus(step: Step) -> Tensor:
    """ln(1 + e^x)' = sigmoid(x)."""
    return step.emit.op("Sigmoid", step.x)


def softsign(step: Step) -> Tensor:
    """(x / (1 + |x|))' = (1 - |y|)^2."""
    return step.emit.square(step.emit.one_minus(step.emit.op("Abs", step.y)))


def swish(step: Step) -> Tensor:
    """For y = x s, s = sigmoid(alpha x): s + alpha y (1 - s)."""
    emit, alpha = step.emit, step.attr("alpha", 1.0)
    gate = emit.op("Sigmoid", emit.scale(step.x, alpha))
    return emit.add(gate, emit.mul(emit.scale(step.y, alpha), emit.one_minus(gate)))


def mish(step: Step) -> Tensor:
    """For y = x t, t = tanh(softplus(x)): t + x (1 - t^2) sigmoid(x)."""
    emit, x = step.emit, step.x
    squashed = emit.op("Tanh", emit.op("Softplus", x))
    slope = emit.mul(emit.one_minus(emit.square(squashed)), emit.op("Sigmoid", x))
    return emit.add(squashed, emit.mul(x, slope))


def gelu(step: Step) -> Tensor:
    """For y = x P(x): P + x P', P the normal distribution or its approximation by tanh."""
    if step.attr("approximate", "none") == "tanh":
        return _gelu_tanh(step)
    emit, x = step.emit, step.x
    error = emit.op("Erf", emit.scale(x, math.sqrt(0.5)))
    below = emit.shift(emit.scale(error, 0.5), 0.5)
    bell = emit.op("Exp", emit.mul(emit.scale(x, -0.5), x))
    return emit.add(below, emit.mul(emit.scale(x, 1 / math.sqrt(2 * math.pi)), bell))


def _gelu_tanh(step: Step) -> Tensor:
    """P = (1 + t) / 2, t = tanh(u), u = c (x + k x^3): P' = (1 - t^2) c (1 + 3 k x^2) / 2."""
    emit, x = step.emit, step.x
    c, k = math.sqrt(2 / math.pi), 0.044715
    squared = emit.square(x)
    inner = emit.mul(emit.scale(x, c), emit.shift(emit.scale(squared, k), 1))
    squashed = emit.op("Tanh", inner)
    below = emit.shift(emit.scale(squashed, 0.5), 0.5)
    slope = emit.shift(emit.scale(squared, 1.5 * c * k), 0.5 * c)
    bell = emit.mul(emit.one_minus(emit.square(squashed)), slope)
    return emit.add(below, emit.mul(x, bell))


def prelu(step: Step) -> list[Tensor | None]:
    """Slope 1 above 0 and s below: dx = dy or s dy, ds = x dy below 0."""
    emit, (x, slope) = step.emit, step.inputs
    positive = _above(step, x, 0)
    negative = emit.one_minus(positive)
    result: list[Tensor | None] = [None, None]
    if step.wants(0):
        factor = emit.add(positive, emit.mul(negative, slope))
        result[0] = emit.mul(step.dy, factor)
    if step.wants(1):
        result[1] = emit.sum_to(emit.mul(step.dy, emit.mul(negative, x)), slope)
    return result


def clip(step: Step) -> list[Tensor | None]:
    """X has the gradient where it was not clipped, a limit where it took the place of x."""
    emit, x, y = step.emit, step.x, step.y
    inside = emit.mask(emit.op("Equal", x, y), x)
    result: list[Tensor | None] = [None, None, None]
    if step.wants(0):
        result[0] = emit.mul(step.dy, inside)
    for index in (1, 2):
        if step.wants(index):
            # Above a maximum that is below the minimum, the maximum holds.
            limit, outside = step.inputs[index], emit.one_minus(inside)
            reached = emit.mul(outside, emit.mask(emit.op("Equal", y, limit), x))
            result[index] = emit.sum_to(emit.mul(step.dy, reached), limit)
    return result


def dropout(step: Step) -> tuple[Tensor]:
    """In training dx = mask dy / (1 - ratio); otherwise the gradient passes."""
    emit = step.emit
    training = step.input(2)
    if training is None:
        return (step.dy,)
    if not step.value(2, "training_mode").item():
        return (step.dy,)
    mask = emit.mask(emit.add_output(step.node, 1), step.x)
    ratio = step.input(1)
    kept = (
        emit.scalar(0.5, step.x) if ratio is None else emit.one_minus(emit.cast_like(ratio, step.x))
    )
    return (emit.div(emit.mul(step.dy, mask), kept),)


ACTIVATIONS: dict[str, Rule] = {
    "Celu": elementwise(celu),
    "Clip": clip,
    "Dropout": dropout,
    "Elu": elementwise(elu),
    "Gelu": elementwise(gelu),
    "HardSigmoid": elementwise(hard_sigmoid),
    "HardSwish": elementwise(hard_swish),
    "LeakyRelu": elementwise(leaky_relu),
    "Mish": elementwise(mish),
    "PRelu": prelu,
    "Relu": elementwise(relu),
    "Selu": elementwise(selu),
    "Sigmoid": elementwise(sigmoid),
    "Softplus": elementwise(softplus),
    "Softsign": elementwise(softsign),
    "Swish": elementwise(swish),
    "ThresholdedRelu": elementwise(thresholded_relu),
}
