"""Where Q/DQ pairs may go: the nodes of a model that could run on integers.

A site is one node that the runtime has an integer kernel for, with the tensors that would be
quantized. Nodes with weights are sites by themselves; nodes between them only where integers come
in and are wanted behind, which is found by taking away those that fail until none does.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from onnxslim_passes.model import Constant, Model, Node, Types, Variable, Weight
from onnxslim_passes.model.bodies import function_graphs
from onnxslim_passes.numerics.affine import AffineGrid
from onnxslim_passes.passes.placement.operators import (
    BETWEEN,
    CLAMPS,
    FUSED_INTO_GEMM,
    WEIGHT_OPERATORS,
    Between,
)
from onnxslim_passes.passes.placement.stored import Stored, stored_of, stored_weights
from onnxslim_passes.report.records import Decision

Verdict = Callable[[Weight], Decision | None]
"""Says why a weight is not to be touched, or None."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Site:
    """A node that could run on integers.

    Attributes:
        node: the node.
        key: the name of its first output before any edit: the same site in a copy of the model.
        inputs: the tensors it takes as data, in front of `pad` where there is one; each once.
        outputs: the tensors with its results, behind `bias_add` and `clamp` where there are such.
        integer_output: its kernel needs integers behind it; others give float at no cost.
        pad: a Pad in front that the runtime merges into the convolution.
        clamp: a Relu or Clip behind the node that a QuantizeLinear makes superfluous.
        rule: what the runtime offers, for a node without weights.
        weight: the constant, for a node with weights: float, or codes where there is a `grid`.
        grid: of a weight that is stored as integers behind a DequantizeLinear already.
        axis: the output channels' axis of `weight`; None where there is no such axis.
        bias: the constant added to each output channel, shape (C,), or None.
        bias_add: the Add behind a MatMul that adds `bias`, or None.
        rank_two: the data input is a matrix, or all its sizes are known, so that the runtime
            fuses MatMul and Add into Gemm.
    """

    node: Node
    key: str
    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    integer_output: bool = True
    pad: Node | None = None
    clamp: Node | None = None
    rule: Between | None = None
    weight: Constant | None = None
    grid: AffineGrid | None = None
    axis: int | None = None
    bias: Constant | None = None
    bias_add: Node | None = None
    rank_two: bool = False

    @property
    def where(self) -> str:
        """The node, for messages."""
        return self.node.where

    @property
    def entry(self) -> Node:
        """The node that takes `inputs`."""
        return self.pad or self.node


@dataclass(frozen=True)
class Survey:
    """All sites of a model, and what is none.

    Attributes:
        sites: in the order of the nodes.
        refusals: a decision for each node with weights that is no site.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Decision, ...]

    def makers(self) -> dict[Variable, Site]:
        """The site behind each tensor that one makes."""
        return {tensor: site for site in self.sites for tensor in site.outputs}

    def takers(self) -> dict[Variable, list[Site]]:
        """The sites that take each tensor as data."""
        takers: dict[Variable, list[Site]] = {}
        for site in self.sites:
            for tensor in site.inputs:
                takers.setdefault(tensor, []).append(site)
        return takers


def survey(
    model: Model, verdict: Verdict, is_excluded: Callable[[Node], bool] = lambda node: False
) -> Survey:
    """Finds the sites of the main graph; the same model gives the same keys.

    Nodes in bodies are not looked at: each body is surveyed as a model of its own.

    Args:
        model: stays as it is.
        verdict: why a weight is not to be touched.
        is_excluded: whether a node without weights is to be left alone.
    """
    types = model.types()
    weights = {weight.constant: weight for weight in model.weights()}
    quantized = _has_quantized_activations(model)
    reasons: dict[Node, str] = {}
    nodes = [
        node
        for graph in (model.graph, *function_graphs(model))
        for node in graph.nodes
        if not node.domain and node.op in WEIGHT_OPERATORS
    ]
    weights |= stored_weights(nodes)
    for node in nodes:
        reason = _refusal(model, node, weights, types, quantized=quantized)
        if reason is None:
            decision = verdict(weights[_weight_of(node)])
            reason = decision.reason if decision is not None else None
        if reason is not None:
            reasons[node] = reason
    reasons |= _without_kernel(model, weights.values())
    for node in [node for node in nodes if node not in reasons]:
        others = [use.node for use in weights[_weight_of(node)].uses if use.node in reasons]
        if others:
            reasons[node] = f"it shares its weight with {others[0].where}, which stays in float"
    sites = [
        _weight_site(model, node, weights[_weight_of(node)], types)
        for node in nodes
        if node not in reasons
    ]
    if sites:
        order = {node: number for number, node in enumerate(model.graph.nodes)}
        sites.extend(_between_sites(model, types, sites, is_excluded))
        sites.sort(key=lambda site: order[site.node])
    refusals = [
        Decision(where=node.where, taken=False, reason=reason) for node, reason in reasons.items()
    ]
    return Survey(tuple(sites), tuple(refusals))


def _has_quantized_activations(model: Model) -> bool:
    """Whether a QuantizeLinear on data is there already."""
    return any(
        node.op == "QuantizeLinear" and isinstance(node.inputs[0], Variable)
        for node in model.graph.nodes
    )


# ---------------- nodes with weights


def _without_kernel(model: Model, weights: Iterable[Weight]) -> dict[Node, str]:
    """Layers that are never sites, such as LSTM, and why."""
    return {
        use.node: f"there is no integer {use.node.op}; its weights stay in float"
        for weight in weights
        for use in weight.uses
        if use.role in ("weight", "recurrent")
        and use.node.op not in WEIGHT_OPERATORS
        and use.node.graph is model.graph
    }


def _refusal(
    model: Model,
    node: Node,
    weights: dict[Constant, Weight],
    types: Types,
    *,
    quantized: bool,
) -> str | None:
    """Why a node with weights cannot run on integers, or None."""
    if node.graph is not model.graph:
        return (
            "it stands in a function, where activations are not calibrated; inline-functions puts "
            "its nodes in line"
        )
    if quantized:
        return "the model has quantized activations already; start from the float model"
    left, right = node.inputs[0], node.inputs[1]
    stored = stored_of(node)
    if stored is not None:
        return stored.objection or _unfit_data(node, types) or _unfit_bias(node)
    if not isinstance(right, Constant):
        return _not_constant(node, left, right)
    if isinstance(left, Constant):
        return "it takes constants only; run fold-constants first"
    return _unfit_weight(node, right, weights, types)


def _not_constant(node: Node, left: Variable | Constant, right: Variable) -> str:
    maker = right.inputs[0] if right.inputs else None
    if maker is not None and maker.inputs and isinstance(maker.inputs[0], Constant):
        return f"its weight comes through {maker.op} {maker.name!r}; run fold-constants first"
    if isinstance(left, Constant):
        return "the weight is its first operand, for which the runtime has no integer kernel"
    return "both operands are activations: integers would add error twice and gain little"


def _unfit_weight(
    node: Node, constant: Constant, weights: dict[Constant, Weight], types: Types
) -> str | None:
    if constant.dtype != np.dtype(np.float32):
        return f"its weight is {constant.dtype.name}; only float32 is quantized"
    unfit = _unfit_data(node, types)
    if unfit is not None:
        return unfit
    if constant.input_info is not None:
        return "its weight is also an input of the model, which a caller may override"
    if constant.size == 0 or len(constant.shape) < 2:
        return f"its weight has shape {constant.shape}: nothing for an integer kernel"
    if not np.isfinite(constant.values).all():
        return "its weight holds NaN or infinity"
    others = sorted(
        {
            use.node.where
            for use in weights[constant].uses
            if not use.direct
            or use.node.op not in WEIGHT_OPERATORS
            or use.input_index != 1
            or use.node.graph is not node.graph
        }
    )
    if others:
        return f"its weight also feeds {others[0]}, so that a float copy would stay beside it"
    return _unfit_bias(node)


def _unfit_data(node: Node, types: Types) -> str | None:
    """Why the data stands in the way, or None."""
    if isinstance(node.inputs[0], Constant):
        return "it takes constants only; run fold-constants first"
    data = types.of(node.inputs[0])
    if data is not None and data.elem_type not in (0, TensorProto.FLOAT):
        return "its data input is not float32"
    return None


def _unfit_bias(node: Node) -> str | None:
    """Why the bias or the scaling of Conv or Gemm stands in the way, or None."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or bias.is_empty():
        return None
    if not isinstance(bias, Constant):
        return "its bias is not constant"
    if bias.dtype != np.dtype(np.float32) or not np.isfinite(bias.values).all():
        return "its bias is not finite float32"
    if node.op == "Gemm" and bias.size != 1 and bias.size != bias.shape[-1]:
        return f"its bias has shape {bias.shape}, which is not one number a column"
    return None


def _weight_of(node: Node) -> Constant:
    stored = stored_of(node)
    constant = node.inputs[1] if stored is None else stored.codes
    assert isinstance(constant, Constant)  # `_refusal` saw to it
    return constant


def _weight_site(model: Model, node: Node, weight: Weight, types: Types) -> Site:
    stored: Stored | None = stored_of(node)
    (axis,) = {use.channel_axis for use in weight.uses if use.node is node}
    bias: Constant | None = None
    if len(node.inputs) > 2 and isinstance(node.inputs[2], Constant):
        bias = node.inputs[2]
    bias_add = None
    data = types.of(node.inputs[0])
    rank_two = data is not None and (data.rank == 2 or data.static)
    if node.op == "MatMul":
        # Scales per column exist for matrices only: the runtime knows no others.
        axis = axis if len(weight.shape) == 2 else None
        bias_add, bias = _bias_behind(model, node, weight.shape[-1])
    last = bias_add or node
    integer_output = node.op in ("Conv", "ConvTranspose")
    if node.op == "Gemm" or (bias_add is not None and rank_two):
        taker = _only_taker(model, last.outputs[0])
        integer_output = taker is not None and taker.op in FUSED_INTO_GEMM
    clamp = _clamp_behind(model, last) if integer_output and node.op != "ConvTranspose" else None
    pad = _pad_before(model, node) if node.op == "Conv" else None
    return Site(
        node=node,
        key=node.outputs[0].name,
        inputs=((pad or node).inputs[0],),
        outputs=((clamp or last).outputs[0],),
        integer_output=integer_output,
        pad=pad,
        clamp=clamp,
        weight=weight.constant,
        grid=stored.grid if stored is not None else None,
        axis=axis,
        bias=bias,
        bias_add=bias_add,
        rank_two=rank_two,
    )


def _only_taker(model: Model, tensor: Variable) -> Node | None:
    """The one node that takes a tensor nobody else sees, or None."""
    takers = list(tensor.outputs)
    if len(takers) != 1 or tensor in model.graph.outputs or takers[0].graph is not model.graph:
        return None
    taker: Node = takers[0]
    return taker


def _bias_behind(model: Model, node: Node, width: int) -> tuple[Node | None, Constant | None]:
    """The Add of a constant row behind a MatMul, and the row."""
    taker = _only_taker(model, node.outputs[0])
    if taker is None or taker.op != "Add" or taker.domain:
        return None, None
    for tensor in taker.inputs:
        if isinstance(tensor, Constant) and tensor.shape == (width,):
            fit = tensor.dtype == np.dtype(np.float32) and np.isfinite(tensor.values).all()
            return (taker, tensor) if fit else (None, None)
    return None, None


def _pad_before(model: Model, node: Node) -> Node | None:
    """The Pad of zeros in front of a Conv that the runtime merges into it."""
    pad = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if pad is None or pad.op != "Pad" or pad.domain or not isinstance(pad.inputs[0], Variable):
        return None
    given = [tensor for tensor in pad.inputs[1:] if not tensor.is_empty()]
    constant = all(isinstance(tensor, Constant) for tensor in given) and len(given) < 3
    if not constant or _only_taker(model, node.inputs[0]) is not node:
        return None
    value = float(given[1].values.reshape(-1)[0]) if len(given) > 1 else pad.attr("value", 0.0)
    sizes = list(given[0].values.reshape(-1)) if given else list(pad.attr("pads", []))
    half = len(sizes) // 2
    fits = sizes and min(sizes) >= 0 and not any((*sizes[:2], *sizes[half : half + 2]))
    plain = pad.attr("mode", "constant") == "constant" and node.attr("auto_pad", "NOTSET")
    return pad if fits and value == 0 and plain == "NOTSET" else None


def _clamp_behind(model: Model, node: Node) -> Node | None:
    """The Relu or Clip behind a node that saturation can stand for."""
    taker = _only_taker(model, node.outputs[0])
    if taker is None or taker.op not in CLAMPS or taker.domain:
        return None
    if taker.op == "Relu":
        return taker
    low, high = _clip_limits(taker)
    return taker if low is not None and high is not None and low <= 0 <= high else None


def _clip_limits(node: Node) -> tuple[float | None, float | None]:
    """Smallest and largest value behind a Clip; None where it is not known."""
    limits: list[float | None] = []
    for index, key, free in ((1, "min", -np.inf), (2, "max", np.inf)):
        tensor = node.inputs[index] if len(node.inputs) > index else None
        if tensor is None or tensor.is_empty():
            limits.append(float(node.attr(key, free)))
        elif isinstance(tensor, Constant) and tensor.size == 1:
            limits.append(float(tensor.values.reshape(-1)[0]))
        else:
            limits.append(None)
    return limits[0], limits[1]


# ---------------- nodes between


def _between_sites(
    model: Model,
    types: Types,
    weight_sites: Sequence[Site],
    is_excluded: Callable[[Node], bool],
) -> list[Site]:
    """Nodes with integers on both sides: taken away until all have them."""
    taken: set[Node] = set()
    for site in weight_sites:
        taken.update(node for node in (site.clamp, site.bias_add) if node is not None)
    nodes = [node for node in model.graph.nodes if node not in taken and not is_excluded(node)]
    candidates = [_between_site(model, node, types) for node in nodes]
    sites = [site for site in candidates if site is not None]
    while True:
        everything = (*weight_sites, *sites)
        made = {tensor for site in everything if site.integer_output for tensor in site.outputs}
        wanted = {tensor for site in everything for tensor in site.inputs}
        kept = [
            candidate
            for candidate in sites
            if any(tensor in made for tensor in candidate.inputs)
            and all(tensor in wanted for tensor in candidate.outputs)
        ]
        if len(kept) == len(sites):
            return sites
        sites = kept


def _between_site(model: Model, node: Node, types: Types) -> Site | None:
    rule = None if node.domain else BETWEEN.get(node.op)
    if rule is None:
        return None
    data = node.inputs if rule.inputs == "all" else node.inputs[:1]
    for tensor in (*data, *node.outputs):
        known = types.of(tensor) if isinstance(tensor, Variable) else None
        if known is None or known.elem_type != TensorProto.FLOAT:
            return None
    if node.op == "MaxPool" and len(node.outputs) > 1:
        return None
    clamp = _clamp_behind(model, node) if node.op == "Add" else None
    outputs = (clamp.outputs[0],) if clamp is not None else tuple(node.outputs)
    return Site(
        node=node,
        key=node.outputs[0].name,
        inputs=tuple(dict.fromkeys(data)),
        outputs=outputs,
        clamp=clamp,
        rule=rule,
    )
