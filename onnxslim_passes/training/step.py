"""The backward half: gradients, optimizer, constraints, and the graphs as they are saved."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Model, Variable
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.forward import Forward, free_name, lift_constants
from onnxslim_passes.training.gradients import Gradients, gradients
from onnxslim_passes.training.layout import MetricSpec, Role, StateSpec
from onnxslim_passes.training.losses import LabelSpec
from onnxslim_passes.training.optimizers import ACCUMULATED, clipped, make_optimizer
from onnxslim_passes.training.options import Parameters, Update
from onnxslim_passes.training.parameters import Array, Constraint
from onnxslim_passes.training.shapes import Tensor

__all__ = ["LOSS", "METRIC", "StepGraph", "build_evaluation", "build_gradients", "build_step"]

LOSS, METRIC = "loss", "metric"
NEXT, GRADIENT = "next/", "gradient/"


@dataclass(frozen=True)
class StepGraph:
    """The training graph and what it takes.

    Attributes:
        model: the graph.
        specs: its state, in the order of its inputs.
        state: what training begins with.
        rate: name of the learning rate's input.
        count: name of the step's input.
        labels: what the labels must be, or None.
        metric: the number beside the loss.
        decisions: what was decided on the way.
    """

    model: Model
    specs: tuple[StateSpec, ...]
    state: dict[str, Array]
    rate: str
    count: str
    labels: LabelSpec | None
    metric: MetricSpec
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class _Entry:
    """One tensor of the state.

    Attributes:
        tensor: the graph input.
        values: what training begins with.
        role: what it is.
        weight: the weight it belongs to, with the path of its body.
        decays: whether weight decay acts on it.
    """

    tensor: Variable
    values: Array
    role: Role
    weight: str
    decays: bool = False


@dataclass
class _State:
    """The state of a graph under construction.

    Attributes:
        entries: the tensors, in the order of inputs.
        next: their values after the step; of those that change.
    """

    entries: list[_Entry] = field(default_factory=list)
    next: dict[Variable, Tensor] = field(default_factory=dict)

    def trainable(self) -> list[_Entry]:
        """What the optimizer may move."""
        return [entry for entry in self.entries if entry.role == "trainable"]


def build_step(
    forward: Forward, constraints: Sequence[Constraint], update: Update, parameters: Parameters
) -> StepGraph:
    """Adds gradients, optimizer and projections to a forward half.

    Raises:
        UnsupportedModelError: the loss depends on no weight.
        DifferentiationError: nodes on the way have no gradient; all are named.
    """
    emit = forward.emit
    assert forward.step is not None  # the training half has one
    rate = emit.input(free_name(emit, "learning_rate"), np.float32, ())
    state = _State(list(_constrained(forward, constraints)))
    found = _derivatives(forward, state, parameters)
    moving = [entry for entry in state.trainable() if entry.tensor in found.connected]
    with emit.scope("optimizer"):
        _move(emit, state, moving, found, update, rate, forward.step)
    with emit.scope("projection"):
        _project(forward, constraints, state)
    if update.accumulation > 1:
        with emit.scope("accumulation"):
            _hold_back(emit, state, forward.step, update.accumulation)
    _declare_loss(forward, with_penalty=True)
    _carry_statistics(forward, state)
    _declare_next(emit, state)
    emit.model.remove_unused()
    _lift(emit, state)
    measure = forward.loss.metric
    return StepGraph(
        model=emit.model,
        specs=tuple(_spec(entry, state) for entry in state.entries),
        state={str(entry.tensor.name): entry.values for entry in state.entries},
        rate=str(rate.name),
        count=str(forward.step.name),
        labels=forward.loss.labels,
        metric=MetricSpec(measure.name, METRIC, measure.higher_is_better),
        decisions=(*forward.decisions, *found.decisions, *_unreached(state, found)),
    )


def build_evaluation(forward: Forward) -> Model:
    """The graph of loss and metric alone; it takes the state by the same names."""
    _declare_loss(forward, with_penalty=False)
    lift_constants(forward.emit)
    forward.emit.model.remove_unused()
    return forward.emit.model


def build_gradients(
    forward: Forward, constraints: Sequence[Constraint], parameters: Parameters
) -> Model:
    """The graph of loss, metric, and the derivative of the loss by each trainable tensor."""
    state = _State(list(_constrained(forward, constraints)))
    found = _derivatives(forward, state, parameters)
    _declare_loss(forward, with_penalty=True)
    for entry in state.trainable():
        if entry.tensor in found.connected:
            forward.emit.output(found[entry.tensor], f"{GRADIENT}{entry.tensor.name}")
    lift_constants(forward.emit)
    forward.emit.model.remove_unused()
    return forward.emit.model


# ---------------- the parts of a step


def _constrained(forward: Forward, constraints: Sequence[Constraint]) -> Iterator[_Entry]:
    """The tensors by which constraints hold the weights."""
    for constraint, tensors in zip(constraints, forward.tensors, strict=True):
        for key, values in constraint.trainable().items():
            decays = key in constraint.decays
            yield _Entry(tensors[key], values, "trainable", constraint.where, decays)
        for key, values in constraint.buffers().items():
            yield _Entry(tensors[key], values, "buffer", constraint.where)


def _derivatives(forward: Forward, state: _State, parameters: Parameters) -> Gradients:
    """The derivatives of loss and penalties by all trainable tensors."""
    emit, slope = forward.emit, forward.loss.slope
    if forward.penalty is not None:
        slope = emit.add(slope, forward.penalty)
    wanted = [entry.tensor for entry in state.trainable()]
    found = gradients(emit, slope, wanted, freeze_unsupported=parameters.freeze_unsupported)
    if not found.connected:
        names = ", ".join(repr(entry.weight) for entry in state.trainable()[:3])
        raise UnsupportedModelError(
            f"The loss depends on none of the weights that could be trained ({names}): nothing "
            "with a gradient lies between. Name another tensor with output (--output)."
        )
    return found


def _move(
    emit: Emitter,
    state: _State,
    moving: Sequence[_Entry],
    found: Gradients,
    update: Update,
    rate: Tensor,
    step: Variable,
) -> None:
    """What the optimizer makes of each trainable tensor, and its own tensors."""
    optimizer = make_optimizer(emit, update, rate, _optimizer_step(emit, step, update))
    slopes = [found[entry.tensor] for entry in moving]
    if update.accumulation > 1:
        slopes = [
            _accumulated(emit, state, entry, slope, update.accumulation)
            for entry, slope in zip(moving, slopes, strict=True)
        ]
    if update.clip_norm is not None:
        slopes = list(clipped(emit, slopes, update.clip_norm))
    for entry, slope in zip(moving, slopes, strict=True):
        slots = {name: _slot(emit, state, entry, name) for name in optimizer.slots}
        moved = optimizer.move(entry.tensor, slope, slots, decays=entry.decays)
        state.next[entry.tensor] = moved.value
        state.next.update({slots[name]: value for name, value in moved.slots.items()})


def _optimizer_step(emit: Emitter, step: Variable, update: Update) -> Tensor:
    if update.accumulation == 1:
        return step
    return emit.op("Div", step, emit.constant(np.array(update.accumulation, np.int64)))


def _accumulated(
    emit: Emitter, state: _State, entry: _Entry, slope: Tensor, count: int
) -> Variable:
    """The mean gradient of the batches since the weights last moved."""
    slot = _slot(emit, state, entry, ACCUMULATED)
    together = emit.add(slot, emit.scale(slope, 1 / count))
    state.next[slot] = together
    return together


def _slot(emit: Emitter, state: _State, entry: _Entry, name: str) -> Variable:
    """A tensor of the optimizer's own that goes with a trainable one, 0 at first."""
    made = emit.input(
        free_name(emit, f"{entry.tensor.name}/{name}"), np.float32, entry.values.shape
    )
    state.entries.append(
        _Entry(made, np.zeros(entry.values.shape, np.float32), "slot", entry.weight)
    )
    return made


def _project(forward: Forward, constraints: Sequence[Constraint], state: _State) -> None:
    """Brings what moved back onto the constraints."""
    for constraint, tensors in zip(constraints, forward.tensors, strict=True):
        if not any(tensors[key] in state.next for key in constraint.trainable()):
            continue
        after = {}
        for key, tensor in tensors.items():
            value = state.next.get(tensor, tensor)
            assert isinstance(value, Variable)  # inputs, and what nodes made of them
            after[key] = value
        for key, value in constraint.emit_projection(forward.emit, after).items():
            state.next[tensors[key]] = value


def _hold_back(emit: Emitter, state: _State, step: Variable, count: int) -> None:
    """Lets all but the accumulated gradients move at every `count`-th step only."""
    place = emit.op("Mod", step, emit.constant(np.array(count, np.int64)))
    is_last = emit.op("Equal", place, emit.constant(np.array(count - 1, np.int64)))
    for tensor, value in state.next.items():
        if str(tensor.name).endswith(f"/{ACCUMULATED}"):
            state.next[tensor] = emit.where(is_last, emit.zeros_like(value), value)
        else:
            state.next[tensor] = emit.where(is_last, value, tensor)


def _carry_statistics(forward: Forward, state: _State) -> None:
    """Makes running statistics of normalization a part of the state."""
    emit = forward.emit
    for moment in forward.running:
        values, where = np.array(moment.weight.values), moment.weight.where
        entry = _Entry(emit.promote(moment.weight), values, "running", where)
        state.entries.append(entry)
        state.next[entry.tensor] = moment.next
        emit.graph.outputs = [tensor for tensor in emit.graph.outputs if tensor is not moment.next]


def _lift(emit: Emitter, state: _State) -> None:
    """Turns what is left of the weights into inputs that do not change."""
    for frozen in lift_constants(emit):
        where = "" if frozen.is_teacher else str(frozen.input.name)
        state.entries.append(_Entry(frozen.input, frozen.values, "frozen", where))


def _declare_loss(forward: Forward, *, with_penalty: bool) -> None:
    emit, value = forward.emit, forward.loss.value
    if with_penalty and forward.penalty is not None:
        value = emit.add(value, forward.penalty)
    emit.output(value, LOSS)
    emit.output(forward.loss.metric.value, METRIC)


def _declare_next(emit: Emitter, state: _State) -> None:
    for entry in state.entries:
        if entry.tensor in state.next:
            emit.output(state.next[entry.tensor], f"{NEXT}{entry.tensor.name}")


def _spec(entry: _Entry, state: _State) -> StateSpec:
    name = str(entry.tensor.name)
    output = f"{NEXT}{name}" if entry.tensor in state.next else None
    return StateSpec(
        name, output, entry.values.dtype.name, entry.values.shape, entry.role, entry.weight
    )


def _unreached(state: _State, found: Gradients) -> Iterator[Decision]:
    for entry in state.trainable():
        if entry.tensor not in found.connected:
            reason = "stays as it is: no gradient from the loss reaches it"
            yield Decision(where=entry.weight, taken=False, reason=reason)
