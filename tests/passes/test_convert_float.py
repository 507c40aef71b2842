"""Shorter floats for weights and for graphs, judged by ONNX Runtime."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pydantic
import pytest
from onnx import numpy_helper

from onnxslim_passes.errors import UnknownNameError
from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.convert_float import ConvertFloat
from onnxslim_passes.passes.quantize_weights import QuantizeWeights
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.runtime import open_session, optimized_graph

Array = npt.NDArray[Any]


def noise(*shape: int, seed: int = 0, scale: float = 0.1) -> Array:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def parsed(text: str, opset: int = 17, **arrays: Array) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}')
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def perceptron(**changes: Array) -> Model:
    """Two products with a Relu, and an Exp that outputs what the second one takes, too."""
    arrays = {"first": noise(32, 64), "bias": noise(64), "second": noise(64, 16)} | changes
    return parsed(
        """g (float[N, 32] x) => (float[N, 16] y, float[N, 64] e) {
            h = MatMul(x, first)  b = Add(h, bias)  r = Relu(b)  e = Exp(r)
            z = MatMul(e, second)  y = Softmax(z)
        }""",
        **arrays,
    )


def convert(model: Model, **options: Any) -> tuple[PassResult, dict[str, Decision]]:
    result = ConvertFloat(**options).apply(model, Context())
    return result, {decision.where: decision for decision in result.decisions}


def fidelity(before: Model, after: Model) -> float:
    feeds = [{"x": noise(5, 32, seed=seed, scale=1)} for seed in range(3)]
    return compare_outputs(open_session(before), open_session(after), feeds).sqnr_db


@pytest.mark.parametrize(
    ("kind", "bits", "least_db"),
    [("float16", 16, 70), ("bfloat16", 16, 45), ("float8_e4m3fn", 8, 25), ("float8_e5m2", 8, 20)],
)
@pytest.mark.parametrize("opset", [13, 21])
def test_weights_are_stored_in_the_type_and_run_in_float32(
    kind: Any, bits: int, least_db: float, opset: int
) -> None:
    text = "g (float[N, 32] x) => (float[N, 256] y) { y = MatMul(x, w) }"
    before = parsed(text, opset, w=noise(32, 256))
    after = before.copy()
    result, decisions = convert(after, type=kind)
    assert result.changed
    assert decisions["w"].figures["bits"] == bits
    assert float(decisions["w"].figures["sqnr_db"]) > least_db
    rounded = after.copy()
    StoreWeights().apply(after, Context())
    # A codebook where 8-bit floats do not exist yet: 256 values of 4 bytes and the decoder.
    assert after.nbytes() <= before.nbytes() * bits / 32 + 1400
    assert fidelity(rounded, after) == np.inf
    left = [node.op_type for node in optimized_graph(after, level="basic").graph.node]
    assert left == ["MatMul"]


def test_weights_that_do_not_fit_are_left_and_said_so() -> None:
    huge, tiny, bad = noise(32, 64), noise(64, 16, scale=1e-12), noise(64)
    huge[3, 4], bad[5] = 7e4, np.nan
    model = perceptron(first=huge, second=tiny, bias=bad)
    result, decisions = convert(model)
    assert not result.changed
    assert decisions["first"].reason == "holds 70000, more than the largest float16, 65504"
    assert decisions["second"].reason == "its values are too small for float16"
    assert decisions["bias"].reason.startswith("bias[5] is nan")


def test_a_second_run_changes_nothing() -> None:
    model = perceptron()
    convert(model)
    result, decisions = convert(model)
    assert not result.changed
    assert {decision.reason for decision in decisions.values()} == {
        "every value is a float16 already"
    }


def test_quantized_weights_keep_their_grids() -> None:
    faint = noise(64, 16)
    faint[:, 3] *= 1e-6  # a channel that float16 would round
    model = perceptron(second=faint)
    QuantizeWeights(bits=4, per="block").apply(model, Context())
    _, decisions = convert(model)
    assert decisions["second"].reason.startswith("lies on a grid of 8 bits or fewer")
    assert decisions["bias"].taken


def test_eight_bits_are_for_matrices() -> None:
    _, decisions = convert(perceptron(), type="float8_e4m3fn")
    assert decisions["first"].taken
    assert "a bias" in decisions["bias"].reason


def test_weights_of_kept_nodes_stay() -> None:
    _, decisions = convert(perceptron(), keep=["MatMul"])
    assert decisions["first"].reason == "is taken by a node in `keep`"
    assert decisions["bias"].taken


def operators(model: Model) -> Counter[str]:
    return Counter(str(node.op) for node in model.nodes())


def test_a_graph_computes_in_float16_between_casts() -> None:
    before, after = perceptron(), perceptron()
    _, decisions = convert(after, weights_only=False)
    assert {decision.reason for decision in decisions.values()} == {"computes in float16"}
    # The input, and both outputs; `e` is one and feeds a product, too.
    assert operators(after)["Cast"] == 3
    assert all(weight.dtype == np.float16 for weight in after.weights())
    assert fidelity(before, after) > 50


def test_inputs_and_outputs_may_be_float16() -> None:
    model = perceptron()
    convert(model, weights_only=False, keep_io=False)
    assert operators(model)["Cast"] == 0
    session = open_session(model)
    assert session.inputs[0].dtype == np.float16
    assert [output.dtype for output in session.outputs] == [np.float16, np.float16]
    expected = open_session(perceptron()).run({"x": noise(2, 32)})["y"]
    found = session.run({"x": noise(2, 32).astype(np.float16)})["y"]
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("keep_io", [True, False])
def test_kept_operators_stay_in_float32(keep_io: bool) -> None:
    before, after = perceptron(), perceptron()
    _, decisions = convert(after, weights_only=False, keep=["Exp", "Softmax"], keep_io=keep_io)
    kept = {where for where, decision in decisions.items() if not decision.taken}
    assert {decisions[where].reason for where in kept} == {
        "kept in float32 by 'Exp'",
        "kept in float32 by 'Softmax'",
    }
    if keep_io:
        assert fidelity(before, after) > 50
    open_session(after).run({"x": noise(2, 32).astype(np.float32 if keep_io else np.float16)})


def test_one_cast_serves_all_who_need_it() -> None:
    model = parsed(
        """g (float[N, 8] x) => (float[N, 8] y) {
            a = Relu(x)  b = Exp(a)  c = Sqrt(a)  d = Add(b, c)  y = Add(d, x)
        }"""
    )
    convert(model, weights_only=False, keep=["Exp", "Sqrt"])
    # x once for Relu and Add; a once for Exp and Sqrt; b and c; y.
    assert operators(model)["Cast"] == 5
    open_session(model).run({"x": np.ones((2, 8), np.float32)})


@pytest.mark.parametrize(
    ("number", "message"),
    [(1e-12, "holds no more than 1e-12, less than the smallest"), (1e6, "holds 1e+06, more than")],
)
def test_constants_that_would_vanish_or_overflow_keep_their_node(
    number: float, message: str
) -> None:
    model = parsed(
        "g (float[N, 8] x) => (float[N, 8] y) { a = Relu(x)  b = Add(a, c)  y = Log(b) }",
        c=np.array(number, np.float32),
    )
    _, decisions = convert(model, weights_only=False)
    assert [decision.taken for decision in decisions.values()] == [True, False, True]
    assert any(message in decision.reason for decision in decisions.values())
    open_session(model).run({"x": np.ones((2, 8), np.float32)})


def test_bodies_stay_and_may_take_what_became_float16(if_model: onnx.ModelProto) -> None:
    if_model.graph.node.insert(0, onnx.helper.make_node("Relu", ["x"], ["positive"], name="relu"))
    (then,) = [a.g for a in if_model.graph.node[1].attribute if a.name == "then_branch"]
    then.node[0].input[0] = "positive"
    before = Model.from_proto(if_model)
    after = before.copy()
    result, decisions = convert(after, weights_only=False)
    assert result.changed
    assert decisions["relu"].taken
    assert decisions["choose"].reason == "has bodies, which stay as they are"
    for flag in (True, False):
        feed = {"x": np.eye(2, dtype=np.float32), "flag": np.array(flag)}
        expected = open_session(before).run(feed)["y"]
        np.testing.assert_array_equal(open_session(after).run(feed)["y"], expected)


def test_operators_that_say_their_types_stay() -> None:
    model = parsed(
        """g (float[N, 8] x) => (float[N, 8] y, double[N, 8] d) {
            a = Relu(x)  d = Cast<to = 11>(a)  y = Exp(a)
        }"""
    )
    _, decisions = convert(model, weights_only=False)
    assert "Cast says its own types" in {decision.reason for decision in decisions.values()}
    assert open_session(model).run({"x": np.ones((2, 8), np.float32)})["d"].dtype == np.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "float12"}, "float16"),
        ({"type": "bfloat16", "weights_only": False}, "has no kernels for bfloat16"),
        ({"type": "float8_e5m2", "weights_only": False}, "has no kernels for float8_e5m2"),
        ({"weights_only": False, "exclude": ["first"]}, "in float32 in `keep`"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        ConvertFloat(**options)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"'Softmx'.*'Softmax'"):
        convert(perceptron(), keep=["Softmx"])
