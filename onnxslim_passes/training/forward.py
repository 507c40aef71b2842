"""The forward half of a training graph: network, teacher and objective, with weights as inputs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim_passes.evaluation.functions import is_function_spec
from onnxslim_passes.model import Constant, Model, Node, Variable
from onnxslim_passes.model.merging import merge
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.absorbing import absorb_affine
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.losses import Loss, emit_objective, emit_penalty, find_output
from onnxslim_passes.training.lowering import Lowered, StateTensor
from onnxslim_passes.training.noise import uniform
from onnxslim_passes.training.options import Objective
from onnxslim_passes.training.parameters import Array, Constraint
from onnxslim_passes.training.shapes import Tensor

__all__ = [
    "TEACHER",
    "Forward",
    "Frozen",
    "build_forward",
    "dropout_ratios",
    "free_name",
    "lift_constants",
    "state_name",
]

TEACHER = "teacher/"

# Constants up to this many bytes stay in the graph: axes, shapes, scalars, tables of a few numbers.
_SMALL_BYTES = 1024
_SEED_STRIDE = 1_000_003
# What a .safetensors file can hold and every language can read.
_LIFTED = frozenset(("float32", "float64", "float16", "int8", "uint8", "int16", "int32", "int64"))


@dataclass(frozen=True)
class Frozen:
    """A constant that became an input, because the graph holds no weights.

    Attributes:
        input: the graph input.
        values: its values.
        is_teacher: whether it is the teacher's.
    """

    input: Variable
    values: Array
    is_teacher: bool


@dataclass(frozen=True)
class Forward:
    """A graph that computes a loss from data, labels and state.

    Attributes:
        emit: the graph.
        tensors: for each constraint, in order, its inputs by key.
        loss: the loss without penalties.
        penalty: of the weights, or None.
        step: number of the step, an input; None if nothing in the graph depends on it.
        running: running statistics with their next values.
        decisions: what was decided on the way.
    """

    emit: Emitter
    tensors: tuple[dict[str, Variable], ...]
    loss: Loss
    penalty: Variable | None
    step: Variable | None
    running: tuple[StateTensor, ...]
    decisions: tuple[Decision, ...]


def state_name(constraint: Constraint, key: str) -> str:
    """The name of a constraint's tensor in graphs and checkpoints."""
    return f"{constraint.where}/{key}"


def build_forward(
    lowered: Lowered,
    teacher: Lowered | None,
    constraints: Sequence[Constraint],
    objective: Objective,
    *,
    dropout: Mapping[str, float] | None,
    seed: int = 0,
) -> Forward:
    """Builds the forward half.

    Args:
        lowered: the training copy; it is copied again.
        teacher: the teacher's, or None.
        constraints: the weights that become inputs.
        objective: what the loss is.
        dropout: the ratio of each Dropout node by the name of its first output; None in
            evaluation, where nothing is dropped. With ratios the result has a `step`.
        seed: of what is dropped.
    """
    work = lowered.model.copy()
    running = tuple(_found_again(work, state) for state in lowered.state)
    output = find_output(work.graph, objective.output)
    taught = None
    if teacher is not None:
        taught = _add_teacher(work, teacher)
    # Outputs that are no tensors, such as the maps of classifiers, have no type to infer.
    work.graph.outputs = [output, *(state.next for state in running)]
    _keep_inner(work, objective, taught)
    work.remove_unused()
    emit = Emitter(work)
    tensors = _weights_as_inputs(emit, constraints)
    step = None
    if dropout is not None:
        step = emit.input(free_name(emit, "step"), np.int64, ())
    _drop(emit, step, dropout or {}, seed)
    emit.learn()
    with emit.scope("loss"):
        loss = emit_objective(emit, output, taught, objective, free_name(emit, "labels"))
        decaying = [
            held[key]
            for held, constraint in zip(tensors, constraints, strict=True)
            for key in sorted(constraint.decays)
        ]
        penalty = emit_penalty(emit, decaying, objective)
    work.graph.outputs = [state.next for state in running]
    # Now every reader of an inner tensor is known.
    with emit.scope("absorbed"):
        absorb_affine(emit)
    return Forward(emit, tensors, loss, penalty, step, running, loss.decisions)


def free_name(emit: Emitter, wanted: str) -> str:
    """The name itself, or one like it where the model has a tensor of that name."""
    name, number = wanted, 1
    while name in emit.graph.names:
        name, number = f"{wanted}_{number}", number + 1
    return name


def _found_again(work: Model, state: StateTensor) -> StateTensor:
    """A running statistic in a copy of the model it was found in."""
    constants = {str(constant.name): constant for constant in work.constants()}
    made = {str(t.name): t for node in work.graph.nodes for t in node.outputs}
    return StateTensor(constants[str(state.weight.name)], made[str(state.next.name)])


def _add_teacher(work: Model, teacher: Lowered) -> dict[str, Tensor]:
    """Puts a frozen copy of the teacher beside the student; its tensors by their own names."""
    copy = teacher.model.copy()
    version = max(work.opset, copy.opset)
    copy.at_least_opset(version)
    mine = {str(tensor.name): tensor for tensor in work.graph.inputs}
    return merge(work, copy, prefix=TEACHER, inputs=mine)


def _keep_inner(work: Model, objective: Objective, taught: Mapping[str, Tensor] | None) -> None:
    """Keeps tensors that the objective may ask for from being removed as unused."""
    made = {str(t.name): t for node in work.graph.nodes for t in node.outputs if not t.is_empty()}
    if not is_function_spec(objective.loss):
        kept = set(objective.distill_tensors) | {str(t.name) for t in (taught or {}).values()}
        made = {name: tensor for name, tensor in made.items() if name in kept}
    work.graph.outputs = [*work.graph.outputs, *made.values()]


def _weights_as_inputs(
    emit: Emitter, constraints: Sequence[Constraint]
) -> tuple[dict[str, Variable], ...]:
    """Lets consumers of weights read the values that the constraints emit."""
    tensors = []
    for constraint in constraints:
        held = {}
        for key, array in {**constraint.trainable(), **constraint.buffers()}.items():
            held[key] = emit.input(state_name(constraint, key), array.dtype, array.shape)
        tensors.append(held)
    known: dict[str, Tensor] = {str(c.name): c for c in emit.model.constants()}
    for node in emit.graph.nodes:
        known.update({str(t.name): t for t in node.outputs if not t.is_empty()})
    for constraint, held in zip(constraints, tensors, strict=True):
        with emit.scope(constraint.where):
            emitted = constraint.emit_value(emit, held)
        for name in constraint.replaces:
            value = emitted[name] if isinstance(emitted, dict) else emitted
            consumers = [node for node in known[name].outputs if not _makes(node, value)]
            emit.model.replace_uses(known[name], value, only=consumers)
    emit.model.remove_unused()
    return tuple(tensors)


def _makes(node: Node, tensor: Variable) -> bool:
    return any(made is tensor for made in node.outputs)


def _drop(emit: Emitter, step: Variable | None, ratios: Mapping[str, float], seed: int) -> None:
    """Replaces Dropout nodes by what they do while training; without a ratio they do nothing."""
    places = [node for node in emit.graph.nodes if node.op == "Dropout" and not node.domain]
    for place, node in enumerate(places):
        x, y = node.inputs[0], node.outputs[0]
        ratio = ratios.get(str(y.name), 0.0)
        kept: Tensor = x
        if step is not None and ratio > 0:
            with emit.scope("dropout"):
                # Far apart, so that runs with neighbouring seeds share no masks.
                moment = emit.add(step, emit.constant(np.array(seed * _SEED_STRIDE, np.int64)))
                noise = uniform(emit, x, moment, place)
                is_kept = emit.op("GreaterOrEqual", noise, emit.scalar(ratio, noise))
                kept = emit.mul(x, emit.scale(emit.mask(is_kept, x), 1 / (1 - ratio)))
        emit.model.replace_uses(y, kept, only=list(dict.fromkeys(y.outputs)))
        emit.graph.outputs = [kept if held is y else held for held in emit.graph.outputs]
    emit.model.remove_unused()


def lift_constants(emit: Emitter) -> list[Frozen]:
    """Turns every large constant into a graph input, so that the graph holds no weights."""
    lifted = []
    for constant in list(emit.graph.initializers):
        if constant.nbytes <= _SMALL_BYTES or constant.dtype.name not in _LIFTED:
            continue
        values = np.array(constant.values)
        is_teacher = str(constant.name).startswith(TEACHER)
        lifted.append(Frozen(emit.promote(constant), values, is_teacher))
    return lifted


def dropout_ratios(lowered: Lowered, constraints: Sequence[Constraint]) -> dict[str, float]:
    """The ratio of each Dropout node, by its first output, less where the next layer is pruned.

    A layer with density d keeps ``ratio * sqrt(d)`` (Han et al. 2015, section 3.2, where the
    number of connections falls from C_o to C_r): a sparse layer overfits less.
    """
    density = {name: c.density for c in constraints for name in c.replaces}
    ratios = {}
    for node in lowered.model.graph.nodes:
        if node.op == "Dropout" and not node.domain:
            next_density = _density_behind(node.outputs[0], density)
            ratios[str(node.outputs[0].name)] = _ratio(node) * math.sqrt(next_density)
    return ratios


def _ratio(node: Node) -> float:
    if len(node.inputs) > 1 and isinstance(node.inputs[1], Constant):
        return float(node.inputs[1].values)
    return float(node.attr("ratio", 0.5))


def _density_behind(tensor: Tensor, density: Mapping[str, float]) -> float:
    """The density of the first weights that meet a tensor on the way to the output; 1 if none."""
    pending, seen = [tensor], set[int]()
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for node in current.outputs:
            met = [density[str(t.name)] for t in node.inputs if str(t.name) in density]
            if met and node.op in ("Conv", "Gemm", "MatMul", "ConvTranspose", "LSTM", "GRU"):
                return min(met)
            pending.extend(node.outputs)
    return 1.0
