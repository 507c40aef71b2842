"""The whole objective: a loss on labels, a distance from a teacher, penalties of the weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from onnxslim_passes.errors import UsageError, unknown_name
from onnxslim_passes.evaluation.functions import is_function_spec
from onnxslim_passes.model import Variable
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.losses.base import Loss, total
from onnxslim_passes.training.losses.ctc import ctc
from onnxslim_passes.training.losses.distillation import distillation
from onnxslim_passes.training.losses.label_losses import bce, cosine, cross_entropy, l1, mse
from onnxslim_passes.training.losses.scores import Scores, find_scores
from onnxslim_passes.training.losses.user import user_loss
from onnxslim_passes.training.options import Objective, first_changed
from onnxslim_passes.training.shapes import Tensor

__all__ = [
    "LABEL_LOSSES",
    "LOSSES",
    "check_loss",
    "check_teacher_options",
    "emit_objective",
    "emit_penalty",
    "resolved_loss",
]

LabelLoss: TypeAlias = Callable[[Emitter, Scores, str, Objective], Loss]

LABEL_LOSSES: dict[str, LabelLoss] = {
    "cross-entropy": cross_entropy,
    "mse": mse,
    "l1": l1,
    "cosine": cosine,
    "bce": bce,
    "ctc": ctc,
}
LOSSES = ("auto", *LABEL_LOSSES, "distill")
_ON_CLASSES = frozenset(("cross-entropy", "ctc"))


def check_loss(objective: Objective, *, has_teacher: bool) -> None:
    """Sees that the loss exists and has what it needs.

    Raises:
        UnknownNameError: no such loss; with the nearest name.
        UsageError: distillation without a teacher; options that the loss does not read.
    """
    loss = objective.loss
    if loss not in LOSSES and not is_function_spec(loss):
        raise unknown_name("loss", loss, LOSSES)
    if loss == "distill" and not has_teacher:
        raise UsageError("loss=distill needs a teacher: the model before it was compressed.")
    if objective.distill_tensors and not has_teacher:
        raise UsageError("distill_tensors needs a teacher: the model before it was compressed.")
    if loss not in ("auto", "cross-entropy"):
        for option in ("soft_labels", "label_smoothing"):
            if getattr(objective, option):
                raise UsageError(f"{option} is for loss=cross-entropy, not for {loss}.")


def check_teacher_options(objective: Objective, *, has_teacher: bool) -> None:
    """Sees that no option about a teacher was given without one.

    Raises:
        UsageError: one was; it would not be read.
    """
    unread = first_changed(Objective, objective, ("distance", "temperature", "distill_weight"))
    if unread is not None and not has_teacher:
        raise UsageError(f"{unread} is about a teacher, and there is none.")


def resolved_loss(objective: Objective, labels: np.dtype[np.generic] | None) -> str:
    """The loss that "auto" stands for, given the element type of the labels (None without).

    Raises:
        UsageError: a loss on labels, and there are none.
    """
    if objective.loss == "auto":
        if labels is None:
            return "distill"
        return "cross-entropy" if labels.kind in "iu" or objective.soft_labels else "mse"
    if labels is None and objective.loss in LABEL_LOSSES:
        raise UsageError(
            f"loss={objective.loss} needs labels; add an array 'labels' to the data, or give a "
            "teacher and loss=distill."
        )
    return objective.loss


def emit_objective(
    emit: Emitter,
    output: Tensor,
    teacher: Mapping[str, Tensor] | None,
    objective: Objective,
    labels: str,
) -> Loss:
    """The loss of a batch, without penalties.

    With a teacher and a loss on labels it is ``(1 - w) loss + w distance``, w being
    `distill_weight`.

    Args:
        emit: the graph with the student, and the teacher if there is one.
        output: what the loss is on.
        teacher: the teacher's tensors by their names, or None.
        objective: options; the loss is not "auto".
        labels: name for the input that takes the labels.
    """
    scores = find_scores(emit, output)
    on_labels = None
    if is_function_spec(objective.loss):
        on_labels = user_loss(emit, objective.loss, labels)
    elif objective.loss != "distill":
        on_labels = LABEL_LOSSES[objective.loss](emit, scores, labels, objective)
    if teacher is None:
        assert on_labels is not None  # see check_loss
        return on_labels
    distance = _distance(emit, scores, teacher, objective)
    if on_labels is None:
        return distance
    return _mixed(emit, on_labels, distance, objective.distill_weight)


def _distance(
    emit: Emitter, scores: Scores, teacher: Mapping[str, Tensor], objective: Objective
) -> Loss:
    mine = {str(t.name): t for node in emit.graph.nodes for t in node.outputs}
    inner = {}
    for name in objective.distill_tensors:
        if name not in mine or name not in teacher:
            both = sorted(set(mine) & set(teacher))
            raise unknown_name("tensor of student and teacher in `distill_tensors`:", name, both)
        inner[name] = (mine[name], teacher[name])
    name = str(scores.output.name)
    if name not in teacher:
        raise unknown_name("tensor of the teacher:", name, teacher)
    other = find_scores(emit, teacher[name])
    if other.kind != scores.kind:
        other, scores = (
            Scores(other.output, other.output, "logits"),
            Scores(scores.output, scores.output, "logits"),
        )
    on_classes = objective.loss in _ON_CLASSES
    return distillation(emit, scores, other, inner, objective, on_classes=on_classes)


def _mixed(emit: Emitter, on_labels: Loss, distance: Loss, weight: float) -> Loss:
    def mixed(one: Variable, other: Variable) -> Variable:
        return emit.add(emit.scale(one, 1 - weight), emit.scale(other, weight))

    return Loss(
        mixed(on_labels.value, distance.value),
        mixed(on_labels.slope, distance.slope),
        on_labels.metric,
        on_labels.labels,
        (*on_labels.decisions, *distance.decisions),
    )


def emit_penalty(emit: Emitter, weights: Sequence[Tensor], objective: Objective) -> Variable | None:
    """``l1 sum |w| + l2 / 2 sum w^2`` over some weights, rank 0; None if both are 0."""
    parts = []
    for weight in weights:
        if objective.l1:
            magnitudes = total(emit, emit.op("Abs", weight))
            parts.append(emit.scale(magnitudes, objective.l1))
        if objective.l2:
            squares = total(emit, emit.square(weight))
            parts.append(emit.scale(squares, objective.l2 / 2))
    if not parts:
        return None
    return emit.op("Sum", *parts)
