"""What is made smaller, as nodes of the training graph: losses, distillation, penalties."""

from onnxslim_passes.training.losses.base import LabelSpec, Loss, Measure
from onnxslim_passes.training.losses.objective import (
    LABEL_LOSSES,
    LOSSES,
    check_loss,
    check_teacher_options,
    emit_objective,
    emit_penalty,
    resolved_loss,
)
from onnxslim_passes.training.losses.scores import find_output

__all__ = [
    "LABEL_LOSSES",
    "LOSSES",
    "LabelSpec",
    "Loss",
    "Measure",
    "check_loss",
    "check_teacher_options",
    "emit_objective",
    "emit_penalty",
    "find_output",
    "resolved_loss",
]
