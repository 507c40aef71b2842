"""Which constants are weights, their roles, uses and channel axes."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.model import Model, Weight, load


def one_node(op: str, shapes: list[tuple[int, ...] | None], **attributes: object) -> Model:
    """A model of one node; inputs with a shape are constants w0, w1..., the others inputs."""
    names, inputs, constants = [], [], []
    for index, shape in enumerate(shapes):
        name = f"x{index}" if shape is None else f"w{index}"
        names.append(name)
        if shape is None:
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        else:
            constants.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    node = helper.make_node(op, names, ["y"], name="node", **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", inputs, [output], constants)
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def weight_of(model: Model, name: str) -> Weight:
    return next(weight for weight in model.weights() if weight.name == name)


@pytest.mark.parametrize(
    ("op", "shapes", "attributes", "axis"),
    [
        ("Conv", [None, (8, 3, 3, 3)], {}, 0),
        ("ConvTranspose", [None, (3, 8, 3, 3)], {}, 1),
        ("ConvTranspose", [None, (4, 2, 3, 3)], {"group": 2}, None),
        ("MatMul", [None, (3, 8)], {}, 1),
        ("MatMul", [None, (5, 3, 8)], {}, 2),
        ("MatMul", [None, (3,)], {}, None),
        ("Gemm", [None, (3, 8)], {}, 1),
        ("Gemm", [None, (8, 3)], {"transB": 1}, 0),
        ("LSTM", [None, (1, 16, 3)], {"hidden_size": 4}, 1),
        ("Einsum", [None, (3, 8)], {"equation": "abc,cd->abd"}, 1),
        ("Einsum", [None, (8, 3)], {"equation": "abc, dc -> abd"}, 0),
        ("Einsum", [None, (3, 2, 4)], {"equation": "abc,cde->abde"}, None),
        ("Einsum", [None, (3, 8)], {"equation": "...c,cd"}, None),
    ],
)
def test_channel_axis_of_the_second_input(
    op: str, shapes: list[tuple[int, ...] | None], attributes: dict[str, object], axis: int | None
) -> None:
    weight = weight_of(one_node(op, shapes, **attributes), "w1")
    assert weight.role in ("weight", "recurrent")
    assert weight.channel_axis == axis


@pytest.mark.parametrize(
    ("op", "shapes", "attributes", "axis"),
    [
        ("MatMul", [(8, 3), None], {}, 0),
        ("Gemm", [(8, 3), None], {}, 0),
        ("Gemm", [(3, 8), None], {"transA": 1}, 1),
        ("Gather", [(100, 16), None], {}, 0),
        ("Gather", [(16, 100), None], {"axis": 1}, 1),
    ],
)
def test_channel_axis_of_the_first_input(
    op: str, shapes: list[tuple[int, ...] | None], attributes: dict[str, object], axis: int
) -> None:
    assert weight_of(one_node(op, shapes, **attributes), "w0").channel_axis == axis


@pytest.mark.parametrize(
    ("op", "shapes", "name", "role"),
    [
        ("Conv", [None, (8, 3, 3, 3), (8,)], "w2", "bias"),
        ("Gemm", [None, (3, 8), (8,)], "w2", "bias"),
        ("Add", [None, (8,)], "w1", "bias"),
        ("Add", [None, (8, 4)], "w1", "other"),
        ("Mul", [None, (1, 8, 1, 1)], "w1", "normalization"),
        ("LayerNormalization", [None, (8,)], "w1", "normalization"),
        ("BatchNormalization", [None, (8,), (8,), (8,), (8,)], "w3", "normalization"),
    ],
)
def test_roles(op: str, shapes: list[tuple[int, ...] | None], name: str, role: str) -> None:
    assert weight_of(one_node(op, shapes), name).role == role


def test_axis_is_given_in_the_constants_own_axes_behind_a_transpose() -> None:
    model = load(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["": 18]>
            g (float[N, 3] x) => (float[N, 8] y)
            <float[8, 3] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6}>
            { t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t) }"""
        )
    )
    weight = weight_of(model, "w")
    assert (weight.role, weight.channel_axis, weight.op_types) == ("weight", 0, {"MatMul"})
    assert not weight.uses[0].direct


def test_a_shared_weight_is_one_weight_with_all_its_uses() -> None:
    model = load(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["": 18]>
            g (float[N, 2] x, int64[K] i) => (float[N, 2] y, float[K, 2] z)
            <float[2, 2] w = {1,2,3,4}>
            { y = MatMul(x, w)  z = Gather(w, i) }"""
        )
    )
    (weight,) = model.weights()
    assert {use.node.op for use in weight.uses} == {"MatMul", "Gather"}
    assert weight.role == "weight"


def test_a_weight_captured_by_a_body_and_one_inside_of_it(if_model: onnx.ModelProto) -> None:
    model = load(if_model)
    found = {weight.where: weight for weight in model.weights()}
    assert set(found) == {"outer", "choose/then_branch/inner", "choose/else_branch/inner"}
    assert found["outer"].uses[0].node.where == "choose/else_branch/else_sum"


def test_a_weight_passed_to_a_function_is_followed_into_it() -> None:
    body = [helper.make_node("MatMul", ["a", "b"], ["c"], name="inside")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "linear", ["a", "b"], ["c"], body, opsets[:1])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    call = helper.make_node("linear", ["x", "w"], ["y"], domain="local")
    weights = [numpy_helper.from_array(np.ones((2, 2), np.float32), "w")]
    graph = helper.make_graph([call], "g", [x], [y], weights)
    model = load(helper.make_model(graph, functions=[function], opset_imports=opsets))
    (weight,) = model.weights()
    assert weight.uses[0].node.where == "local::linear/inside"
    assert (weight.role, weight.channel_axis) == ("weight", 1)


def test_assigning_values_replaces_them_for_all_uses() -> None:
    model = one_node("MatMul", [None, (2, 2)])
    weight = weight_of(model, "w1")
    weight.values = np.zeros((2, 2), np.float32)
    saved = numpy_helper.to_array(model.to_proto().graph.initializer[0])
    np.testing.assert_array_equal(saved, 0)
    with pytest.raises(ValueError, match="read-only"):
        weight.values[0] = 1
