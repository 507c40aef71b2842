"""Shorter names and no notes: the graph stays, bodies included."""

import numpy as np
import onnx.parser

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
