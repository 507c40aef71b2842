"""Shorter names and no notes: the graph stays, bodies included."""

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.model import Model, shorten
from onnxslim_passes.runtime import open_session

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] input_of_the_model, bool flag) => (float[N, 4] output_of_the_model)
<float[4, 4] some_weight, float[N, 4] hidden_state> {
    [some_node] hidden_state = MatMul(input_of_the_model, some_weight)
    output_of_the_model = If (flag) <
        then_branch = t () => (result_of_then) {
            inner_tensor = Relu(hidden_state)  result_of_then = Neg(inner_tensor)
        },
        else_branch = e () => (result_of_else) { result_of_else = Abs(hidden_state) }>
}"""


def model() -> Model:
    proto = onnx.parser.parse_model(TEXT)
    del proto.graph.value_info[0]
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "some_weight"))
    return Model.from_proto(proto)


def test_inner_names_are_short_and_interfaces_stay() -> None:
    before, after = model(), model()
    told = shorten(after)
    assert told.names == 3  # some_weight, hidden_state, inner_tensor
    graph = after.to_proto().graph
    assert [info.name for info in graph.input] == ["input_of_the_model", "flag"]
    assert [info.name for info in graph.output] == ["output_of_the_model"]
    assert {len(tensor.name) for tensor in graph.initializer} == {1}
    assert not any(node.name for node in graph.node)
    assert not graph.value_info
    onnx.checker.check_model(after.to_proto())
    for flag in (True, False):
        feed = {"input_of_the_model": np.eye(4, dtype=np.float32), "flag": np.array(flag)}
        given, expected = (open_session(each).run(feed) for each in (after, before))
        assert np.array_equal(given["output_of_the_model"], expected["output_of_the_model"])


def test_twice_is_once() -> None:
    once = model()
    assert shorten(once).changed
    source = once.to_proto()
    assert not shorten(once).changed
    assert once.to_proto() == source


def test_names_that_annotations_refer_to_stay() -> None:
    proto = model().to_proto()
    proto.graph.quantization_annotation.add(tensor_name="some_weight")
    annotated = Model.from_proto(proto)
    assert shorten(annotated).names == 0
    assert annotated.to_proto().graph.initializer[0].name == "some_weight"


NOTED = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[M] y) {
    h = Gemm <alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 1> (x, w, b)
    e = Elu <alpha: float = 0.5> (h)
    y = Reshape <allowzero: int = 0> (e, s)
}"""


def test_what_goes_without_saying_is_not_said() -> None:
    proto = onnx.parser.parse_model(NOTED)
    arrays = {"w": np.eye(4), "b": np.ones(4)}
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "s"))
    for info in (*proto.graph.input, *proto.graph.output):
        info.metadata_props.add(key="exporter", value="says something")
        info.doc_string = "pixels"
    before, after = Model.from_proto(proto), Model.from_proto(proto)
    shorten(after)
    graph = after.to_proto().graph
    said = {node.op_type: [attribute.name for attribute in node.attribute] for node in graph.node}
    assert said == {"Gemm": ["transB"], "Elu": ["alpha"], "Reshape": []}
    for info in (*graph.input, *graph.output):
        assert not info.metadata_props
        assert info.doc_string == "pixels"
    feed = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    given, expected = (open_session(each).run(feed) for each in (after, before))
    assert np.array_equal(given["y"], expected["y"])


SPATIAL = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 1, 8, 8] x) => (float[N, 1, A, B] y) {
    c = Conv <dilations: ints = [1, 1], group: int = 1, pads: ints = [0, 0, 0, 0],
              strides: ints = [1, 2]> (x, w)
    m = MaxPool <kernel_shape: ints = [2, 2], strides: ints = [1, 1],
                 pads: ints = [0, 1, 0, 1]> (c)
    y = AveragePool <kernel_shape: ints = [2, 1], strides: ints = [1, 1]> (m)
}"""


def test_steps_of_one_and_no_padding_go_without_saying() -> None:
    proto = onnx.parser.parse_model(SPATIAL)
    weight = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    before, after = Model.from_proto(proto), Model.from_proto(proto)
    shorten(after)
    nodes = after.to_proto().graph.node
    said = {node.op_type: {attribute.name for attribute in node.attribute} for node in nodes}
    assert said == {
        "Conv": {"strides"},
        "MaxPool": {"kernel_shape", "pads"},
        "AveragePool": {"kernel_shape"},
    }
    feed = {"x": np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)}
    given, expected = (open_session(each).run(feed) for each in (after, before))
    assert np.array_equal(given["y"], expected["y"])


@pytest.mark.parametrize(("numbers", "shorter"), [([2, 4], True), ([-1], False)])
def test_whole_numbers_are_written_as_varints_where_that_is_shorter(
    numbers: list[int], shorter: bool
) -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N] x) => (float[A, B] y) { y = Reshape(x, shape) }""")
    if not shorter:
        del proto.graph.output[0].type.tensor_type.shape.dim[0]
    shape = numpy_helper.from_array(np.array(numbers, np.int64), "shape")
    proto.graph.initializer.append(shape)
    model = Model.from_proto(proto)
    shorten(model)
    written = model.to_proto().graph.initializer[0]
    assert bool(written.int64_data) == shorter
    assert numpy_helper.to_array(written).tolist() == numbers
    assert (written.ByteSize() < shape.ByteSize() - len("shape") + 1) == shorter
