"""The distance from a teacher, which needs no labels.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
Letters: s the student's tensor, t the teacher's, T the temperature.
"""

from collections.abc import Mapping

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Variable
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.losses.base import Loss, Measure, mean, total
from onnxslim_passes.training.losses.label_losses import cosine_distance, log_probabilities
from onnxslim_passes.training.losses.scores import Scores, class_axis
from onnxslim_passes.training.options import Objective
from onnxslim_passes.training.shapes import Tensor

__all__ = ["distillation", "relative_error"]

# Keeps an all-zero teacher from dividing by zero.
_TINY = 1e-12


def distillation(
    emit: Emitter,
    student: Scores,
    teacher: Scores,
    inner: Mapping[str, tuple[Tensor, Tensor]],
    options: Objective,
    *,
    on_classes: bool,
) -> Loss:
    """The distance of two outputs, and the relative errors of chosen inner tensors.

    Args:
        emit: the graph that holds both models.
        student: its output.
        teacher: the same output of the teacher.
        inner: pairs (student's, teacher's) by name.
        options: temperature, distance and weights.
        on_classes: the label loss beside it is one on classes, so that the output is, too.
    """
    _check_alike(emit, str(student.output.name), student.tensor, teacher.tensor)
    kind = _distance(student, options, on_classes=on_classes)
    value = _emit_distance(emit, kind, student, teacher, options)
    decisions = [
        *student.decisions,
        Decision(
            where=str(student.output.name),
            taken=True,
            reason=f"is held against the teacher's by {_WORDS[kind]}",
        ),
    ]
    slope = value
    for name, (mine, other) in inner.items():
        _check_alike(emit, name, mine, other)
        error = relative_error(emit, mine, other)
        slope = emit.add(slope, emit.scale(error, options.distill_tensors_weight))
        reason = "is held against the teacher's by relative squared error"
        decisions.append(Decision(where=name, taken=True, reason=reason))
    return Loss(slope, slope, Measure("distance", value, False), None, tuple(decisions))


_WORDS = {
    "kl": "the divergence of the class probabilities",
    "binary": "the divergence of the two probabilities of each element",
    "mse": "relative squared error",
    "cosine": "the cosine along the last axis",
}


def _distance(student: Scores, options: Objective, *, on_classes: bool) -> str:
    wanted = options.distance
    if wanted == "auto":
        wanted = "kl" if on_classes or student.kind != "logits" else "mse"
    return "binary" if wanted == "kl" and student.kind == "sigmoid" else wanted


def _emit_distance(
    emit: Emitter, kind: str, student: Scores, teacher: Scores, options: Objective
) -> Variable:
    if kind == "kl":
        axis = class_axis(emit, student, options.class_axis)
        return _divergence(emit, student.tensor, teacher.tensor, axis, options.temperature)
    if kind == "binary":
        return _binary_divergence(emit, student.tensor, teacher.tensor, options.temperature)
    if kind == "cosine":
        return cosine_distance(emit, student.output, teacher.output)
    return relative_error(emit, student.output, teacher.output)


def _divergence(emit: Emitter, s: Tensor, t: Tensor, axis: int, temperature: float) -> Variable:
    """``T^2 mean KL(softmax(t / T) || softmax(s / T))``; T^2 keeps gradients of one size."""
    log_s = log_probabilities(emit, emit.scale(s, 1 / temperature), axis)
    log_t = log_probabilities(emit, emit.scale(t, 1 / temperature), axis)
    parts = emit.mul(emit.op("Exp", log_t), emit.sub(log_t, log_s))
    return mean(emit, emit.scale(emit.reduce_sum(parts, [axis]), temperature**2))


def _binary_divergence(emit: Emitter, s: Tensor, t: Tensor, temperature: float) -> Variable:
    """As `_divergence` for two classes, of which x is the logit of one.

    ``KL = softplus(s) - softplus(t) - sigmoid(t) (s - t)``, all over T.
    """
    s, t = emit.scale(s, 1 / temperature), emit.scale(t, 1 / temperature)
    softplus = emit.sub(emit.op("Softplus", s), emit.op("Softplus", t))
    parts = emit.sub(softplus, emit.mul(emit.op("Sigmoid", t), emit.sub(s, t)))
    return mean(emit, emit.scale(parts, temperature**2))


def relative_error(emit: Emitter, s: Tensor, t: Tensor) -> Variable:
    """``sum (s - t)^2 / sum t^2``: 0.01 is an SQNR of 20 dB."""
    error = total(emit, emit.square(emit.sub(s, t)))
    power = total(emit, emit.square(t))
    return emit.div(error, emit.add(power, emit.scalar(_TINY, power)))


def _check_alike(emit: Emitter, name: str, s: Tensor, t: Tensor) -> None:
    mine, other = emit.shape(s), emit.shape(t)
    pairs = zip(mine, other, strict=False)
    differ = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
    if len(mine) != len(other) or differ:
        raise UnsupportedModelError(
            f"{name!r} has shape {mine} in the student and {other} in the teacher; expected the "
            "same. Is the teacher the model that this one was made from?"
        )
