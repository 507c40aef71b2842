"""quantize-static for a target: formats and places from the table, by rule and ONNX Runtime."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import UnknownNameError
from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, PassResult
from onnxslim_passes.passes.placement import TARGETS, check_target
from onnxslim_passes.passes.quantize_dynamic import QuantizeDynamic
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.recipe import format_pass, parse_pass
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]


def noise(*shape: int, seed: int) -> Array:
    values = np.random.default_rng(seed).normal(size=shape) / np.sqrt(np.prod(shape[1:]))
    result: Array = values.astype(np.float32)
    return result


WEIGHTS: dict[str, Any] = {
    "w": noise(16, 8, 3, 3, seed=1),
    "b": noise(16, 1, seed=2).reshape(16),
    "v": noise(16, 16, 3, 3, seed=3),
    "u": noise(16, 16, 3, 3, seed=4),
    "m": noise(16, 10, seed=5),
    "c": noise(10, 1, seed=6).reshape(10),
    "k": np.float32(0.5),
}
CONV = "Conv <pads: ints = [1, 1, 1, 1]>"
BODY = f"""
    h = {CONV} (x, w, b)  r = Relu(h)
    i = {CONV} (r, v, b)  j = Relu(i)  k0 = {CONV} (j, u)
    s = Add(r, k0)  t = Relu(s)
    p = MaxPool <kernel_shape: ints = [2, 2]> (t)
    g = GlobalAveragePool(p)  f = Flatten(g)
    z = Gemm <alpha: float = 0.5, beta: float = 2.0> (f, m, c)
    q = Mul(z, k)
    y = Softmax(q)
"""


def residual_net() -> Model:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[2, 8, 8, 8] x) => (float[2, 10] y) {{ {BODY} }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in WEIGHTS.items()
    )
    return Model.from_proto(proto)


FEEDS = [
    {"x": np.random.default_rng(seed).normal(size=(2, 8, 8, 8)).astype(np.float32)}
    for seed in range(4)
]


def quantize(model: Model, target: str, **options: Any) -> PassResult:
    context = Context(samples=Samples.from_feeds(FEEDS), target=target)
    return QuantizeStatic(**options).apply(model, context)


def sqnr_db(model: Model) -> float:
    """With all optimizations off: what the pairs themselves say."""
    with (
        open_session(residual_net()) as reference,
        open_session(model, optimize="none") as candidate,
    ):
        return compare_outputs(reference, candidate, FEEDS).sqnr_db


def takers_of(model: Model, name: str) -> list[str]:
    return sorted(
        node.op for node in model.graph.nodes for tensor in node.inputs if tensor.name == name
    )


@pytest.mark.parametrize("target", TARGETS)
def test_breaks_no_rule_and_stays_near_the_float_model(target: str) -> None:
    model = residual_net()
    result = quantize(model, target)
    assert result.changed is (target != "coreml")
    assert check_target(model, target) == []
    assert sqnr_db(model) > 25  # 8 bits, a few roundings one after the other


@pytest.mark.parametrize("target", TARGETS)
def test_says_what_was_not_run(target: str) -> None:
    result = quantize(residual_net(), target)
    said = [d for d in result.decisions if "checked by rule, not run" in d.reason]
    assert [d.where for d in said] == ([] if TARGETS[target].runs_here else [target])
    assert {d.where for d in result.decisions} >= {"Conv#0", "Conv#2", "Conv#4", "Gemm#10"}


def test_tensorrt_quantizes_inputs_only() -> None:
    model = residual_net()
    quantize(model, "tensorrt")
    by_output = {node.outputs[0].name: node for node in model.graph.nodes}
    # The convolution's own sum reaches the Add in float, where both are fused; the skip does not.
    assert takers_of(model, "k0") == ["Add"]
    skip = by_output["s"].inputs[0]
    assert skip.inputs[0].op == "DequantizeLinear"
    # Nothing behind the last layer, and nothing on a clamp's input.
    assert takers_of(model, "z") == ["Mul"]
    assert takers_of(model, "h") == ["Relu"]
    # Biases stay float, Gemm's beta included.
    gemm = by_output["z"]
    np.testing.assert_allclose(gemm.inputs[2].values, 2 * WEIGHTS["c"])
    assert gemm.attr("alpha", 1.0) == gemm.attr("beta", 1.0) == 1.0


def test_tensorrt_quantizes_a_skip_into_float_too() -> None:
    body = f"h = {CONV} (x, q1) s = Add(h, x) t = Sigmoid(s) y = Identity(t)"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 8, 8, 8] x) => (float[2, 8, 8, 8] y) {{ {body} }}"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(noise(8, 8, 3, 3, seed=8), "q1"))
    model = Model.from_proto(proto)
    quantize(model, "tensorrt")
    assert check_target(model, "tensorrt") == []
    (addition,) = [node for node in model.graph.nodes if node.op == "Add"]
    assert [tensor.inputs[0].op for tensor in addition.inputs] == ["Conv", "DequantizeLinear"]
    left_alone = Model.from_proto(proto)
    quantize(left_alone, "tensorrt", exclude=["Add#1"])
    assert [v.rule for v in check_target(left_alone, "tensorrt")] == ["residual-quantized"]


def test_qnn_quantizes_every_tensor() -> None:
    model = residual_net()
    quantize(model, "qnn")
    # The maximum's grid is its input's, so that no rescaling is needed.
    by_output = {node.outputs[0].name: node for node in model.graph.nodes}
    assert by_output["p"].inputs[1] is by_output["t"].inputs[1]
    # The addend of a Mul is an integer, too.
    assert by_output["q_float"].inputs[1].inputs[0].op == "DequantizeLinear"


def test_coreml_stays_float_unless_asked() -> None:
    model = residual_net()
    result = quantize(model, "coreml")
    (said,) = [d for d in result.decisions if d.where == "Conv#0"]
    assert "placement=nowhere" in said.reason
    assert quantize(model, "coreml", placement="everywhere").changed
    assert {v.rule for v in check_target(model, "coreml")} == {"no-qdq", "constant-weights"}


def test_given_options_win() -> None:
    model = residual_net()
    result = quantize(model, "tensorrt", symmetric=False, activations="uint8")
    broken = {violation.rule for violation in check_target(model, "tensorrt")}
    assert broken == {"zero-points", "activation-types"}
    assert any("tensorrt rule zero-points" in d.reason for d in result.decisions)


def test_target_settles_open_options_only() -> None:
    settled = QuantizeStatic(weights="uint8", reduce_range=False).for_target("cpu-no-vnni")
    assert settled.weights == "uint8"
    assert settled.reduce_range is False
    assert (settled.activations, settled.per_channel, settled.placement) == ("uint8", True, "pays")
    assert QuantizeStatic().for_target("cpu-no-vnni").reduce_range is True
    assert None not in settled.options().values()


@pytest.mark.parametrize(
    "options", [{}, {"placement": "nowhere", "symmetric": False}, {"reduce_range": True}]
)
def test_options_round_trip(options: dict[str, Any]) -> None:
    pass_ = QuantizeStatic(**options)
    assert parse_pass(format_pass(pass_)) == pass_
    assert pass_.changed_options() == options
    assert parse_pass("quantize-static:weights=none,symmetric=none") == QuantizeStatic()


def test_dynamic_quantization_says_what_a_target_does_not_take() -> None:
    result = QuantizeDynamic().apply(residual_net(), Context(target="tensorrt"))
    assert result.changed
    (said,) = [d for d in result.decisions if "tensorrt rule no-integer-operators" in d.reason]
    assert said.figures["places"] == 2


def test_unknown_target() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'qnn'"):
        quantize(residual_net(), "qnnn")
