"""What in a model is not as a target's documentation wants it.

Each kind of rule in the table of targets has one function here, which reads the model and reports
places. Q/DQ pairs are read as they stand: what a provider makes of them is not known here.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxslim_passes.model import Constant, Model, Node, Types, Variable
from onnxslim_passes.passes.placement.by_rule import PARAMETERIZED
from onnxslim_passes.passes.placement.operators import CLAMPS, WEIGHT_OPERATORS
from onnxslim_passes.passes.placement.pairs import largest_pair
from onnxslim_passes.passes.placement.targets import Reference, Rule, RuleKind, find_target
from onnxslim_passes.report.records import Decision

Tensor = Variable | Constant
Found = tuple[str, str, str]
"""Where, what was found, what was expected."""

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
_BIAS_INPUT = 2


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One place where a model is not as a rule wants it.

    Attributes:
        where: the node.
        rule: the rule's name.
        found: what is there.
        expected: what should be.
        required: False if the rule is a recommendation.
        reference: the document with the rule.
    """

    where: str
    rule: str
    found: str
    expected: str
    required: bool
    reference: Reference

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "where": self.where,
            "rule": self.rule,
            "found": self.found,
            "expected": self.expected,
            "required": self.required,
            "reference": {"title": self.reference.title, "url": self.reference.url},
        }


def check_target(model: Model, target: str) -> list[Violation]:
    """What in a model is not as a target wants it, in the order of the target's rules.

    An empty list means that no rule is broken, not that the target was tried; what no document
    says is in the target's `unknown`.

    Raises:
        UnknownNameError: there is no such target; with the nearest name.
    """
    facts = _Facts(model)
    return [
        Violation(
            where=where,
            rule=rule.name,
            found=found,
            expected=expected,
            required=rule.required,
            reference=rule.reference,
        )
        for rule in find_target(target).rules
        for where, found, expected in CHECKS[rule.kind](facts, rule)
    ]


def target_decisions(model: Model, target: str) -> list[Decision]:
    """What is to be said of a result for a target that cannot be run here; nothing for a CPU."""
    if find_target(target).runs_here:
        return []
    found: dict[str, list[Violation]] = {}
    for violation in check_target(model, target):
        found.setdefault(violation.rule, []).append(violation)
    verdict = f"{len(found)} rules broken" if found else "no rule of docs/targets.md is broken"
    said = [Decision(where=target, taken=True, reason=f"checked by rule, not run: {verdict}")]
    for rule, places in found.items():
        first = places[0]
        said.append(
            Decision(
                where=first.where,
                taken=False,
                reason=f"{target} rule {rule}: {first.found}, expected {first.expected}",
                figures={"places": len(places)},
            )
        )
    return said


class _Facts:
    """A model and what several rules ask of it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.types: Types = model.types()
        self.nodes: list[Node] = list(model.nodes())

    def pairs(self, *, stored: bool) -> Iterator[Node]:
        """Q and DQ nodes: of constants if `stored`, else of activations."""
        for node in self.nodes:
            if node.op in _CONVERSIONS and isinstance(node.inputs[0], Constant) == stored:
                yield node

    def stored_weights(self) -> Iterator[tuple[Node, Node]]:
        """DQ nodes of constants, each with a node that takes its output as a weight."""
        for node in self.pairs(stored=True):
            for taker in dict.fromkeys(node.outputs[0].outputs):
                if taker.op in WEIGHT_OPERATORS and node.outputs[0] in taker.inputs[:_BIAS_INPUT]:
                    yield node, taker

    def code_type(self, node: Node) -> str:
        """The type of the codes of a Q or DQ node, such as ``"uint8"``."""
        if node.op == "DequantizeLinear":
            known = self.types.of(node.inputs[0])
            elem_type = known.elem_type if known is not None else 0
        else:
            elem_type = int(node.attr("output_dtype", 0)) or TensorProto.UINT8
        if len(node.inputs) > 2 and isinstance(node.inputs[2], Constant):
            elem_type = node.inputs[2].elem_type
        return "unknown" if not elem_type else _type_name(elem_type)

    def is_float(self, tensor: Tensor) -> bool:
        known = self.types.of(tensor)
        floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
        return known is not None and known.elem_type in floats


def _type_name(elem_type: int) -> str:
    name: str = TensorProto.DataType.Name(elem_type).lower()
    return (
        "float32"
        if name == "float"
        else name.replace("float8e4m3fn", "float8_e4m3fn").replace("float4e2m1", "float4_e2m1fn")
    )


def _maker(tensor: Tensor) -> Node | None:
    if isinstance(tensor, Constant) or not tensor.inputs:
        return None
    maker: Node = tensor.inputs[0]
    return maker


def _is_dequantized(tensor: Tensor) -> bool:
    maker = _maker(tensor)
    return maker is not None and maker.op == "DequantizeLinear"


def _constant(node: Node, index: int) -> npt.NDArray[Any] | None:
    """The values of a constant input, or None."""
    if len(node.inputs) <= index or not isinstance(node.inputs[index], Constant):
        return None
    values: npt.NDArray[Any] = node.inputs[index].values
    return values


def _numbers(values: npt.NDArray[Any]) -> str:
    unique = np.unique(values.reshape(-1))
    return ", ".join(f"{value:g}" for value in unique[:3].astype(np.float64)) + (
        ", ..." if len(unique) > 3 else ""
    )


# ---------------- number formats


def _activation_types(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.pairs(stored=False):
        kind = facts.code_type(node)
        if kind not in (*rule.allowed, "unknown"):
            yield node.where, f"{kind} activations", _either(rule.allowed)


def _weight_types(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node, taker in facts.stored_weights():
        kind = facts.code_type(node)
        if rule.operators and taker.op not in rule.operators:
            continue
        if kind not in rule.allowed:
            yield taker.where, f"{kind} weights", _either(rule.allowed)


def _zero_points(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.nodes:
        if node.op not in _CONVERSIONS or len(node.inputs) < 3:
            continue
        values = _constant(node, 2)
        if values is None:
            if not node.inputs[2].is_empty():
                yield node.where, "a zero point that is computed", "zero point 0"
        elif np.any(values.astype(np.float64)):
            yield node.where, f"zero point {_numbers(values)}", "zero point 0"


def _per_channel(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node, taker in facts.stored_weights():
        scale = node.inputs[1]
        known = facts.types.of(scale)
        several = known is not None and known.shape is not None and known.shape not in ((), (1,))
        if several and taker.op not in rule.operators:
            yield (
                taker.where,
                f"a scale per channel of {taker.op}",
                f"per channel for {_either(rule.operators)} only",
            )


def _weight_pairs(facts: _Facts, rule: Rule) -> Iterator[Found]:
    limit = int(rule.allowed[0])
    for node, taker in facts.stored_weights():
        codes = _constant(node, 0)
        data = _maker(taker.inputs[0])
        unsigned = (
            data is not None and data.op == "DequantizeLinear" and facts.code_type(data) == "uint8"
        )
        if not unsigned or codes is None or codes.dtype != np.int8 or not codes.size:
            continue
        largest = largest_pair(taker, codes)
        if largest > limit:
            found = f"neighbouring int8 codes that add up to {largest}"
            yield taker.where, found, f"at most {limit}"


def _bias_types(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.pairs(stored=True):
        if facts.code_type(node) == "int32":
            yield node.where, "int32 codes", "a float bias"


def _bias_zero_point(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.pairs(stored=True):
        if facts.code_type(node) == "int32" and len(node.inputs) > 2:
            yield node.where, "int32 codes with a zero point", "no zero point"


def _fixed_16_bit(facts: _Facts, rule: Rule) -> Iterator[Found]:
    wanted = {"Sigmoid": (1 / 65536, 0), "Tanh": (1 / 32768, 32768)}
    for node in facts.nodes:
        if node.op not in rule.operators:
            continue
        for taker in node.outputs[0].outputs:
            scale = _constant(taker, 1)
            zero_point = _constant(taker, 2)
            if taker.op != "QuantizeLinear" or scale is None or zero_point is None:
                continue
            if zero_point.dtype != np.uint16:
                continue
            step, middle = wanted[str(node.op)]
            if not math.isclose(float(scale), step, rel_tol=1e-6) or int(zero_point) != middle:
                found = f"scale {float(scale):g}, zero point {int(zero_point)}"
                yield node.where, found, f"scale {step:g}, zero point {middle}"


# ---------------- placement


def _all_quantized(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.nodes:
        if node.op in _CONVERSIONS or list(node.bodies()):
            continue
        data = node.inputs[:1] if node.op in PARAMETERIZED else node.inputs
        bare = [tensor for tensor in data if facts.is_float(tensor) and not _is_dequantized(tensor)]
        if bare and not _is_merged_clamp(node):
            yield node.where, f"float input {bare[0].name!r}", "DequantizeLinear in front"
        for tensor in node.outputs:
            takers = list(dict.fromkeys(tensor.outputs))
            merged = len(takers) == 1 and _is_merged_clamp(takers[0])
            if not facts.is_float(tensor) or merged:
                continue
            if {taker.op for taker in takers} != {"QuantizeLinear"}:
                yield node.where, f"float output {tensor.name!r}", "QuantizeLinear behind"


def _is_merged_clamp(node: Node) -> bool:
    """Whether a Relu or Clip stands between a node and a QuantizeLinear that does its work.

    ONNX Runtime takes such clamps out before it asks any provider.
    """
    maker = _maker(node.inputs[0]) if node.op in CLAMPS else None
    return (
        maker is not None
        and maker.op not in _CONVERSIONS
        and {taker.op for taker in node.outputs[0].outputs} == {"QuantizeLinear"}
    )


def _inputs_quantized(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.nodes:
        if node.op not in WEIGHT_OPERATORS or node.domain:
            continue
        states = [_is_dequantized(tensor) for tensor in node.inputs[:_BIAS_INPUT]]
        if states == [True, False] or states == [False, True]:
            which = "data" if states[1] else "weight"
            yield node.where, f"its {which} is float, the other input is not", "Q/DQ on both"


def _pair_before_fusion(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.nodes:
        before = _pair_source(node.inputs[0]) if node.inputs else None
        maker = _maker(before) if before is not None else None
        if node.op in rule.operators and maker is not None and maker.op in WEIGHT_OPERATORS:
            yield node.where, f"Q/DQ between {maker.where} and {node.op}", f"Q/DQ behind {node.op}"


def _pair_source(tensor: Tensor) -> Tensor | None:
    """What a tensor is behind a Q/DQ pair, or None if it is behind none."""
    restore = _maker(tensor)
    if restore is None or restore.op != "DequantizeLinear":
        return None
    quantizer = _maker(restore.inputs[0])
    if quantizer is None or quantizer.op != "QuantizeLinear":
        return None
    source: Tensor = quantizer.inputs[0]
    return source


def _residual_quantized(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.nodes:
        if node.op != "Add" or node.domain or any(isinstance(t, Constant) for t in node.inputs):
            continue
        makers = [_maker(tensor) for tensor in node.inputs]
        if any(_is_dequantized(tensor) for tensor in node.inputs):
            continue
        fused = [
            maker
            for maker in makers
            if maker is not None
            and maker.op in WEIGHT_OPERATORS
            and all(_is_dequantized(tensor) for tensor in maker.inputs[:_BIAS_INPUT])
        ]
        if fused:
            yield (
                node.where,
                f"a float operand beside quantized {fused[0].where}",
                "Q/DQ on the other operand",
            )


# ---------------- operators and shapes


def _no_operators(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.nodes:
        if node.op in rule.operators and not node.domain:
            yield node.where, str(node.op), "the float operator between Q/DQ pairs"


def _no_qdq(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.nodes:
        if node.op in rule.operators:
            yield node.where, str(node.op), "a float operator"


def _no_control_flow(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.nodes:
        if node.op in rule.operators and not node.domain:
            yield node.where, str(node.op), "a graph without control flow"


def _static_shapes(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for tensor in facts.model.graph.inputs:
        known = facts.types.of(tensor)
        if known is not None and not known.static:
            sizes = "unknown rank" if known.shape is None else _shape(known.shape)
            yield str(tensor.name), f"input of shape {sizes}", "fixed sizes"


def _shape(sizes: Iterable[int | str | None]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in sizes)})"


def _constant_weights(facts: _Facts, rule: Rule) -> Iterator[Found]:
    for node in facts.nodes:
        if node.op in rule.operators and not isinstance(node.inputs[1], Constant):
            maker = _maker(node.inputs[1])
            found = (
                f"a weight from {maker.op}" if maker is not None else "a weight that is an input"
            )
            yield node.where, found, "a constant weight"


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


CHECKS: Mapping[RuleKind, Callable[[_Facts, Rule], Iterator[Found]]] = {
    "activation-types": _activation_types,
    "weight-types": _weight_types,
    "zero-points": _zero_points,
    "per-channel": _per_channel,
    "weight-pairs": _weight_pairs,
    "no-operators": _no_operators,
    "bias-types": _bias_types,
    "bias-zero-point": _bias_zero_point,
    "static-shapes": _static_shapes,
    "no-control-flow": _no_control_flow,
    "all-quantized": _all_quantized,
    "inputs-quantized": _inputs_quantized,
    "pair-before-fusion": _pair_before_fusion,
    "residual-quantized": _residual_quantized,
    "fixed-16-bit": _fixed_16_bit,
    "constant-weights": _constant_weights,
    "no-qdq": _no_qdq,
}
"""How each kind of rule is looked after."""
