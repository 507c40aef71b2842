"""The reverse sweep: paths, sums, zeros, and what has no gradient."""

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxslim_passes import runtime
from onnxslim_passes.errors import DifferentiationError
from onnxslim_passes.model import Model
from onnxslim_passes.training import Emitter, check_differentiable, gradients


def emitter_of(text: str) -> Emitter:
    header = '<ir_version: 8, opset_import: ["" : 18, "custom" : 1]>\n'
    return Emitter(Model.from_proto(parser.parse_model(header + text)))


def named(emit: Emitter) -> dict:
    made = [tensor for node in emit.graph.nodes for tensor in node.outputs]
    return {t.name: t for t in (*emit.graph.inputs, *emit.graph.initializers, *made)}


def differentiate(text: str, wrt: list[str], feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    emit = emitter_of(text)
    tensors = named(emit)
    made = gradients(emit, tensors["loss"], [tensors[name] for name in wrt])
    for name in wrt:
        emit.output(made[tensors[name]], f"d {name}")
    onnx.checker.check_model(emit.model.to_proto(), full_check=True)
    with runtime.open_session(emit.model) as session:
        found = session.run(feed)
    return {name: found[f"d {name}"] for name in wrt}


def test_a_tensor_used_three_times_sums_its_gradients() -> None:
    text = """g (float[2] x) => (float loss) {
        a = Mul(x, x)
        b = Mul(a, x)
        loss = ReduceSum<keepdims = 0>(b)
    }"""
    found = differentiate(text, ["x", "a"], {"x": np.float32([2, 3])})
    assert found["x"].tolist() == [12, 27]
    assert found["a"].tolist() == [2, 3]


def test_a_tensor_without_a_path_has_zeros() -> None:
    text = """g (float[2] x, float[N, 3] unused) => (float loss) {
        other = Relu(unused)
        loss = ReduceSum<keepdims = 0>(x)
    }"""
    feed = {"x": np.float32([2, 3]), "unused": np.ones((4, 3), np.float32)}
    found = differentiate(text, ["x", "unused"], feed)
    assert found["unused"].shape == (4, 3)
    assert not found["unused"].any()
    assert found["x"].tolist() == [1, 1]


def test_integers_stop_a_gradient() -> None:
    text = """g (float[2] x) => (float loss) {
        whole = Cast<to = 7>(x)
        again = Cast<to = 1>(whole)
        y = Mul(again, x)
        loss = ReduceSum<keepdims = 0>(y)
    }"""
    found = differentiate(text, ["x"], {"x": np.float32([2.5, -3.5])})
    assert found["x"].tolist() == [2, -3]


def test_a_stopped_tensor_is_a_constant() -> None:
    emit = emitter_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    x = named(emit)["x"]
    loss = emit.reduce_sum(emit.mul(x, emit.stop(x)))
    emit.output(gradients(emit, loss, [x])[x], "dx")
    with runtime.open_session(emit.model) as session:
        assert session.run({"x": np.float32([2, 3])})["dx"].tolist() == [2, 3]


TWO_UNKNOWN = """g (float[2] x) => (float loss) <float[2] a, float[2] b> {
    a = custom.First(x)
    b = custom.Second(a)
    c = Add(b, x)
    loss = ReduceSum<keepdims = 0>(c)
}"""


def test_all_nodes_without_a_rule_are_named_before_any_work() -> None:
    emit = emitter_of(TWO_UNKNOWN)
    tensors = named(emit)
    before = len(emit.graph.nodes)
    with pytest.raises(DifferentiationError, match=r"custom\.First.*custom\.Second") as caught:
        gradients(emit, tensors["loss"], [tensors["x"]])
    assert "--freeze-unsupported" in str(caught.value)
    assert len(emit.graph.nodes) == before
    assert caught.value.exit_code == 3


def test_nodes_without_a_rule_can_be_frozen() -> None:
    emit = emitter_of(TWO_UNKNOWN)
    tensors = named(emit)
    made = gradients(emit, tensors["loss"], [tensors["x"]], freeze_unsupported=True)
    assert [decision.taken for decision in made.decisions] == [False]
    assert "custom.Second" in made.decisions[0].reason
    assert made.connected == {tensors["x"]}


def test_a_loss_of_many_elements_is_refused() -> None:
    emit = emitter_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(DifferentiationError, match=r"'y' must be one .* shape \[2\]"):
        gradients(emit, named(emit)["y"], [named(emit)["x"]])


def test_the_question_alone_adds_nothing() -> None:
    emit = emitter_of(
        "g (float[2] x) => (float loss) { y = Shrink(x) loss = ReduceSum<keepdims = 0>(y) }"
    )
    tensors = named(emit)
    before = len(emit.graph.nodes)
    (decision,) = check_differentiable(emit, tensors["loss"], [tensors["x"]])
    assert decision.reason == "Shrink is differentiated through the operators it is defined by"
    assert len(emit.graph.nodes) == before
