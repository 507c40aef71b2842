"""A training program: graphs that train a model, the state they begin with, and the way back.

`build` makes three graphs of `ai.onnx` operators. `training` takes a batch and the state and gives
loss, metric and the next state; `evaluation` gives loss and metric only; `gradients` gives the
derivative of the loss by each trainable tensor, for optimizers of another kind. None holds weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.evaluation.functions import is_function_spec
from onnxslim_passes.model import Model
from onnxslim_passes.model.exporting import captured_inputs
from onnxslim_passes.model.patterns import check_patterns
from onnxslim_passes.report.provenance import source_sha256, versions
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.classical import expand_scalers
from onnxslim_passes.training.constraints import read_constraints
from onnxslim_passes.training.forward import Forward, build_forward, dropout_ratios
from onnxslim_passes.training.layout import Layout, TensorSpec
from onnxslim_passes.training.losses import check_loss, find_output
from onnxslim_passes.training.lowering import Lowered, lower
from onnxslim_passes.training.naming import constants_by_name, with_unique_names
from onnxslim_passes.training.options import Objective, Parameters, Update
from onnxslim_passes.training.parameters import Array, Constraint, Free, objection
from onnxslim_passes.training.shapes import Tensor
from onnxslim_passes.training.sizes import Sizes, fix_sizes
from onnxslim_passes.training.step import (
    LOSS,
    StepGraph,
    build_evaluation,
    build_gradients,
    build_step,
)

__all__ = [
    "Holding",
    "TrainingProgram",
    "build",
    "find_constraints",
    "has_integer_weights",
    "nothing_to_train",
]

Holding: TypeAlias = Callable[[list[Constraint]], list[Constraint]]

_FEW = 256


@dataclass(frozen=True)
class TrainingProgram:
    """Everything that training needs.

    Attributes:
        training: one step.
        evaluation: loss and metric.
        gradients: loss, metric and derivatives; None unless asked for.
        state: what training begins with, by the names in `layout`.
        layout: what maps where.
        constraints: how each weight is held, for the way back.
        decisions: one for every weight, and what was done to the graph.
    """

    training: Model
    evaluation: Model
    gradients: Model | None
    state: dict[str, Array]
    layout: Layout
    constraints: tuple[Constraint, ...]
    decisions: tuple[Decision, ...]


def build(
    model: Model,
    *,
    objective: Objective,
    update: Update,
    parameters: Parameters,
    teacher: Model | None = None,
    fixed_inputs: Mapping[str, Array] | None = None,
    sizes: Sizes | None = None,
    seed: int = 0,
    with_gradients: bool = False,
    hold: Holding | None = None,
) -> TrainingProgram:
    """Makes the training program of a model.

    Args:
        model: stays as it is.
        objective: the loss; not "auto".
        update: the optimizer.
        parameters: which weights move.
        teacher: for distillation; has the inputs of `model`.
        fixed_inputs: inputs that have one value in all of training, and are built in.
        sizes: of axes that are free in the model, and have one size in all of training.
        seed: of dropout.
        with_gradients: whether to make the third graph.
        hold: gives the constraints to use in place of those that were read from the model.

    Raises:
        UnknownNameError: a pattern, loss or tensor that does not exist; with the nearest name.
        UnsupportedModelError: there is no weight to train, or none that the loss depends on.
        DifferentiationError: nodes on the way have no gradient; all are named.
    """
    check_loss(objective, has_teacher=teacher is not None)
    check_patterns(model, {"include": parameters.include, "exclude": parameters.exclude})
    named = with_unique_names(model)
    fixed = fix_sizes(named, sizes or {})
    lowered = _lowered(named, fixed_inputs, parameters.batch_norm)
    constraints, decisions = _constraints(model, named, lowered, parameters)
    if hold is not None:
        constraints = hold(constraints)
    constraints, unused = _needed(constraints, lowered, objective)
    if not constraints:
        raise UnsupportedModelError(nothing_to_train(model, decisions))
    taught = _lowered_teacher(teacher, lowered, fixed_inputs, sizes or {})
    ratios = dropout_ratios(lowered, constraints) if parameters.dropout else {}

    def forward(copy: Lowered, dropout: Mapping[str, float] | None) -> Forward:
        return build_forward(copy, taught, constraints, objective, dropout=dropout, seed=seed)

    step = build_step(forward(lowered, ratios), constraints, update, parameters)
    still = lowered
    if parameters.batch_norm != "frozen":
        still = _lowered(named, fixed_inputs, "frozen")
    layout = _layout(model, step, constraints, fixed_inputs or {})
    return TrainingProgram(
        training=step.model,
        evaluation=build_evaluation(forward(still, None)),
        gradients=(
            build_gradients(forward(lowered, ratios), constraints, parameters)
            if with_gradients
            else None
        ),
        state=step.state,
        layout=replace(
            layout,
            options={
                "objective": asdict(objective),
                "update": asdict(update),
                "parameters": asdict(parameters),
            },
            teacher_sha256=source_sha256(teacher) if teacher is not None else "",
            seed=seed,
        ),
        constraints=tuple(constraints),
        decisions=(*fixed, *lowered.decisions, *decisions, *unused, *step.decisions),
    )


def _layout(
    model: Model,
    step: StepGraph,
    constraints: Sequence[Constraint],
    fixed_inputs: Mapping[str, Array],
) -> Layout:
    """What maps where; options, teacher and seed are left to the caller."""
    return Layout(
        inputs=_data_inputs(step.model, model),
        labels=step.labels,
        learning_rate=step.rate,
        step=step.count,
        loss=LOSS,
        metric=step.metric,
        state=step.specs,
        weights=tuple(_weight_table(constraint) for constraint in constraints),
        options={},
        fixed_inputs={name: np.asarray(value).tolist() for name, value in fixed_inputs.items()},
        source=model.path.name if model.path else "",
        source_sha256=source_sha256(model),
        versions=versions(),
    )


def _lowered(
    model: Model, fixed_inputs: Mapping[str, Array] | None, batch_norm: Literal["frozen", "batch"]
) -> Lowered:
    lowered = lower(model, fixed_inputs=fixed_inputs, batch_norm=batch_norm)
    decisions = expand_scalers(lowered.model)
    return replace(lowered, decisions=(*lowered.decisions, *decisions))


def find_constraints(
    model: Model,
    parameters: Parameters,
    *,
    fixed_inputs: Mapping[str, Array] | None = None,
    sizes: Sizes | None = None,
) -> tuple[list[Constraint], list[Decision]]:
    """How each weight of a model is held while it is trained; see `build`."""
    named = with_unique_names(model)
    fix_sizes(named, sizes or {})
    lowered = _lowered(named, fixed_inputs, parameters.batch_norm)
    return _constraints(model, named, lowered, parameters)


def _constraints(
    model: Model, named: Model, lowered: Lowered, parameters: Parameters
) -> tuple[list[Constraint], list[Decision]]:
    """How each weight is held, and why those that are not trained are not."""
    places = {name: constant.where for name, constant in constants_by_name(model).items()}
    constraints, decisions = read_constraints(named, lowered, parameters, places)
    covered = {name for constraint in constraints for name in constraint.covers}
    copied = {str(constant.name) for constant in lowered.model.constants()}
    for weight in named.weights():
        if weight.name in covered:
            continue
        reason = objection(weight, parameters)
        if reason is None and weight.name not in copied:
            reason = "is not in the training copy: the branch that holds it is not taken"
        if reason is None:
            is_matrix = weight.role in ("weight", "recurrent", "embedding")
            constraints.append(Free(weight.constant, places[weight.name], is_matrix))
        else:
            decisions.append(Decision(where=places[weight.name], taken=False, reason=reason))
    return constraints, decisions


def _needed(
    constraints: Sequence[Constraint], lowered: Lowered, objective: Objective
) -> tuple[list[Constraint], list[Decision]]:
    """The constraints of weights that the loss may depend on, and why the others are not moved."""
    if is_function_spec(objective.loss):
        return list(constraints), []
    graph = lowered.model.graph
    pending: list[Tensor] = [find_output(graph, objective.output)]
    names = set()
    while pending:
        tensor = pending.pop()
        if str(tensor.name) not in names:
            names.add(str(tensor.name))
            pending += [taken for node in tensor.inputs for taken in captured_inputs(node)]
    kept = [c for c in constraints if names.intersection(c.replaces)]
    reason = "stays as it is: no gradient from the loss reaches it"
    left = [constraint for constraint in constraints if constraint not in kept]
    return kept, [Decision(where=c.where, taken=False, reason=reason) for c in left]


def has_integer_weights(model: Model) -> bool:
    """Whether it holds tensors of integers that are too many for shapes and indices."""
    return any(c.dtype.kind in "iu" and c.size > _FEW for c in model.constants())


def nothing_to_train(model: Model, decisions: Sequence[Decision]) -> str:
    """Why no weight can be trained, for messages."""
    if has_integer_weights(model):
        return (
            "There is no weight to train: its weights are integers. Tune the model that it was "
            "quantized from."
        )
    if not decisions:
        return "There is no weight to train: it has no floating-point weights."
    listed = "; ".join(f"{decision.where!r} {decision.reason}" for decision in decisions[:3])
    return f"There is no weight to train: {listed}. See include and exclude."


def _lowered_teacher(
    teacher: Model | None,
    student: Lowered,
    fixed_inputs: Mapping[str, Array] | None,
    sizes: Sizes,
) -> Lowered | None:
    if teacher is None:
        return None
    known = {str(tensor.name) for tensor in teacher.graph.inputs}
    fixed = {name: value for name, value in (fixed_inputs or {}).items() if name in known}
    sized = teacher.copy()
    fix_sizes(sized, {name: axes for name, axes in sizes.items() if name in known})
    lowered = _lowered(sized, fixed, "frozen")
    given = {str(tensor.name) for tensor in student.model.graph.inputs}
    for tensor in lowered.model.graph.inputs:
        if str(tensor.name) not in given:
            raise UnsupportedModelError(
                f"The teacher takes an input {tensor.name!r} that the model does not have; a "
                "teacher has the inputs of its student."
            )
    return lowered


def _data_inputs(training: Model, model: Model) -> tuple[TensorSpec, ...]:
    """The inputs of the model that the training graph takes."""
    own = {str(tensor.name) for tensor in model.graph.inputs}
    return tuple(
        TensorSpec(
            str(t.name),
            str(t.dtype),
            tuple(_size(size, axis) for axis, size in enumerate(t.shape or ())),
        )
        for t in training.graph.inputs
        if str(t.name) in own
    )


def _size(size: int | str | None, axis: int) -> int | str:
    free = size is None or (isinstance(size, int) and size < 0)
    return f"axis_{axis}" if free or size is None else size


def _weight_table(constraint: Constraint) -> dict[str, Any]:
    return {
        "weight": constraint.where,
        "constraint": constraint.kind,
        "trainable": list(constraint.trainable()),
        "buffers": list(constraint.buffers()),
        **constraint.table(),
    }
