"""`fuse-scales`: scales and shifts in front of a convolution move into its weight and bias.

With y = s x + t for each input channel, or one s and t for all,

    W * y + b  =  (W s) * x + (b + W t),    W t summed over the input channels and the window.

Padding puts zeros around y, not around x: there the shift stays in front, as t / s, and only the
scale moves, because the padding of s x is that of x. `fuse-batch-norm` does the same for what
stands behind a layer; this is for what stands between an activation and the next convolution.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Constant, Model, Node, Variable
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options

Array = npt.NDArray[Any]

_ARITHMETIC = ("Mul", "Div", "Add", "Sub")


@dataclass(frozen=True)
class _Chain:
    """The nodes that scale and shift what a convolution takes, and what they make of it.

    Attributes:
        nodes: from the convolution backwards.
        data: what the first of them takes.
        scale: float64 (C,), C input channels.
        shift: float64 (C,).
    """

    nodes: tuple[Node, ...]
    data: Variable
    scale: Array
    shift: Array


@pass_options
class FuseScales(Pass):
    """Mul, Div, Add and Sub of constants in front of a Conv become part of it."""

    name: ClassVar[str] = "fuse-scales"
    stage: ClassVar[Stage] = Stage.PREPARE
    summary: ClassVar[str] = "scales and shifts in front of convolutions move into their weights"
    references: ClassVar[tuple[str, ...]] = (
        "Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient "
        "Integer-Arithmetic-Only Inference, section 3.2, arXiv:1712.05877",
    )
    lossless: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> PassResult:
        """Fuses in all graphs; see `docs/passes/fuse-scales.md`."""
        outputs = {tensor for graph in model.graphs() for tensor in graph.outputs}
        decisions = []
        for node in [n for n in model.nodes() if n.op == "Conv" and not n.domain]:
            decision = _decide(node, outputs)
            if decision is not None:
                decisions.append(decision)
        changed = any(decision.taken for decision in decisions)
        if changed:
            model.remove_unused()
        return PassResult(changed=changed, decisions=tuple(decisions))


def _decide(node: Node, outputs: set[Variable]) -> Decision | None:
    """Fuses what stands in front of a convolution; None if nothing does."""
    if _arithmetic(node.inputs[0]) is None:
        return None
    weight = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    reason = _unusable(weight, outputs) or (bias is not None and _unusable(bias, outputs))
    if reason:
        return Decision(where=node.where, taken=False, reason=reason)
    chain = _chain(node, outputs)
    if not chain.nodes:
        reason = "other nodes take what is scaled, or the factors are not one a channel"
        return Decision(where=node.where, taken=False, reason=reason)
    padded = _is_padded(node)
    if padded and len(chain.nodes) == 1 and chain.shift.any():
        return Decision(where=node.where, taken=False, reason="a shift in front of padding stays")
    if padded and chain.shift.any() and not chain.scale.all():
        return Decision(where=node.where, taken=False, reason="a shift behind a scale of 0 stays")
    return _fuse(node, chain, padded)


def _unusable(tensor: Variable | Constant, outputs: set[Variable]) -> str:
    """Why a weight or bias cannot be replaced, or ""."""
    if not isinstance(tensor, Constant):
        return "its weight or bias is computed; fold-constants may make it a constant"
    if tensor.input_info is not None or tensor in outputs:
        return f"{tensor.name!r} is an input or output of the graph, too"
    if tensor.dtype != np.float32:
        return f"{tensor.name!r} is {tensor.dtype}; float32 was expected"
    return ""


def _arithmetic(tensor: Variable | Constant) -> tuple[Node, Variable, Constant] | None:
    """The node that makes a tensor out of another one and a constant, with both."""
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None or maker.domain or maker.op not in _ARITHMETIC or len(maker.inputs) != 2:
        return None
    first, second = maker.inputs
    if isinstance(first, Constant) == isinstance(second, Constant):
        return None
    if isinstance(first, Constant):
        return None if maker.op in ("Div", "Sub") else (maker, second, first)
    return maker, first, second


def _chain(node: Node, outputs: set[Variable]) -> _Chain:
    """What can be taken into a convolution, from it backwards."""
    channels = int(node.inputs[1].shape[1]) * int(node.attr("group", 1))
    rank, data = len(node.inputs[1].shape), node.inputs[0]
    scale, shift = np.ones(channels), np.zeros(channels)
    nodes: list[Node] = []
    while (found := _arithmetic(data)) is not None:
        maker, taken, constant = found
        values = _by_channel(constant, channels, rank)
        alone = len(data.outputs) == 1 and data not in outputs and maker.graph is node.graph
        if values is None or not alone or (maker.op == "Div" and not values.all()):
            break
        if maker.op in ("Mul", "Div"):
            scale = scale * values if maker.op == "Mul" else scale / values
        else:
            shift = shift + scale * (values if maker.op == "Add" else -values)
        nodes.append(maker)
        data = taken
    return _Chain(tuple(nodes), data, scale, shift)


def _by_channel(constant: Constant, channels: int, rank: int) -> Array | None:
    """A constant as float64 (C,); None if it is not one number, or one a channel on axis 1."""
    if constant.dtype != np.float32 or constant.input_info is not None:
        return None
    shape = (1,) * (rank - len(constant.shape)) + tuple(constant.shape)
    if len(shape) != rank or any(n != 1 for axis, n in enumerate(shape) if axis != 1):
        return None
    if shape[1] not in (1, channels):
        return None
    return np.broadcast_to(constant.values.astype(np.float64).reshape(-1), (channels,))


def _is_padded(node: Node) -> bool:
    kind = node.attr("auto_pad", "NOTSET")
    name = kind.decode() if isinstance(kind, bytes) else str(kind)
    return name.startswith("SAME") or (name == "NOTSET" and any(node.attr("pads", ())))


def _fuse(node: Node, chain: _Chain, padded: bool) -> Decision:
    graph, weight = node.graph, node.inputs[1]
    values = weight.values.astype(np.float64)
    scaled = values * _along(chain.scale, values, node)
    rounded = scaled.astype(np.float32)
    moved = (values * _along(chain.shift, values, node)).reshape(len(values), -1).sum(axis=1)
    if not (np.isfinite(rounded).all() and np.isfinite(moved.astype(np.float32)).all()):
        return Decision(where=node.where, taken=False, reason="the products are not finite")
    node.inputs[1] = graph.add_constant(f"{weight.name}_scaled", rounded)
    node.inputs[0] = chain.data
    if chain.shift.any() and padded:
        left = (chain.shift / chain.scale).astype(np.float32)
        left = left.reshape(1, -1, *(1,) * (values.ndim - 2))
        left = left.reshape(-1)[:1] if (left == left.reshape(-1)[0]).all() else left
        held = graph.add_constant(f"{weight.name}_shift", left)
        node.inputs[0] = graph.add_node("Add", [chain.data, held]).outputs[0]
    elif chain.shift.any():
        _add_to_bias(node, moved)
    return Decision(
        where=node.where,
        taken=True,
        reason=f"{', '.join(n.op for n in reversed(chain.nodes))} in front became part of it"
        + (", but for a shift that padding forbids" if padded and chain.shift.any() else ""),
        figures={"nodes": len(chain.nodes)},
    )


def _along(row: Array, weight: Array, node: Node) -> Array:
    """A number an input channel, (C,), as it broadcasts to a weight (O, C / groups, *window)."""
    groups = int(node.attr("group", 1))
    rows = np.repeat(row.reshape(groups, -1), len(weight) // groups, axis=0)
    return rows.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))


def _add_to_bias(node: Node, moved: Array) -> None:
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        moved = moved + node.inputs[2].values
        hint = f"{node.inputs[2].name}_shifted"
    else:
        hint = f"{node.inputs[1].name}_bias"
    bias = node.graph.add_constant(hint, moved.astype(np.float32))
    if len(node.inputs) > 2:
        node.inputs[2] = bias
    else:
        node.inputs.append(bias)
