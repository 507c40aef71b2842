"""If nodes whose condition is known before the run, replaced by the branch that is taken."""

from onnxslim_passes.model import Model, Node
from onnxslim_passes.model.inlining import inline_body
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.shapes import Shapes


def choose_branches(model: Model) -> list[Decision]:
    """Replaces each If of the main graph whose condition is known, and those then laid open."""
    decisions: list[Decision] = []
    while True:
        chosen = _known_branches(model)
        if not chosen:
            return decisions
        for node, branch in chosen:
            reason = f"its condition is always {branch}"
            decisions.append(Decision(where=node.where, taken=True, reason=reason))
            inline_body(model, node, node.attrs["then_branch" if branch else "else_branch"])


def unknown_branches(model: Model) -> list[Decision]:
    """Says which If nodes are left."""
    reason = "its condition is known at run time only"
    return [Decision(where=node.where, taken=False, reason=reason) for node in _if_nodes(model)]


def _if_nodes(model: Model) -> list[Node]:
    return [node for node in model.graph.nodes if node.op == "If" and not node.domain]


def _known_branches(model: Model) -> list[tuple[Node, bool]]:
    nodes = _if_nodes(model)
    if not nodes:
        return []
    shapes = Shapes(model)
    values = [(node, shapes.value(node.inputs[0])) for node in nodes]
    return [(node, bool(value)) for node, value in values if value is not None]
