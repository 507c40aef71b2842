"""Gradients of normalizations.

Let x^ = (x - m) v with m the mean and v = 1 / sqrt(variance + epsilon) over some axes, both of the
data itself. With g = scale dy,

    dx = v (g - mean(g) - x^ mean(g x^))

with means over the same axes (Ioffe and Szegedy 2015, section 3, rearranged). Without the mean
(RMS normalization) its term falls away; with frozen statistics dx = v g.
"""

from collections.abc import Sequence

import numpy as np

from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.gradients.step import Rule, Step


def softmax(step: Step) -> tuple[Tensor]:
    """The gradient is dx = y dy - y sum(y dy)."""
    emit, y = step.emit, step.y
    if _replaces_undefined(y):
        y = emit.where(emit.op("IsNaN", y), emit.scalar(0, y), y)
    axis = step.attr("axis", -1) % emit.rank(y)
    weighted = emit.mul(step.dy, y)
    total = emit.reduce_sum(weighted, [axis], keepdims=True)
    return (emit.sub(weighted, emit.mul(y, total)),)


def _replaces_undefined(y: Tensor) -> bool:
    """Whether the graph expects rows of -inf only, and puts something in the place of their NaN."""
    behind = [node for node in y.outputs if node.op != "Cast"]
    behind += [one for node in y.outputs if node.op == "Cast" for one in node.outputs[0].outputs]
    return any(node.op in ("IsNaN", "Where") for node in behind)


def log_softmax(step: Step) -> tuple[Tensor]:
    """The gradient is dx = dy - e^y sum(dy)."""
    emit = step.emit
    axis = step.attr("axis", -1) % emit.rank(step.y)
    total = emit.reduce_sum(step.dy, [axis], keepdims=True)
    return (emit.sub(step.dy, emit.mul(emit.op("Exp", step.y), total)),)


def layer_normalization(step: Step) -> list[Tensor | None]:
    """Statistics over the last axes, which the operator hands out."""
    emit, x, scale = step.emit, step.inputs[0], step.inputs[1]
    axes = _last_axes(step)
    mean = emit.cast_like(emit.add_output(step.node, 1), x)
    inverse = emit.cast_like(emit.add_output(step.node, 2), x)
    hat = emit.mul(emit.sub(x, mean), inverse)
    result = _scaled(step, hat, inverse, scale, axes, centered=True)
    if result[0] is not None and any(dy is not None for dy in step.dys[1:]):
        result[0] = emit.add(result[0], _statistics_gradient(step, hat, inverse, axes))
    result.append(emit.sum_to(step.dy, step.inputs[2]) if step.wants(2) else None)
    return result


def _statistics_gradient(step: Step, hat: Tensor, inverse: Tensor, axes: Sequence[int]) -> Tensor:
    """What comes back from the other outputs: dm / n - dv v^2 x^ / n."""
    emit = step.emit
    dmean, dinverse = (
        emit.zeros_like(inverse) if dy is None else emit.cast_like(dy, inverse)
        for dy in (*step.dys[1:], None, None)[:2]
    )
    through = emit.mul(hat, emit.mul(dinverse, emit.square(inverse)))
    return emit.div(emit.sub(dmean, through), emit.element_count(hat, axes))


def rms_normalization(step: Step) -> list[Tensor | None]:
    """Root mean square over the last axes."""
    emit, x, scale = step.emit, step.inputs[0], step.inputs[1]
    axes = _last_axes(step)
    inverse = _inverse_root(step, emit.reduce_mean(emit.square(x), axes, keepdims=True))
    return _scaled(step, emit.mul(x, inverse), inverse, scale, axes, centered=False)


def instance_normalization(step: Step) -> list[Tensor | None]:
    """Statistics over the places of each channel of each sample."""
    emit, x = step.emit, step.inputs[0]
    axes = list(range(2, emit.rank(x)))
    centered = emit.sub(x, emit.reduce_mean(x, axes, keepdims=True))
    inverse = _inverse_root(step, emit.reduce_mean(emit.square(centered), axes, keepdims=True))
    scale = _for_channels(emit, step.inputs[1], x)
    hat = emit.mul(centered, inverse)
    dx, dscale = _scaled(step, hat, inverse, scale, axes, centered=True)
    if dscale is not None:
        dscale = emit.reshape_like(dscale, step.inputs[1])
    return [dx, dscale, emit.reduce_sum(step.dy, [0, *axes]) if step.wants(2) else None]


def batch_normalization(step: Step) -> list[Tensor | None]:
    """Statistics of each channel: frozen ones, or those of the batch in training mode."""
    if step.attr("training_mode", 0):
        return _batch_statistics(step)
    emit, (x, scale, _, mean, variance) = step.emit, step.inputs
    axes = _all_but_channels(emit, x)
    inverse = _inverse_root(step, variance)
    result: list[Tensor | None] = [None] * 5
    if step.wants(0):
        factor = _for_channels(emit, emit.mul(scale, inverse), x)
        result[0] = emit.mul(step.dy, factor)
    if any(step.wants(index) for index in (1, 2, 3, 4)):
        total = emit.reduce_sum(step.dy, axes)
        centered = emit.sub(x, _for_channels(emit, mean, x))
        # sum dy (x - m): what scale and variance have in common.
        moment = emit.reduce_sum(emit.mul(step.dy, centered), axes)
        hat = emit.mul(moment, inverse)
        result[1], result[2] = hat, total
        if step.wants(3):
            result[3] = emit.neg(emit.mul(total, emit.mul(scale, inverse)))
        if step.wants(4):
            cubed = emit.mul(emit.square(inverse), emit.mul(hat, scale))
            result[4] = emit.scale(cubed, -0.5)
    return result


def _batch_statistics(step: Step) -> list[Tensor | None]:
    """In a lowered graph the node hands out the mean and variance of its batch.

    With them x^ is never made: dx = a dy + b (x - m) + c with three numbers for each channel.
    """
    emit, (x, scale) = step.emit, step.inputs[:2]
    axes = _all_but_channels(emit, x)
    mean, variance = (emit.cast_like(emit.add_output(step.node, index), x) for index in (1, 2))
    inverse = _inverse_root(step, variance)
    centered = emit.sub(x, _for_channels(emit, mean, x))
    # sum dy and sum dy x^ are the gradients of bias and scale, and the means in dx.
    dbias = emit.reduce_sum(step.dy, axes)
    dscale = emit.mul(emit.reduce_sum(emit.mul(step.dy, centered), axes), inverse)
    result: list[Tensor | None] = [None] * 5
    if step.wants(0):
        factor = emit.mul(scale, inverse)
        each = emit.neg(emit.div(factor, emit.element_count(x, axes)))
        through = _affine(emit, step.dy, factor, emit.mul(each, dbias))
        slope = emit.mul(emit.mul(each, dscale), inverse)
        result[0] = emit.add(through, emit.mul(centered, _for_channels(emit, slope, x)))
    result[1], result[2] = dscale, dbias
    return result


def _affine(emit: Emitter, x: Tensor, factor: Tensor, term: Tensor) -> Tensor:
    """A factor and a term for each channel, in one pass over x."""
    zeros, ones = emit.zeros_like(factor), emit.ones_like(factor)
    return emit.op("BatchNormalization", x, factor, term, zeros, ones, epsilon=0.0)


def lp_normalization(step: Step) -> tuple[Tensor]:
    """For y = x / n, n a norm of x: dx = (dy - dn sum(dy y)) / n, dn = y (p = 2) or sign(x)."""
    emit, x, y = step.emit, step.x, step.y
    axis, order = step.attr("axis", -1) % emit.rank(x), step.attr("p", 2)
    norm = emit.reduce("ReduceL2" if order == 2 else "ReduceL1", x, [axis], keepdims=True)
    common = emit.reduce_sum(emit.mul(step.dy, y), [axis], keepdims=True)
    slope = y if order == 2 else emit.op("Sign", x)
    return (emit.div(emit.sub(step.dy, emit.mul(slope, common)), norm),)


def local_response_normalization(step: Step) -> tuple[Tensor]:
    """For y = x s^-b with s = k + a/n sum x^2 over n channels around one (Krizhevsky et al. 2012).

    dx = dy s^-b - 2 a b / n x sum(dy x s^(-b-1)), the sum over the channels around.
    """
    emit, x = step.emit, step.x
    count = step.attr("size")
    alpha, beta = step.attr("alpha", 1e-4), step.attr("beta", 0.75)
    total = _around(step, emit.square(x), count)
    inner = emit.shift(emit.scale(total, alpha / count), step.attr("bias", 1.0))
    falling = emit.op("Pow", inner, emit.scalar(-beta, x))
    passing = emit.mul(step.dy, falling)
    common = _around(step, emit.div(emit.mul(passing, x), inner), count, turned=True)
    return (emit.sub(passing, emit.mul(emit.scale(x, 2 * alpha * beta / count), common)),)


def _around(step: Step, tensor: Tensor, count: int, *, turned: bool = False) -> Tensor:
    """Sums over the channels around each channel, more of them behind it, or before if turned."""
    emit = step.emit
    before, behind = (count - 1) // 2, count // 2
    if turned:
        before, behind = behind, before
    channels = emit.size(tensor, 1)
    places = np.arange(channels)
    offsets = places[None, :] - places[:, None]  # row: the middle; column: the neighbour
    band = ((offsets >= -before) & (offsets <= behind)).astype(emit.dtype(tensor))
    matrix = emit.reshape(
        emit.constant(band), [channels, channels, *([1] * (emit.rank(tensor) - 2))]
    )
    return emit.op("Conv", tensor, matrix)


def _scaled(
    step: Step, hat: Tensor, inverse: Tensor, scale: Tensor, axes: Sequence[int], *, centered: bool
) -> list[Tensor | None]:
    """The gradients of x and scale in y = x^ scale + bias; `scale` broadcasts to x."""
    emit, dy = step.emit, step.dy
    result: list[Tensor | None] = [None, None]
    if step.wants(0):
        g = emit.mul(dy, scale)
        rest = emit.mul(hat, emit.reduce_mean(emit.mul(g, hat), axes, keepdims=True))
        if centered:
            rest = emit.add(rest, emit.reduce_mean(g, axes, keepdims=True))
        result[0] = emit.mul(emit.sub(g, rest), inverse)
    if step.wants(1):
        result[1] = emit.sum_to(emit.mul(dy, hat), scale)
    return result


def _last_axes(step: Step) -> list[int]:
    rank = step.emit.rank(step.x)
    return list(range(step.attr("axis", -1) % rank, rank))


def _all_but_channels(emit: Emitter, tensor: Tensor) -> list[int]:
    return [axis for axis in range(emit.rank(tensor)) if axis != 1]


def _for_channels(emit: Emitter, tensor: Tensor, like: Tensor) -> Tensor:
    """A number for each channel in a shape that broadcasts to (N, C, ...)."""
    return emit.reshape(tensor, [-1, *([1] * (emit.rank(like) - 2))])


def _inverse_root(step: Step, variance: Tensor) -> Tensor:
    emit = step.emit
    shifted = emit.shift(variance, step.attr("epsilon", 1e-5))
    return emit.op("Reciprocal", emit.op("Sqrt", shifted))


NORMALIZATION: dict[str, Rule] = {
    "BatchNormalization": batch_normalization,
    "InstanceNormalization": instance_normalization,
    "LRN": local_response_normalization,
    "LayerNormalization": layer_normalization,
    "LogSoftmax": log_softmax,
    "LpNormalization": lp_normalization,
    "RMSNormalization": rms_normalization,
    "Softmax": softmax,
}
