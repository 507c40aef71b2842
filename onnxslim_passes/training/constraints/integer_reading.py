"""Finds the integer weights of a model that can be trained, and the biases that follow them."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from onnxslim_passes.model import FLOAT_DTYPES, Constant, Model, Node
from onnxslim_passes.model.patterns import first_match
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.constraints.integers import Integers, QuantizedWeight
from onnxslim_passes.training.options import Parameters

__all__ = ["read_integers"]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LEAST = 16


def read_integers(
    model: Model, known: frozenset[str], parameters: Parameters, places: Mapping[str, str]
) -> tuple[list[QuantizedWeight], list[Decision]]:
    """The integer weights behind DequantizeLinear, each with a decision if it is not trained.

    Args:
        model: with a name of its own for every constant.
        known: names of the constants in the training copy.
        parameters: which weights move.
        places: where each constant stands in the user's model.
    """
    found, decisions = [], []
    for node in model.nodes():
        if node.op != "DequantizeLinear" or node.domain or not _is_weight(node):
            continue
        codes: Constant = node.inputs[0]
        place = places[str(codes.name)]
        reason = _objection(node, known, parameters, place)
        if reason:
            decisions.append(Decision(where=place, taken=False, reason=reason))
            continue
        integers, makers = _integers(node), _biases(node)
        bias = _bias(makers, integers) if len(node.outputs[0].outputs) == 1 else None
        if makers and bias is None:
            # The step size of a bias is a multiple of the weight's: without it neither moves.
            integers = replace(integers, learned=False)
        found.append(QuantizedWeight(place, integers, integers.levels(), bias))
    return found, decisions


def _is_weight(node: Node) -> bool:
    """Whether it dequantizes a constant that is the weight of a layer."""
    codes = node.inputs[0]
    if not isinstance(codes, Constant) or codes.dtype == np.int32 or codes.size < _LEAST:
        return False
    return any(
        taker.op in _LAYERS and any(t is node.outputs[0] for t in taker.inputs[:2])
        for taker in node.outputs[0].outputs
    )


def _objection(node: Node, known: frozenset[str], parameters: Parameters, place: str) -> str:
    """Why an integer weight stays as it is, or ""."""
    codes, scale = node.inputs[:2]
    takers = {str(taker.name) for taker in node.outputs[0].outputs}
    labels = {str(codes.name), place, str(node.name), *takers} - {""}
    if (pattern := first_match(parameters.exclude, labels)) is not None:
        return f"excluded by {pattern!r}"
    if parameters.include and first_match(parameters.include, labels) is None:
        return "not matched by include"
    if str(codes.name) not in known:
        return "is not in the training copy: the branch that holds it is not taken"
    for constant in node.inputs[1:]:
        if not constant.is_empty() and not isinstance(constant, Constant):
            return "has a scale or a zero point that is computed"
    if scale.dtype not in FLOAT_DTYPES or codes.input_info is not None:
        return "has a scale that is no float, or codes that a caller may override"
    if len(codes.outputs) > 1:
        return "its integers are taken elsewhere, too"
    if not (scale.values.astype(np.float64) > 0).all():
        return "has step sizes that are not positive"
    return ""


def _integers(node: Node) -> Integers:
    codes, scale = node.inputs[:2]
    given = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    rank = len(codes.shape)
    axis: int | None = None
    block = int(node.attr("block_size", 0))
    if scale.size > 1 or block:
        axis = int(node.attr("axis", 1)) % max(1, rank)
    alone = len(scale.outputs) == 1 and scale.input_info is None
    return Integers(codes, scale, given, str(node.outputs[0].name), axis, block, alone)


def _biases(node: Node) -> list[Node]:
    """The nodes that dequantize int32 biases of the layers that take a weight."""
    found = []
    for taker in dict.fromkeys(node.outputs[0].outputs):
        maker = next(iter(taker.inputs[2].inputs), None) if len(taker.inputs) > 2 else None
        if maker is not None and maker.op == "DequantizeLinear":
            codes = maker.inputs[0]
            if isinstance(codes, Constant) and codes.dtype == np.int32:
                found.append(maker)
    return found


def _bias(makers: list[Node], weight: Integers) -> Integers | None:
    """The bias of the only layer that takes a weight, if its scale can follow the weight's."""
    if len(makers) != 1 or len(makers[0].outputs[0].outputs) != 1 or weight.block:
        return None
    bias = _integers(makers[0])
    fits = bias.scale.size == weight.scale.size or weight.scale.size == 1
    alone = bias.learned and len(bias.codes.outputs) == 1
    plain = bias.zero_point is None or not bias.zero_point.values.any()
    return bias if fits and alone and plain else None
