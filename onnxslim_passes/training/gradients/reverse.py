"""Reverse-mode differentiation: from a loss back to weights, node by node.

For a node y = f(x1, x2, ...) with dy = d loss / d y known, the rule of f emits nodes for
dx_i = (d y / d x_i)^T dy. The sweep visits only nodes on a path from the wanted tensors to the
loss, the last first, and sums what comes back along several ways (Griewank and Walther, Evaluating
Derivatives, 2nd edition, 2008, chapter 3).
"""

from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import dataclass

from onnxslim_passes.errors import DifferentiationError, UnsupportedModelError
from onnxslim_passes.model import Node, Variable
from onnxslim_passes.model.exporting import captured_inputs, sorted_nodes
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.gradients.expansion import expand, has_body
from onnxslim_passes.training.gradients.rules import RULES, STOPS, STRAIGHT_THROUGH
from onnxslim_passes.training.gradients.step import Step

_REMEDY = (
    "Freeze them (--freeze-unsupported treats their inputs as constants), leave out the weights "
    "before them, or fix the inputs that decide an If."
)


@dataclass(frozen=True)
class Gradients:
    """Gradients of one loss.

    Attributes:
        of: for each wanted tensor its gradient, of the same shape and type; zeros if the loss
            does not depend on it.
        connected: the wanted tensors that the loss depends on.
        decisions: operators replaced by what they are made of, and nodes that were frozen.
    """

    of: dict[Tensor, Tensor]
    connected: frozenset[Tensor]
    decisions: tuple[Decision, ...]

    def __getitem__(self, tensor: Tensor) -> Tensor:
        return self.of[tensor]


def gradients(
    emit: Emitter, loss: Tensor, wrt: Sequence[Tensor], *, freeze_unsupported: bool = False
) -> Gradients:
    """Adds the nodes that compute d loss / d tensor for every tensor of `wrt`.

    Args:
        emit: a training copy; see `lower`.
        loss: floating-point, one element.
        wrt: floating-point tensors of the main graph: initializers, inputs or in between.
        freeze_unsupported: treat the inputs of nodes without a rule as constants, and say so.

    Raises:
        DifferentiationError: nodes on the way have no rule (all are named, and nothing was
            added), or one of an operator with a rule is of a kind that the rule does not cover.
    """
    _check_loss(emit, loss)
    with emit.scope("gradient"):
        decisions = _prepare(emit, loss, wrt, freeze_unsupported)
        path = find_path(emit, loss, wrt)
        path = find_path(emit, loss, wrt, _without_rule(emit, loss, path))
        found = _sweep(emit, loss, path)
        result = {
            tensor: found[tensor] if tensor in found else emit.zeros_like(tensor) for tensor in wrt
        }
    connected = frozenset(tensor for tensor in wrt if tensor in found)
    return Gradients(result, connected, decisions)


def check_differentiable(
    emit: Emitter, loss: Tensor, wrt: Sequence[Tensor], *, freeze_unsupported: bool = False
) -> tuple[Decision, ...]:
    """What `gradients` would decide, without adding anything.

    Raises:
        DifferentiationError: nodes on the way have no rule; all are named.
    """
    _check_loss(emit, loss)
    path = find_path(emit, loss, wrt)
    frozen = _without_rule(emit, loss, path)
    if not freeze_unsupported:
        _refuse([node for node in path.nodes if _needs_body(node) and not has_body(emit, node)])
    path = find_path(emit, loss, wrt, frozen)
    return (
        *(_expanded(node) for node in path.nodes if _needs_body(node)),
        *(_frozen(node) for node in frozen),
    )


@dataclass(frozen=True)
class Path:
    """What lies between some tensors and a loss.

    Attributes:
        nodes: in an order in which they can run.
        tensors: the wanted ones and all that carry a gradient back to them.
    """

    nodes: list[Node]
    tensors: Set[Tensor]


def find_path(
    emit: Emitter, loss: Tensor, wrt: Iterable[Tensor], frozen: Collection[Node] = ()
) -> Path:
    """The nodes that the loss depends on and that depend on a tensor of `wrt`.

    Args:
        emit: the graph.
        loss: where paths end.
        wrt: where they begin.
        frozen: nodes through which none leads.
    """
    live, blocked = set(wrt), set(frozen)
    order = sorted_nodes(emit.graph)
    reached = []
    for node in order:
        if node in blocked or (node.op in STOPS and not node.domain):
            continue
        if any(tensor in live for tensor in captured_inputs(node)):
            reached.append(node)
            live.update(tensor for tensor in node.outputs if _carries(emit, tensor))
    needed: set[Tensor] = {loss}
    nodes = []
    for node in reversed(reached):
        if any(tensor in needed for tensor in node.outputs if tensor in live):
            nodes.append(node)
            needed.update(tensor for tensor in captured_inputs(node) if tensor in live)
    return Path(nodes[::-1], live & needed)


def _carries(emit: Emitter, tensor: Variable) -> bool:
    """Whether a gradient goes back through an output of a node on the path."""
    if tensor.is_empty() or emit.stops(tensor):
        return False
    maker = tensor.inputs[0].op if tensor.inputs else ""
    if maker in STRAIGHT_THROUGH:
        # A straight-through gradient goes through the integers, and through these alone.
        return tensor is tensor.inputs[0].outputs[0]
    # An output of unknown type may be a float: better an error than a gradient that is missing.
    return not emit.elem_type(tensor) or emit.is_float(tensor)


def _check_loss(emit: Emitter, loss: Tensor) -> None:
    if not emit.is_float(loss) or emit.shape(loss) not in ((), (1,)):
        raise DifferentiationError(
            f"The loss {loss.name!r} must be one floating-point number; it has shape "
            f"{list(emit.shape(loss))}. Reduce it to its mean or sum."
        )


def _prepare(
    emit: Emitter, loss: Tensor, wrt: Sequence[Tensor], freeze: bool
) -> tuple[Decision, ...]:
    """Replaces operators by their function bodies until all on the path have rules."""
    decisions: list[Decision] = []
    while True:
        # A body may hold operators that have no rule either.
        found = check_differentiable(emit, loss, wrt, freeze_unsupported=freeze)
        decisions += [one for one in found if one.taken]
        nodes = [node for node in find_path(emit, loss, wrt).nodes if _needs_body(node)]
        nodes = [node for node in nodes if has_body(emit, node)]
        if not nodes:
            return (*decisions, *(one for one in found if not one.taken))
        for node in nodes:
            expand(emit, node)


def _needs_body(node: Node) -> bool:
    return bool(node.domain) or node.op not in RULES


def _without_rule(emit: Emitter, loss: Tensor, path: Path) -> list[Node]:
    """The nodes at which the way back ends, if it goes on wherever there is a rule or a body."""
    needed: set[Tensor] = {loss}
    frozen = []
    for node in reversed(path.nodes):
        if needed.isdisjoint(node.outputs):
            continue
        if _needs_body(node) and not has_body(emit, node):
            frozen.append(node)
        else:
            needed.update(captured_inputs(node))
    return frozen[::-1]


def _refuse(nodes: Sequence[Node]) -> None:
    if nodes:
        listed = ", ".join(f"{node.where!r} ({_operator(node)})" for node in nodes)
        raise DifferentiationError(f"No gradient rule for {listed}. {_REMEDY}")


def _operator(node: Node) -> str:
    return f"{node.domain}.{node.op}" if node.domain else str(node.op)


def _expanded(node: Node) -> Decision:
    reason = f"{_operator(node)} is differentiated through the operators it is defined by"
    return Decision(where=node.where, taken=True, reason=reason)


def _frozen(node: Node) -> Decision:
    reason = f"no gradient rule for {_operator(node)}: its inputs are constants to training"
    return Decision(where=node.where, taken=False, reason=reason)


def _sweep(emit: Emitter, loss: Tensor, path: Path) -> dict[Tensor, Tensor]:
    """The gradients of the tensors of the path, as far as they have one."""
    pending: dict[Tensor, list[Tensor]] = {loss: [emit.ones_like(loss)]}
    for node in reversed(path.nodes):
        dys = tuple(_collect(emit, pending, tensor) for tensor in node.outputs)
        if all(dy is None for dy in dys):
            continue
        wanted = tuple(tensor in path.tensors for tensor in node.inputs)
        step = Step(emit, node, dys, wanted)
        for tensor, found in zip(node.inputs, _apply(step), strict=False):
            if found is not None and tensor in path.tensors:
                _check_shape(step, tensor, found)
                pending.setdefault(tensor, []).append(found)
    return {
        tensor: found
        for tensor in list(pending)
        if (found := _collect(emit, pending, tensor)) is not None
    }


def _apply(step: Step) -> Sequence[Tensor | None]:
    try:
        return RULES[step.node.op](step)
    except DifferentiationError:
        raise
    except UnsupportedModelError as error:
        raise step.refusal(str(error).rstrip(".")) from error


def _collect(emit: Emitter, pending: dict[Tensor, list[Tensor]], tensor: Tensor) -> Tensor | None:
    """The sum of all gradients of a tensor; kept, because the tensor itself may be wanted."""
    parts = pending.get(tensor)
    if not parts:
        return None
    if len(parts) > 1:
        pending[tensor] = parts = [emit.op("Sum" if len(parts) > 2 else "Add", *parts)]
    return parts[0]


def _check_shape(step: Step, tensor: Tensor, found: Tensor) -> None:
    emit = step.emit
    if emit.shape(found) != emit.shape(tensor):
        raise step.refusal(
            f"the gradient of {tensor.name!r}, of shape {list(emit.shape(tensor))}, came out as "
            f"{list(emit.shape(found))}; give the model fixed input shapes"
        )


__all__ = ["Gradients", "Path", "check_differentiable", "find_path", "gradients"]
