"""Operators of `ai.onnx.ml` that scikit-learn's exporter puts in front of a network.

ONNX infers no shapes behind them, and other runtimes do not have them; so the training copy has
what they are made of.
"""

import numpy as np

from onnxslim_passes.model import Model, Node
from onnxslim_passes.report.records import Decision

__all__ = ["expand_scalers"]

_DOMAIN = "ai.onnx.ml"


def expand_scalers(model: Model) -> tuple[Decision, ...]:
    """Replaces each Scaler by ``(x - offset) * scale`` in float32, in place."""
    decisions = []
    for node in [n for n in model.graph.nodes if (n.domain, n.op) == (_DOMAIN, "Scaler")]:
        _expand(model, node)
        reason = "replaced by Sub and Mul, which every runtime has"
        decisions.append(Decision(where=node.where, taken=True, reason=reason))
    return tuple(decisions)


def _expand(model: Model, node: Node) -> None:
    graph, x, y = model.graph, node.inputs[0], node.outputs[0]
    offset = np.array(node.attr("offset") or [0.0], np.float32)
    scale = np.array(node.attr("scale") or [1.0], np.float32)
    cast = graph.add_node("Cast", [x], attrs={"to": 1}).outputs[0]
    centred = graph.add_node("Sub", [cast, graph.add_constant(f"{y.name}/offset", offset)])
    scaled = graph.add_node(
        "Mul", [centred.outputs[0], graph.add_constant(f"{y.name}/scale", scale)]
    )
    model.replace_uses(y, scaled.outputs[0])
    graph.remove_node(node)
