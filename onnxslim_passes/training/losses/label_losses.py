"""Losses that hold the output against labels; each is a mean over the batch.

Letters: x the output (or its logits), y the label, C the number of classes, K the positions that
are averaged over (samples, and pixels or tokens of each).
"""

import numpy as np

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Variable
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.losses.base import LabelSpec, Loss, Measure, mean, without_axis
from onnxslim_passes.training.losses.scores import Scores, class_axis
from onnxslim_passes.training.options import Objective
from onnxslim_passes.training.shapes import Tensor

__all__ = ["bce", "cosine", "cosine_distance", "cross_entropy", "l1", "log_probabilities", "mse"]

# Keeps the norm of an all-zero row from dividing by zero; far below any real one.
_TINY_NORM = 1e-12


def cross_entropy(emit: Emitter, scores: Scores, labels: str, options: Objective) -> Loss:
    """Softmax cross-entropy, ``-1/K sum log softmax(x)[y]``, computed from logits.

    Labels are class numbers, int64, in the shape of the output without its class axis; or, with
    `soft_labels`, float32 probabilities in the shape of the output. Label smoothing e puts
    ``(1 - e) y + e / C`` in place of each (Szegedy et al. 2016, section 7).
    """
    axis = class_axis(emit, scores, options.class_axis)
    shape = emit.shape(scores.tensor)
    logp = log_probabilities(emit, emit.cast(scores.tensor, np.float32), axis)
    best = emit.op("ArgMax", scores.tensor, axis=axis, keepdims=0)
    if options.soft_labels:
        spec = LabelSpec(labels, "float32", shape, None, "a probability for each class")
        given = emit.input(labels, np.float32, shape)
        loss = emit.neg(emit.reduce_sum(emit.mul(given, logp), [axis]))
        wanted: Tensor = emit.op("ArgMax", given, axis=axis, keepdims=0)
    else:
        classes = shape[axis] if isinstance(shape[axis], int) else None
        kept = without_axis(shape, axis)
        spec = LabelSpec(labels, "int64", kept, int(classes) if classes else None, "class numbers")
        wanted = given = emit.input(labels, np.int64, kept)
        # A product with 0 and 1: its gradient is a product too, that of GatherElements a scatter.
        picked = emit.mul(_one_hot(emit, given, logp, axis), logp)
        loss = emit.neg(emit.reduce_sum(picked, [axis]))
    if options.label_smoothing:
        spread = emit.neg(emit.reduce_mean(logp, [axis]))
        kept_share = emit.scale(loss, 1 - options.label_smoothing)
        loss = emit.add(kept_share, emit.scale(spread, options.label_smoothing))
    value = mean(emit, loss)
    metric = Measure("top1", _percent_equal(emit, best, wanted), True)
    return Loss(value, value, metric, spec, scores.decisions)


def log_probabilities(emit: Emitter, logits: Tensor, axis: int) -> Variable:
    """Logarithms of the class probabilities."""
    return emit.op("LogSoftmax", logits, axis=axis)


def _one_hot(emit: Emitter, labels: Tensor, like: Tensor, axis: int) -> Variable:
    """1 at the label of each position, else 0."""
    classes = emit.op("Gather", emit.shape_of(like), emit.constant(np.array(axis)))
    values = emit.constant(np.array([0, 1], emit.dtype(like)))
    return emit.op("OneHot", labels, classes, values, axis=axis)


def _percent_equal(emit: Emitter, found: Tensor, wanted: Tensor) -> Variable:
    equal = emit.cast(emit.op("Equal", found, wanted), np.float32)
    return mean(emit, emit.scale(equal, 100.0))


def bce(emit: Emitter, scores: Scores, labels: str, options: Objective) -> Loss:
    """Binary cross-entropy of logits, ``1/K sum softplus(x) - x y``.

    Labels are float32 in [0, 1], in the shape of the output.
    """
    decisions = list(scores.decisions)
    if scores.kind == "softmax":
        raise UnsupportedModelError(
            f"bce: {scores.output.name!r} ends in a Softmax, whose classes exclude each other; use "
            "loss=cross-entropy."
        )
    if scores.kind == "logits":
        reason = "has no final Sigmoid, so that bce takes its values for logits"
        decisions.append(Decision(where=str(scores.output.name), taken=True, reason=reason))
    shape = emit.shape(scores.tensor)
    spec = LabelSpec(labels, "float32", shape, None, "a probability for each output")
    given = emit.input(labels, np.float32, shape)
    x = scores.tensor
    wanted = emit.cast_like(given, x)
    value = mean(emit, emit.sub(emit.op("Softplus", x), emit.mul(x, wanted)))
    found = emit.op("Greater", x, emit.scalar(0.0, x))
    right = emit.op("Equal", found, emit.op("Greater", given, emit.scalar(0.5, given)))
    metric = mean(emit, emit.scale(emit.cast(right, np.float32), 100.0))
    return Loss(value, value, Measure("accuracy", metric, True), spec, tuple(decisions))


def mse(emit: Emitter, scores: Scores, labels: str, options: Objective) -> Loss:
    """Mean squared error, ``1/K sum (x - y)^2``; labels float32 in the shape of the output."""
    difference, spec = _difference(emit, scores, labels)
    value = mean(emit, emit.square(difference))
    return Loss(value, value, Measure("mse", value, False), spec)


def l1(emit: Emitter, scores: Scores, labels: str, options: Objective) -> Loss:
    """Mean absolute error, ``1/K sum |x - y|``; labels float32 in the shape of the output."""
    difference, spec = _difference(emit, scores, labels)
    value = mean(emit, emit.op("Abs", difference))
    return Loss(value, value, Measure("mae", value, False), spec)


def cosine(emit: Emitter, scores: Scores, labels: str, options: Objective) -> Loss:
    """One minus the cosine of output and label along the last axis, averaged over the others."""
    x = scores.output
    shape = emit.shape(x)
    if not shape:
        raise UnsupportedModelError(f"cosine: {x.name!r} is a single number and has no direction.")
    given = emit.input(labels, np.float32, shape)
    value = cosine_distance(emit, x, emit.cast_like(given, x))
    metric = emit.sub(emit.scalar(1.0, value), value)
    spec = LabelSpec(labels, "float32", shape, None, "a number for each output")
    return Loss(value, value, Measure("cosine", metric, True), spec)


def cosine_distance(emit: Emitter, x: Tensor, y: Tensor) -> Variable:
    """The mean of ``1 - cos(x, y)`` along the last axis, rank 0."""
    last = [emit.rank(x) - 1]
    product = emit.reduce_sum(emit.mul(x, y), last)
    squares = emit.mul(emit.reduce_sum(emit.square(x), last), emit.reduce_sum(emit.square(y), last))
    norms = emit.op("Sqrt", emit.add(squares, emit.scalar(_TINY_NORM, x)))
    cosines = emit.div(product, norms)
    return mean(emit, emit.sub(emit.scalar(1.0, cosines), cosines))


def _difference(emit: Emitter, scores: Scores, labels: str) -> tuple[Variable, LabelSpec]:
    x = scores.output
    shape = emit.shape(x)
    given = emit.input(labels, np.float32, shape)
    spec = LabelSpec(labels, "float32", shape, None, "a number for each output")
    return emit.sub(x, emit.cast_like(given, x)), spec
