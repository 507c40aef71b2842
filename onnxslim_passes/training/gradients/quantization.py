"""Straight-through gradients of quantization.

q = clip(round(x / s) + z) has a derivative that is zero almost everywhere. The straight-through
estimator (Bengio et al. 2013) takes that of q = x / s + z inside the range of the integer type and
0 outside. The gradient of q is a floating-point tensor in this sense. Behind q = Quantize(x), with
x' = s (q - z) = Dequantize(q), the gradient of the scale adds up to dy (q - z - x / s) inside and
dy (q - z) outside, which is that of learned step sizes (Esser et al. 2020, LSQ, equation 3).
"""

from ml_dtypes import iinfo

from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.gradients.step import Rule, Step


def quantize(step: Step) -> list[Tensor | None]:
    """QuantizeLinear: dx = dq / s inside, ds = -x / s^2 dq inside."""
    emit, (x, scale) = step.emit, step.inputs[:2]
    wide = _like(step, scale, x)
    ratio = emit.div(x, emit.cast_like(wide, x))
    inside = emit.mul(step.dy, emit.mask(_inside(step, ratio), x))
    share = emit.div(inside, emit.cast_like(wide, x))
    result: list[Tensor | None] = [share]
    if step.wants(1):
        terms = emit.neg(emit.mul(share, ratio))
        result.append(emit.cast_like(_reduced(step, terms, scale, x), scale))
    return result


def dequantize(step: Step) -> list[Tensor | None]:
    """DequantizeLinear: dq = s dy, ds = (q - z) dy."""
    emit, (q, scale) = step.emit, step.inputs[:2]
    result: list[Tensor | None] = [None, None]
    if step.wants(0):
        result[0] = emit.mul(step.dy, _like(step, scale, q))
    if step.wants(1):
        steps: Tensor = emit.op("Cast", q, to=emit.elem_type(step.dy))
        zero = step.input(2)
        if zero is not None:
            numbers = emit.op("Cast", zero, to=emit.elem_type(step.dy))
            steps = emit.sub(steps, _like(step, numbers, q))
        result[1] = _reduced(step, emit.mul(step.dy, steps), scale, q)
    return result


def dynamic_quantize(step: Step) -> tuple[Tensor]:
    """DynamicQuantizeLinear: dx = dq / s; the range is that of x, so that nothing is outside."""
    return (step.emit.div(step.dy, step.node.outputs[1]),)


def _inside(step: Step, ratio: Tensor) -> Tensor:
    """Where the integer type can hold the result."""
    emit = step.emit
    limits = iinfo(emit.dtype(step.y))
    zero = step.input(2)
    if zero is not None:
        numbers = emit.op("Cast", zero, to=emit.elem_type(ratio))
        ratio = emit.add(ratio, _like(step, numbers, step.x))
    low, high = (emit.scalar(float(limit), ratio) for limit in (limits.min, limits.max))
    return emit.op("Equal", emit.op("Clip", ratio, low, high), ratio)


def _axis(step: Step, like: Tensor) -> int:
    return int(step.attr("axis", 1)) % step.emit.rank(like)


def _like(step: Step, parameter: Tensor, like: Tensor) -> Tensor:
    """Scales or zero points in a shape that broadcasts: one, one a channel, or one a block."""
    emit = step.emit
    shape = emit.shape(parameter)
    if len(shape) == 0 or shape == (1,):
        return parameter
    axis = _axis(step, like)
    if len(shape) == 1 and not step.attr("block_size", 0):
        return emit.reshape(parameter, [-1, *([1] * (emit.rank(like) - 1 - axis))])
    return _repeated(emit, parameter, like, axis, step.attr("block_size"))


def _repeated(emit: Emitter, parameter: Tensor, like: Tensor, axis: int, block: int) -> Tensor:
    """Every entry `block` times along an axis, cut to the size of `like`."""
    places = [place // block for place in range(emit.size(like, axis))]
    return emit.op("Gather", parameter, emit.ints(*places), axis=axis)


def _reduced(step: Step, terms: Tensor, parameter: Tensor, like: Tensor) -> Tensor:
    """The terms of all elements that share a scale, added up."""
    emit = step.emit
    shape = emit.shape(parameter)
    if len(shape) == 0 or shape == (1,):
        return emit.reshape_like(emit.reduce_sum(terms), parameter)
    axis, block = _axis(step, like), step.attr("block_size", 0)
    if not block:
        others = [place for place in range(emit.rank(like)) if place != axis]
        return emit.reduce_sum(terms, others)
    size, blocks = emit.size(like, axis), emit.size(parameter, axis)
    if blocks * block != size:
        pads = [0] * 2 * emit.rank(like)
        pads[emit.rank(like) + axis] = blocks * block - size
        terms = emit.op("Pad", terms, emit.ints(*pads))
    split = [emit.size(like, place) for place in range(emit.rank(like))]
    split[axis : axis + 1] = [blocks, block]
    return emit.reduce_sum(emit.reshape(terms, split), [axis + 1])


QUANTIZATION: dict[str, Rule] = {
    "DequantizeLinear": dequantize,
    "DynamicQuantizeLinear": dynamic_quantize,
    "QuantizeLinear": quantize,
}
