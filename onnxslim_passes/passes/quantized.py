"""What in a model is quantized already: found, left alone, and said.

A pass over weights sees float constants only. Weights that are stored as integers, and nodes that
run on integers, are none of its candidates; without a word they would be passed over in silence.
"""

from collections.abc import Iterator

from onnxslim_passes.model import Constant, Model, Node, Variable
from onnxslim_passes.passes.base import Decision

INTEGER_OPERATORS: dict[tuple[str, str], int] = {
    ("", "QLinearConv"): 3,
    ("", "QLinearMatMul"): 3,
    ("", "ConvInteger"): 1,
    ("", "MatMulInteger"): 1,
    ("com.microsoft", "ConvInteger"): 1,
    ("com.microsoft", "DynamicQuantizeLSTM"): 1,
    ("com.microsoft", "DynamicQuantizeMatMul"): 1,
    ("com.microsoft", "GatherBlockQuantized"): 0,
    ("com.microsoft", "MatMulBnb4"): 1,
    ("com.microsoft", "MatMulInteger16"): 1,
    ("com.microsoft", "MatMulIntegerToFloat"): 1,
    ("com.microsoft", "MatMulNBits"): 1,
    ("com.microsoft", "QAttention"): 1,
    ("com.microsoft", "QEmbedLayerNormalization"): 2,
    ("com.microsoft", "QGemm"): 3,
    ("com.microsoft", "QLinearConv"): 3,
    ("com.microsoft", "QMoE"): 2,
}
"""Operators whose weights are integers, by domain and name; which input the weight is."""

_CODES = ("int8", "uint8", "int4", "uint4", "int2", "uint2", "int16", "uint16")


def integer_decisions(model: Model) -> list[Decision]:
    """One decision for each node that runs on integers already, or gathers from integers."""
    decisions = [
        Decision(where=node.where, taken=False, reason=f"runs on integers already: {label}")
        for node, label, _ in _integer_nodes(model)
    ]
    for node in model.nodes():
        codes = node.inputs[0] if node.op == "Gather" and not node.domain else None
        if codes is not None and not isinstance(codes, Constant):
            codes = _dequantized(codes)
        if codes is not None and is_table(codes):
            reason = f"its table is stored as {codes.dtype.name} already"
            decisions.append(Decision(where=node.where, taken=False, reason=reason))
    return decisions


def is_table(codes: Constant) -> bool:
    """Whether a constant is a weight or table of small integers, no scalar, row or index list."""
    return len(codes.shape) > 1 and codes.dtype.name in _CODES


def stored_reason(node: Node) -> str | None:
    """Why a node with a weight behind DequantizeLinear is left alone; None if it has none."""
    right = node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(right, Variable) or _dequantized(right) is None:
        return None
    return "its weight is stored as integers behind DequantizeLinear already"


def _dequantized(tensor: Variable) -> Constant | None:
    """The constant behind whose DequantizeLinear a tensor comes, or None."""
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None or maker.op != "DequantizeLinear":
        return None
    codes = maker.inputs[0]
    return codes if isinstance(codes, Constant) else None


def stored_decisions(model: Model, what: str) -> list[Decision]:
    """One decision for each weight that is stored as integers, for a pass over float weights.

    Args:
        model: any.
        what: what the pass needs float values for, such as ``"clustering"``.
    """
    reasons: dict[Constant, str] = {}
    for node, label, index in _integer_nodes(model):
        weight = node.inputs[index] if len(node.inputs) > index else None
        if isinstance(weight, Constant):
            reasons.setdefault(weight, f"taken by {label}")
    for node in model.nodes():
        if node.op not in ("DequantizeLinear", "Gather") or node.domain:
            continue
        codes = node.inputs[0]
        if isinstance(codes, Constant) and is_table(codes):
            reasons.setdefault(
                codes, "taken by Gather" if node.op == "Gather" else "behind DequantizeLinear"
            )
    return [
        Decision(
            where=codes.where,
            taken=False,
            reason=f"is stored as {codes.dtype.name} already, {reason}: {what} is for floats",
        )
        for codes, reason in reasons.items()
    ]


def _integer_nodes(model: Model) -> Iterator[tuple[Node, str, int]]:
    """Nodes with integer weights, their operators in words, and the weight's input."""
    for node in model.nodes():
        key = (str(node.domain), str(node.op))
        if key in INTEGER_OPERATORS:
            yield node, ".".join(part for part in key if part), INTEGER_OPERATORS[key]
