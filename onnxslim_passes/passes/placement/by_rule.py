"""Q/DQ pairs where a target's documentation wants them, instead of where this CPU gains time."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np

from onnxslim_passes.model import Constant, Model, Node, Types, Variable
from onnxslim_passes.numerics.affine import AffineGrid, choose_grid, quantize, weight_grid
from onnxslim_passes.passes.placement.insertion import (
    ActivationConstants,
    quantize_for,
    quantize_where_made,
    short,
)
from onnxslim_passes.passes.placement.operators import BETWEEN, CLAMPS
from onnxslim_passes.passes.placement.schemes import Format, Ranges, Schemes
from onnxslim_passes.passes.placement.sites import Site, Survey
from onnxslim_passes.report.records import Decision

PARAMETERIZED = ("Clip", "Resize", "Upsample", "Pad")
"""Operators whose inputs behind the first are parameters, which stay float."""

BY_RULE = ("inputs", "all")
"""Placements that are not measured here."""

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


# ---------------- in front of nodes with weights


def inputs_only(model: Model, found: Survey, is_excluded: Callable[[Node], bool]) -> Survey:
    """The sites whose inputs TensorRT wants quantized: nodes with weights, and residual additions.

    Outputs stay as they are. Of an Add, the operand that a node with weights makes for it alone
    stays float, because TensorRT fuses that Add into the node; the other one is quantized.

    Args:
        model: that was surveyed.
        found: its sites.
        is_excluded: whether a node without weights is to be left alone.
    """
    layers = [
        replace(site, integer_output=False) for site in found.sites if site.weight is not None
    ]
    types = model.types()
    made = {tensor for site in layers if site.clamp is None for tensor in site.outputs}
    biases = {site.bias_add for site in layers}
    additions = [
        _residual_site(node, made, types)
        for node in model.graph.nodes
        if node.op == "Add" and not node.domain and node not in biases and not is_excluded(node)
    ]
    return Survey((*layers, *(site for site in additions if site is not None)), found.refusals)


def _residual_site(node: Node, made: Collection[Variable], types: Types) -> Site | None:
    """The Add of what a layer makes for it alone and another activation, or None."""
    fused = next((t for t in node.inputs[::-1] if t in made and len(t.outputs) == 1), None)
    others = [tensor for tensor in node.inputs if tensor is not fused]
    if fused is None or len(others) != 1:
        return None
    other = others[0]
    if not isinstance(other, Variable) or not _is_float(types, other) or _touches_pair(other):
        return None
    return Site(
        node=node,
        key=node.outputs[0].name,
        inputs=(other,),
        outputs=tuple(node.outputs),
        integer_output=False,
        rule=BETWEEN["Add"],
    )


# ---------------- on every tensor


def float_tensors(model: Model, types: Types) -> list[Variable]:
    """The float32 tensors of the main graph that no pair stands around, makers before takers."""
    made = [tensor for node in model.graph.nodes for tensor in node.outputs]
    return [
        tensor
        for tensor in (*model.graph.inputs, *made)
        if isinstance(tensor, Variable)
        and not tensor.is_empty()
        and _is_float(types, tensor)
        and not _touches_pair(tensor)
    ]


def rest_tensors(model: Model, types: Types) -> list[Variable]:
    """Those of `float_tensors` that `quantize_rest` puts a pair on, given their ranges."""
    return [tensor for tensor in float_tensors(model, types) if not _is_clamped(model, tensor)]


def _is_float(types: Types, tensor: Variable | Constant) -> bool:
    known = types.of(tensor)
    return known is not None and known.dtype == np.dtype(np.float32)


def _touches_pair(tensor: Variable) -> bool:
    made_by = {node.op for node in tensor.inputs}
    return bool(made_by & set(_CONVERSIONS)) or any(
        node.op == "QuantizeLinear" for node in tensor.outputs
    )


def quantize_rest(model: Model, ranges: Ranges, schemes: Schemes) -> int:
    """Puts a pair on every float tensor of the main graph that has none yet; their number.

    Outputs of operators that only move values get the grid of their input. Float constants that
    are data, such as the addend of an Add, become integers. A Relu or Clip behind a node is part of
    that node: nothing goes between.
    """
    _share_pairs(model)
    types = model.types()
    grids: dict[Variable, AffineGrid] = {}
    constants = ActivationConstants(model.graph)
    tensors = [tensor for tensor in rest_tensors(model, types) if tensor.name in ranges]
    for tensor in tensors:
        grid = _grid(tensor, grids, ranges, schemes)
        parameters = constants.of(grid, tensor.name)
        grids[tensor] = grid
        if tensor.inputs:
            quantize_where_made(model.graph, tensor, parameters)
        else:
            takers = list(dict.fromkeys(tensor.outputs))
            quantize_for(model.graph, tensor, takers, parameters, barriers=False)
    return len(grids) + _quantize_constants(model, types, schemes)


def _share_pairs(model: Model) -> None:
    """Gives what is behind a pair to those, too, that take the same tensor in front of it."""
    for quantizer in [node for node in model.graph.nodes if node.op == "QuantizeLinear"]:
        source = quantizer.inputs[0]
        others = {
            node
            for node in source.outputs
            if node.op not in _CONVERSIONS and node.graph is model.graph
        }
        for restore in quantizer.outputs[0].outputs:
            if others and isinstance(source, Variable) and restore.op == "DequantizeLinear":
                model.replace_uses(source, restore.outputs[0], only=others)
                break


def _is_clamped(model: Model, tensor: Variable) -> bool:
    """Whether only a Relu or Clip takes what a node made."""
    takers = list(tensor.outputs)
    clamped = len(takers) == 1 and takers[0].op in CLAMPS and not takers[0].domain
    return clamped and bool(tensor.inputs) and tensor not in model.graph.outputs


def _grid(
    tensor: Variable, grids: Mapping[Variable, AffineGrid], ranges: Ranges, schemes: Schemes
) -> AffineGrid:
    maker: Node | None = tensor.inputs[0] if tensor.inputs else None
    rule = BETWEEN.get(maker.op) if maker is not None and not maker.domain else None
    if maker is not None and rule is not None and rule.same_grid and maker.inputs[0] in grids:
        return grids[maker.inputs[0]]
    low, high = ranges[tensor.name]
    node = maker or next(iter(tensor.outputs), None)
    kind = schemes.kind(tensor, node)
    return choose_grid(low, high, kind.dtype, symmetric=kind.symmetric)


def _quantize_constants(model: Model, types: Types, schemes: Schemes) -> int:
    """Float constants of the main graph that nodes take as data become integers."""
    done: dict[Constant, Variable] = {}
    for node in list(model.graph.nodes):
        if node.op in _CONVERSIONS or list(node.bodies()):
            continue
        count = 1 if node.op in PARAMETERIZED else len(node.inputs)
        for index, tensor in enumerate(node.inputs[:count]):
            if isinstance(tensor, Constant) and _is_plain(tensor):
                if tensor not in done:
                    done[tensor] = _stored(model, tensor, schemes.of(node).format)
                node.inputs[index] = done[tensor]
    if done:
        model.remove_unused()
    return len(done)


def _is_plain(constant: Constant) -> bool:
    return (
        constant.dtype == np.dtype(np.float32)
        and constant.input_info is None
        and constant.size > 0
        and bool(np.isfinite(constant.values).all())
    )


def _stored(model: Model, constant: Constant, kind: Format) -> Variable:
    values = constant.values
    grid = weight_grid(values, kind.dtype, symmetric=kind.symmetric)
    name = short(constant.name)
    inputs = [
        model.graph.add_constant(f"{name}_quantized", quantize(values, grid)),
        model.graph.add_constant(f"{name}_scale", grid.scale),
        model.graph.add_constant(f"{name}_zero_point", grid.zero_point),
    ]
    node = model.graph.add_node("DequantizeLinear", inputs, outputs=[f"{name}_dequantized"])
    restored: Variable = node.outputs[0]
    return restored


def weights_only(found: Survey) -> Survey:
    """The sites of nodes with weights; `quantize_rest` sees to what lies between."""
    return Survey(tuple(site for site in found.sites if site.weight is not None), found.refusals)


def unplaced(site: Site, target: str) -> Decision:
    """Why a site gets no pairs where there are to be none."""
    reason = (
        f"placement=nowhere, by option or for target {target} (docs/targets.md); convert-float "
        "and cluster-weights make a file smaller without Q/DQ"
    )
    return Decision(where=site.where, taken=False, reason=reason)
