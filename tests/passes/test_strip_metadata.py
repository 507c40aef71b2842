"""strip-metadata: notes of exporters go, all that callers see stays."""

import onnx
import onnx.parser

from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.strip_metadata import StripMetadata

TEXT = """<ir_version: 10, opset_import: ["": 18]>
g (float[2] x) => (float[2] y) <float[2] h> { h = Relu (x) y = Neg (h) }"""


def noted() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(TEXT)
    proto.metadata_props.add(key="vocabulary", value="a b c")
    proto.graph.output[0].doc_string = "logits"
    proto.graph.node[0].doc_string = "from torch"
    for message in (*proto.graph.node, *proto.graph.value_info):
        message.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File model.py" * 40)
    return proto


def test_notes_go_and_the_rest_stays() -> None:
    model = Model.from_proto(noted())
    result = StripMetadata().apply(model, Context())
    after = model.to_proto()
    assert result.changed
    assert result.decisions[0].figures["notes"] == 3
    assert not any(node.metadata_props or node.doc_string for node in after.graph.node)
    assert [info.name for info in after.graph.value_info] == ["h"]
    assert model.metadata == {"vocabulary": "a b c"}
    assert after.graph.output[0].doc_string == "logits"


def test_the_model_it_was_copied_from_keeps_them() -> None:
    original = Model.from_proto(noted())
    before = original.to_proto()
    StripMetadata().apply(original.copy(), Context())
    assert original.to_proto() == before


def test_nothing_to_do() -> None:
    model = Model.from_proto(onnx.parser.parse_model(TEXT))
    result = StripMetadata().apply(model, Context())
    assert not result.changed
    assert result.decisions == ()
