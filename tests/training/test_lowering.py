"""The training copy of a model."""

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxslim_passes import runtime
from onnxslim_passes.errors import UnknownNameError
from onnxslim_passes.model import Model
from onnxslim_passes.training import Emitter, lower


def run(model: Model | onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with runtime.open_session(model) as session:
        return session.run(feed)


@pytest.mark.parametrize("flag", [True, False])
def test_a_known_condition_chooses_its_branch(if_model: onnx.ModelProto, flag: bool) -> None:
    x = np.float32([[1, 2], [3, 4]])
    expected = run(if_model, {"x": x, "flag": np.array(flag)})["y"]
    lowered = lower(Model.from_proto(if_model), fixed_inputs={"flag": np.array(flag)})
    assert "If" not in {node.op for node in lowered.model.graph.nodes}
    assert [tensor.name for tensor in lowered.model.graph.inputs] == ["x"]
    assert np.array_equal(run(lowered.model, {"x": x})["y"], expected)
    reasons = {decision.where: decision.reason for decision in lowered.decisions}
    assert reasons["choose"] == f"its condition is always {flag}"


def test_an_unknown_condition_stays_and_is_said(if_model: onnx.ModelProto) -> None:
    lowered = lower(Model.from_proto(if_model))
    decision = next(one for one in lowered.decisions if one.where == "choose")
    assert not decision.taken
    assert "known at run time only" in decision.reason


def test_the_model_itself_is_untouched(if_model: onnx.ModelProto) -> None:
    model = Model.from_proto(if_model)
    before = model.to_proto().SerializeToString()
    lower(model, fixed_inputs={"flag": np.array(True)})
    assert model.to_proto().SerializeToString() == before


def test_functions_become_nodes() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
        g (float[N, 3] x) => (float[N, 3] y) <float[3] w = {1.0, 2.0, 3.0}> {
            y = local.scaled<factor = 2.0>(x, w)
        }
        <domain: "local", opset_import: ["" : 18]>
        scaled <factor>(a, b) => (c) {
            f = Constant<value_float: float = @factor>()
            t = Mul(a, b)
            c = Mul(t, f)
        }"""
    )
    lowered = lower(Model.from_proto(proto))
    assert [node.op for node in lowered.model.graph.nodes] == ["Mul", "Mul"]
    assert lowered.weight("w").shape == (3,)
    x = np.float32([[1, 1, 1]])
    assert run(lowered.model, {"x": x})["y"].tolist() == [[2, 4, 6]]


def test_old_opsets_are_converted() -> None:
    proto = parser.parse_model(
        """<ir_version: 4, opset_import: ["" : 9]>
        g (float[N, 3] x) => (float[N, 1] y) { y = ReduceSum<axes = [1]>(x) }"""
    )
    assert lower(Model.from_proto(proto)).model.opset == 18


def test_unknown_fixed_inputs_have_the_nearest_name(if_model: onnx.ModelProto) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'flag'"):
        lower(Model.from_proto(if_model), fixed_inputs={"flags": np.array(True)})
    with pytest.raises(UnknownNameError, match=r"Unknown weight 'outter'.*'outer'"):
        lower(Model.from_proto(if_model)).weight("outter")


def batch_normalized() -> onnx.ModelProto:
    return parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[N, 2, 4] x) => (float[N, 2, 4] y)
        <float[2] scale = {1.0, 2.0}, float[2] bias = {0.0, 1.0},
         float[2] mean = {0.5, 0.5}, float[2] var = {1.0, 2.0}> {
            y = BatchNormalization<momentum = 0.75>(x, scale, bias, mean, var)
        }"""
    )


def test_batch_statistics_update_the_running_ones() -> None:
    lowered = lower(Model.from_proto(batch_normalized()), batch_norm="batch")
    emit = Emitter(lowered.model)
    for state in lowered.state:
        emit.output(state.next, f"next {state.weight.name}")
    x = np.random.default_rng(0).normal(2, 3, (5, 2, 4)).astype(np.float32)
    found = run(lowered.model, {"x": x})
    mean, var = x.mean((0, 2)), x.var((0, 2))
    # Float32 sums of 20 elements.
    np.testing.assert_allclose(found["next mean"], 0.75 * 0.5 + 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(found["next var"], 0.75 * np.float32([1, 2]) + 0.25 * var, rtol=1e-5)


def test_normalization_in_training_mode_keeps_its_outputs() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[N, 2, 4] x, float[2] mean, float[2] var)
          => (float[N, 2, 4] y, float[2] next_mean, float[2] next_var)
        <float[2] scale = {1.0, 2.0}, float[2] bias = {0.0, 1.0}> {
            y, next_mean, next_var =
                BatchNormalization<momentum = 0.75, training_mode = 1>(x, scale, bias, mean, var)
        }"""
    )
    generator = np.random.default_rng(0)
    feed = {"x": generator.normal(2, 3, (5, 2, 4)), "mean": [1, 2], "var": [3, 4]}
    feed = {name: np.asarray(value, np.float32) for name, value in feed.items()}
    lowered = lower(Model.from_proto(proto)).model
    (node,) = (node for node in lowered.graph.nodes if node.op == "BatchNormalization")
    assert node.attr("momentum") == 0  # hands out the statistics of the batch alone
    wanted, found = run(Model.from_proto(proto), feed), run(lowered, feed)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_frozen_statistics_are_the_default() -> None:
    lowered = lower(Model.from_proto(batch_normalized()))
    assert not lowered.state
    assert lowered.model.graph.nodes[0].attr("training_mode", 0) == 0


def test_free_dimensions_are_fixed_by_symbol_or_place() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[N, T] x, float[?, T] z) => (float[N, T] y) { y = Relu(x) }"""
    )
    lowered = lower(Model.from_proto(proto), sizes={"T": 7, "z/0": 3})
    assert [tensor.shape for tensor in lowered.model.graph.inputs] == [["N", 7], [3, 7]]
    onnx.checker.check_model(lowered.model.to_proto())
    with pytest.raises(UnknownNameError, match="Unknown free dimension 'M'"):
        lower(Model.from_proto(proto), sizes={"M": 7})
