"""Edits of a graph, and what they must leave alone."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxslim_passes.errors import InvalidModelError, UnknownNameError, UnsupportedModelError
from onnxslim_passes.model import Model, Variable, load

CHAIN = """<ir_version: 8, opset_import: ["": 18]>
g (float[2, 2] x) => (float[2, 2] y)
<float[2, 2] w = {1,2,3,4}, float[2, 2] v = {5,6,7,8}>
{
  [first] a = MatMul(x, w)
  [second] b = Relu(a)
  [third] y = MatMul(b, v)
}"""


def chain() -> Model:
    return load(onnx.parser.parse_model(CHAIN))


def run(model: Model | onnx.ModelProto, **feed: np.ndarray) -> np.ndarray:
    proto = model if isinstance(model, onnx.ModelProto) else model.to_proto()
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


X = np.array([[1, -2], [3, 4]], np.float32)


def test_fresh_names_avoid_every_name_of_the_model() -> None:
    model = chain()
    names = {model.fresh_name("w") for _ in range(3)}
    assert len(names) == 3
    assert not names & {"x", "y", "w", "v", "a", "b"}


def test_a_node_put_between_two_others_is_sorted_into_place() -> None:
    model = chain()
    relu = model.graph.node("second")
    (between,) = model.graph.add_node("Neg", [relu.outputs[0]]).outputs
    model.replace_uses(relu.outputs[0], between, only=[model.graph.node("third")])
    w, v = (constant.values for constant in model.constants())
    np.testing.assert_array_equal(run(model, x=X), -np.maximum(X @ w, 0) @ v)
    assert [node.op_type for node in model.to_proto().graph.node] == [
        "MatMul",
        "Relu",
        "Neg",
        "MatMul",
    ]


def test_replace_uses_moves_the_output_name_to_the_replacement() -> None:
    model = chain()
    (y,) = model.graph.outputs
    (made,) = model.graph.add_node("Neg", [model.graph.node("second").outputs[0]]).outputs
    assert model.replace_uses(y, made) == 1
    model.remove_unused()
    proto = model.to_proto()
    assert [output.name for output in proto.graph.output] == ["y"]
    assert [node.op_type for node in proto.graph.node] == ["MatMul", "Relu", "Neg"]
    assert [tensor.name for tensor in proto.graph.initializer] == ["w"]


def test_an_input_can_replace_an_output_through_an_identity() -> None:
    model = chain()
    model.replace_uses(model.graph.outputs[0], model.graph.inputs[0])
    model.remove_unused()
    np.testing.assert_array_equal(run(model, x=X), X)
    assert [node.op_type for node in model.to_proto().graph.node] == ["Identity"]


def test_remove_unused_goes_through_bodies(if_model: onnx.ModelProto) -> None:
    model = load(if_model)
    otherwise = dict(model.graph.node("choose").bodies())["else_branch"]
    total = otherwise.node("else_sum")
    product = otherwise.node("else_mm").outputs[0]
    model.replace_uses(total.outputs[0], product)
    assert model.remove_unused() == 2  # the Add, and the outer weight that only it captured
    assert "outer" not in {constant.name for constant in model.constants()}
    flag = np.array(False)
    np.testing.assert_array_equal(run(model, x=X, flag=flag), X @ np.full((2, 2), 3, np.float32))


def test_siblings_with_one_name_stay_two_weights(if_model: onnx.ModelProto) -> None:
    model = load(if_model)
    then = next(w for w in model.weights() if w.where == "choose/then_branch/inner")
    then.values = np.zeros((2, 2), np.float32)
    np.testing.assert_array_equal(run(model, x=X, flag=np.array(True)), 0)
    expected = run(if_model, x=X, flag=np.array(False))
    np.testing.assert_array_equal(run(model, x=X, flag=np.array(False)), expected)


def test_a_copy_shares_payloads_and_nothing_else() -> None:
    model = chain()
    before = model.to_proto().SerializeToString(deterministic=True)
    copy = model.copy()
    assert copy.to_proto().SerializeToString(deterministic=True) == before
    next(iter(copy.constants())).values = np.zeros((2, 2), np.float32)
    copy.graph.add_node("Relu", [copy.graph.outputs[0]])
    copy.set_metadata("key", "value")
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_sparse_weights_come_back_bit_for_bit() -> None:
    model = chain()
    values = np.array([[0.0, -0.0], [1.5, np.nan]], np.float32)
    constant = next(iter(model.constants()))
    constant.values = values
    constant.sparse = True
    proto = model.to_proto()
    (sparse,) = proto.graph.sparse_initializer
    assert sparse.indices.int64_data == [1, 2, 3]  # -0.0 is a value, +0.0 is not
    again = {weight.name: weight for weight in load(proto).weights()}
    assert again["w"].values.tobytes() == values.tobytes()


def test_a_cycle_is_refused_with_the_node() -> None:
    model = chain()
    first, third = model.graph.node("first"), model.graph.node("third")
    first.inputs[0] = third.outputs[0]
    with pytest.raises(InvalidModelError, match=r"'first'.*cycle"):
        model.to_proto()


def test_an_unknown_node_comes_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'third'"):
        chain().graph.node("thrid")


def test_thousands_of_nodes_in_reverse_order_are_sorted_without_recursion() -> None:
    nodes = [onnx.helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(3000)]
    x = onnx.helper.make_tensor_value_info("t0", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("t3000", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(nodes[::-1], "g", [x], [y])
    model = load(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))
    assert [node.output[0] for node in model.to_proto().graph.node] == [
        f"t{i + 1}" for i in range(3000)
    ]


def test_overridable_weights_become_plain() -> None:
    proto = onnx.parser.parse_model(CHAIN)
    proto.ir_version = 3
    w = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [2, 2])
    v = onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [2, 2])
    proto.graph.input.extend([w, v])
    model = load(proto)
    assert [i.name for i in model.to_proto().graph.input] == ["x", "w", "v"]
    assert [c.name for c in model.fix_overridable_weights()] == ["w", "v"]
    fixed = model.to_proto()
    assert [i.name for i in fixed.graph.input] == ["x"]
    assert fixed.ir_version == 4
    onnx.checker.check_model(fixed)


def test_converting_the_opset_keeps_weights_names_and_metadata() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 7, opset_import: ["": 11]>
        g (float[2, 600] x) => (float[600] y)
        { [mm] a = MatMul(x, w)  [sum] y = ReduceSum<axes = [0], keepdims = 0>(a) }"""
    )
    w = np.random.default_rng(0).normal(size=(600, 600)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    proto.metadata_props.add(key="author", value="me")
    proto.graph.node[0].doc_string = "a product"
    model = load(proto)
    feed = np.ones((2, 600), np.float32)
    before = run(model, x=feed)
    model.convert_opset(18)
    converted = model.to_proto()
    onnx.checker.check_model(converted, full_check=True)
    assert (model.opset, model.metadata) == (18, {"author": "me"})
    assert model.graph.node("mm").proto.doc_string == "a product"
    np.testing.assert_array_equal(run(model, x=feed), before)
    assert converted.graph.initializer[0].raw_data == w.tobytes()


def test_converting_the_opset_keeps_what_unnamed_nodes_are_called() -> None:
    """Nodes without a name are called by their place in the file, `Constant` nodes counted."""
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 13]>
        g (float[N, 2] x) => (float[N, 2] y) {
            w = Constant <value = float[2, 2] {1, 2, 3, 4}> ()
            h = MatMul (x, w)
            y = Relu (h)
        }""")
    model = Model.from_proto(proto)
    assert [node.where for node in model.nodes()] == ["MatMul#1", "Relu#2"]
    model.convert_opset(21)
    assert [node.where for node in model.nodes()] == ["MatMul#1", "Relu#2"]


def test_models_with_functions_are_not_converted() -> None:
    opsets = [onnx.helper.make_opsetid("", 13), onnx.helper.make_opsetid("local", 1)]
    body = [onnx.helper.make_node("Relu", ["a"], ["b"])]
    function = onnx.helper.make_function("local", "f", ["a"], ["b"], body, opsets[:1])
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    call = onnx.helper.make_node("f", ["x"], ["y"], domain="local")
    graph = onnx.helper.make_graph([call], "g", [x], [y])
    model = load(onnx.helper.make_model(graph, functions=[function], opset_imports=opsets))
    with pytest.raises(UnsupportedModelError, match="functions of its own"):
        model.convert_opset(18)


def test_types_are_known_in_the_graph_and_in_bodies(if_model: onnx.ModelProto) -> None:
    model = load(if_model)
    types = model.types()
    otherwise = dict(model.graph.node("choose").bodies())["else_branch"]
    known = types.of(otherwise.node("else_mm").outputs[0])
    assert known is not None
    assert (known.shape, known.rank, known.static) == ((2, 2), 2, True)
    assert types.of(Variable("stranger")) is None


def test_the_reference_evaluator_agrees_after_a_round_trip(if_model: onnx.ModelProto) -> None:
    again = load(if_model).to_proto()
    for flag in (True, False):
        feed = {"x": X, "flag": np.array(flag)}
        expected = ReferenceEvaluator(if_model).run(None, feed)[0]
        np.testing.assert_array_equal(ReferenceEvaluator(again).run(None, feed)[0], expected)
