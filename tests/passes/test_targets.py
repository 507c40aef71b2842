"""Targets: every rule has a document, a check that finds what breaks it, and a line in the page."""

from pathlib import Path
from typing import get_args

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.errors import UnknownNameError
from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.placement.targets import TARGETS, Rule, RuleKind, find_target
from onnxslim_passes.passes.placement.violations import CHECKS, Violation, check_target

PAGE = Path(__file__).resolve().parents[2] / "docs" / "targets.md"

CONSTANTS = {
    "s": np.float32(0.02),
    "s2": np.array([0.01, 0.02], np.float32),
    "z": np.uint8(128),
    "z0": np.uint8(0),
    "i0": np.int8(0),
    "i2": np.zeros(2, np.int8),
    "wide": np.array([[[[100]]], [[[-100]]]], np.int8),
    "narrow": np.array([[[[60]]], [[[-60]]]], np.int8),
    "heavy": np.array([[[[100]], [[29]]]], np.int8),
    "light": np.array([[[[100]], [[28]]]], np.int8),
    "unsigned": np.array([[[[100]]], [[[200]]]], np.uint8),
    "m": np.array([[1, 2], [3, 4]], np.int8),
    "b": np.array([5, 6], np.int32),
    "bz": np.int32(0),
    "w": np.ones((2, 1, 1, 1), np.float32),
    "one65536": np.float32(1 / 65536),
    "h0": np.uint16(0),
}


def model(body: str, *, shape: str = "1, 1, 4, 4", opset: int = 21) -> Model:
    text = f"""<ir_version: 10, opset_import: ["": {opset}]>
    g (float[{shape}] x) => (float[] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    used = {name: value for name, value in CONSTANTS.items() if name in body}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in used.items()
    )
    return Model.from_proto(proto)


def pair(source: str, result: str, zero: str, scale: str = "s") -> str:
    codes = f"{result}_codes"
    return (
        f"{codes} = QuantizeLinear({source}, {scale}, {zero}) "
        f"{result} = DequantizeLinear({codes}, {scale}, {zero}) "
    )


def conv(weight: str, zero: str, data: str, *, scale: str = "s", out: str = "y") -> str:
    axis = " <axis: int = 0>" if scale == "s2" else ""
    return (
        f"{out}_w = DequantizeLinear{axis}({weight}, {scale}, {zero}) "
        f"{out} = Conv({data}, {out}_w) "
    )


UNSIGNED = pair("x", "d", "z")
SIGNED = pair("x", "d", "i0")
BIAS = SIGNED + "v = DequantizeLinear(narrow, s, i0) q = DequantizeLinear({}) y = Conv(d, v, q)"

CASES = {
    # rule: (target, what breaks it, what does not)
    ("cpu", "activation-types"): (
        pair("x", "d", "h0") + conv("narrow", "i0", "d"),
        UNSIGNED + conv("wide", "i0", "d"),
    ),
    ("cpu-no-vnni", "weight-pairs"): (
        UNSIGNED + conv("heavy", "i0", "d"),
        UNSIGNED + conv("light", "i0", "d"),
    ),
    ("tensorrt", "zero-points"): (
        UNSIGNED + conv("narrow", "i0", "d"),
        SIGNED + conv("narrow", "i0", "d"),
    ),
    ("tensorrt", "activation-types"): (
        pair("x", "d", "z0") + conv("narrow", "i0", "d"),
        SIGNED + conv("narrow", "i0", "d"),
    ),
    ("tensorrt", "weight-types"): (
        SIGNED + conv("unsigned", "z0", "d"),
        SIGNED + conv("narrow", "i2", "d", scale="s2"),
    ),
    ("tensorrt", "bias-types"): (BIAS.format("b, s"), SIGNED + conv("wide", "i0", "d")),
    ("tensorrt", "no-integer-operators"): (
        "a, c, e = DynamicQuantizeLinear(x) i = ConvInteger(a, unsigned, e)"
        "y = Cast <to: int = 1> (i)",
        SIGNED + conv("narrow", "i0", "d"),
    ),
    ("tensorrt", "inputs-quantized"): (
        conv("narrow", "i0", "x"),
        SIGNED + conv("narrow", "i0", "d"),
    ),
    ("tensorrt", "pair-before-fusion"): (
        SIGNED + conv("narrow", "i0", "d", out="h") + pair("h", "k", "i0") + "y = Relu(k)",
        SIGNED + conv("narrow", "i0", "d", out="h") + "r = Relu(h)" + pair("r", "y", "i0"),
    ),
    ("tensorrt", "residual-quantized"): (
        SIGNED + conv("narrow", "i0", "d", out="h") + "y = Add(h, x)",
        SIGNED + conv("narrow", "i0", "d", out="h") + "y = Add(h, d)",
    ),
    ("qnn", "all-quantized"): (
        UNSIGNED + conv("unsigned", "z", "d"),
        UNSIGNED + conv("unsigned", "z", "d", out="h") + "r = Relu(h)" + pair("r", "y", "z0"),
    ),
    ("qnn", "activation-types"): (SIGNED + "y = Relu(d)", UNSIGNED + "y = Relu(d)"),
    ("qnn", "per-channel"): (
        "y = DequantizeLinear <axis: int = 1> (m, s2, i2) p = Shape(x) e = MatMul(y, y)",
        UNSIGNED + conv("narrow", "i2", "d", scale="s2"),
    ),
    ("qnn", "product-types"): (
        "d = DequantizeLinear(m, s, i0) y = MatMul(x, d)",
        UNSIGNED + conv("narrow", "i0", "d"),
    ),
    ("qnn", "fixed-16-bit"): (
        "t = Sigmoid(x)" + pair("t", "y", "h0"),
        "t = Sigmoid(x)" + pair("t", "y", "h0", scale="one65536"),
    ),
    ("coreml", "no-qdq"): (SIGNED + "y = Relu(d)", "y = Relu(x)"),
    ("coreml", "constant-weights"): (conv("narrow", "i0", "x"), "y = Conv(x, w)"),
    ("web", "bias-zero-point"): (BIAS.format("b, s, bz"), BIAS.format("b, s")),
    ("web", "no-integer-operators"): (
        "a, c, e = DynamicQuantizeLinear(x) y = DequantizeLinear(a, c, e)",
        UNSIGNED + "y = Relu(d)",
    ),
}


def broken(found: list[Violation]) -> set[str]:
    return {violation.rule for violation in found}


@pytest.mark.parametrize(("target", "rule"), CASES)
def test_finds_what_breaks_a_rule(target: str, rule: str) -> None:
    wrong, right = CASES[target, rule]
    found = [v for v in check_target(model(wrong), target) if v.rule == rule]
    assert found, "nothing found"
    assert all(v.where and v.found and v.expected and v.reference.url for v in found)
    assert rule not in broken(check_target(model(right), target))


def test_dynamic_shapes() -> None:
    relu = "y = Relu(x)"
    for target, required in (("qnn", True), ("coreml", False)):
        (found,) = [
            violation
            for violation in check_target(model(relu, shape="N, 4"), target)
            if violation.rule == "static-shapes"
        ]
        assert found.where == "x"
        assert found.found == "input of shape (N, 4)"
        assert found.required is required
        assert "static-shapes" not in broken(check_target(model(relu), target))


def test_control_flow(if_model: onnx.ModelProto) -> None:
    found = check_target(Model.from_proto(if_model), "qnn")
    assert [v.where for v in found if v.rule == "no-control-flow"] == ["choose"]


def test_float_model_breaks_no_rule_of_a_cpu() -> None:
    for target in ("cpu", "cpu-no-vnni", "tensorrt", "coreml", "web"):
        assert check_target(model("y = Conv(x, w)"), target) == []


def test_unknown_target() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'tensorrt'"):
        find_target("tensorflowrt")


def test_as_plain_data() -> None:
    (found,) = check_target(model(conv("narrow", "i0", "x")), "tensorrt")
    assert found.to_dict() == {
        "where": "Conv#1",
        "rule": "inputs-quantized",
        "found": "its data is float, the other input is not",
        "expected": "Q/DQ on both",
        "required": False,
        "reference": {"title": found.reference.title, "url": found.reference.url},
    }


# ---------------- the table


ALL_RULES = [
    pytest.param(name, rule, id=f"{name}-{rule.name}")
    for name, target in TARGETS.items()
    for rule in target.rules
]


def test_every_kind_of_rule_has_a_check() -> None:
    assert set(CHECKS) == set(get_args(RuleKind))
    assert {rule.kind for target in TARGETS.values() for rule in target.rules} == set(CHECKS)


def test_names_are_unique() -> None:
    for name, target in TARGETS.items():
        assert name == target.name
        names = [rule.name for rule in target.rules]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(("target", "rule"), ALL_RULES)
def test_page_lists_rule_with_its_document(target: str, rule: Rule) -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## `{target}`")
    section, _, _ = rest.partition("\n## ")
    (row,) = [line for line in section.splitlines() if line.startswith(f"| `{rule.name}` |")]
    assert rule.says in row
    assert rule.reference.url in row
    assert rule.reference.title in row
    assert ("required" in row) is rule.required


@pytest.mark.parametrize("target", TARGETS)
def test_page_says_what_is_unknown_and_what_is_run(target: str) -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## `{target}`")
    section, _, _ = rest.partition("\n## ")
    assert all(f"- {unknown}" in section for unknown in TARGETS[target].unknown)
    assert ("checked by rule, not run" in section) is not TARGETS[target].runs_here


# ---------------- real models


def test_network_from_tflite(shared_models: Path) -> None:
    net = load(shared_models / "robust" / "mobilenet_v1_075_192_qdq_uint8_tf.onnx")
    assert check_target(net, "cpu") == []
    assert check_target(net, "qnn") == []
    expected = {"zero-points", "activation-types", "weight-types", "bias-types"}
    assert broken(check_target(net, "tensorrt")) == expected
    assert broken(check_target(net, "coreml")) == {"no-qdq", "constant-weights"}
