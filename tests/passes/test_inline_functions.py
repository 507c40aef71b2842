"""inline-functions: the same outputs without functions, and calls that passes can treat apart."""

import numpy as np
import onnx.parser

from onnxslim_passes import Pipeline, Samples, StoreWeights
from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.dedupe_weights import DedupeWeights
from onnxslim_passes.passes.inline_functions import InlineFunctions
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.runtime import open_session
from tests.zoo_small import SMALL

UNUSED = """
<ir_version: 10, opset_import: ["": 18, "own": 1]>
g (float[2] x) => (float[2] y) { y = Relu (x) }
<domain: "own", opset_import: ["": 18]>
idle (a) => (b) { b = Neg (a) }"""

CONVERTED = """
<ir_version: 10, opset_import: ["": 18, "own": 1]>
g (float[2, 3] x) => (float[2, 1] y) { y = own.mean (x) }
<domain: "own", opset_import: ["": 17]>
mean (a) => (b) { b = ReduceMean <axes = [1]> (a) }"""


def test_both_calls_become_nodes_with_the_same_outputs() -> None:
    small = SMALL["function_weights"]()
    original, model = Model.from_proto(small.proto), Model.from_proto(small.proto)
    result = InlineFunctions().apply(model, Context())
    assert [(d.where, d.figures) for d in result.decisions] == [
        ("local::dense", {"calls": 2, "nodes": 3})
    ]
    assert not model.functions
    assert sorted(node.op for node in model.graph.nodes) == ["MatMul"] * 4 + ["Tanh"] * 2
    with open_session(original) as one, open_session(model) as other:
        assert compare_outputs(one, other, small.feeds).max_error == 0


def test_weights_copied_for_each_call_are_shared_again() -> None:
    model = Model.from_proto(SMALL["function_weights"]().proto)
    before = model.nbytes()
    InlineFunctions().apply(model, Context())
    apart = model.nbytes()
    DedupeWeights().apply(model, Context())
    assert apart > before + 4000
    assert model.nbytes() < apart - 4000


def test_each_call_gets_ranges_of_its_own() -> None:
    small = SMALL["function_weights"]()
    model = Model.from_proto(small.proto)
    static = QuantizeStatic(placement="everywhere", per_channel=False)
    samples = Samples.from_feeds(list(small.feeds))
    whole = Pipeline([static], store=False).run(model, samples=samples, measure=False).model
    assert not any(node.op == "QuantizeLinear" for node in whole.nodes())
    flat = Pipeline([InlineFunctions(), static], store=False)
    inline = flat.run(model, samples=samples, measure=False).model
    scales = {
        float(np.ravel(node.inputs[1].values)[0])
        for node in inline.graph.nodes
        if node.op == "QuantizeLinear"
    }
    assert len(scales) >= 4


def test_a_function_that_nobody_calls_goes() -> None:
    model = Model.from_proto(onnx.parser.parse_model(UNUSED))
    (decision,) = InlineFunctions().apply(model, Context()).decisions
    assert decision.taken
    assert "no node calls it" in decision.reason
    assert not model.functions


def test_a_function_of_another_opset_is_converted() -> None:
    model = Model.from_proto(onnx.parser.parse_model(CONVERTED))
    assert InlineFunctions().apply(model, Context()).changed
    with open_session(model) as session:
        (mean,) = session.run({"x": np.array([[1, 2, 3], [2, 2, 2]], np.float32)}).values()
    np.testing.assert_array_equal(mean, [[2], [2]])


def test_decoders_of_stored_weights_stay() -> None:
    rng = np.random.default_rng(0)
    model = Model.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 18]>
            g (float[1, 256] x) => (float[1, 256] y) <float[256, 256] w> { y = MatMul (x, w) }"""
        )
    )
    values = (rng.integers(-7, 8, (256, 256)) * (rng.random((256, 256)) < 0.1)).astype(np.float32)
    proto = model.to_proto()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    model = Model.from_proto(proto)
    StoreWeights(level="smallest").apply(model, Context())
    assert model.functions
    result = InlineFunctions().apply(model, Context())
    assert not result.changed
    assert all("unpack" in decision.reason for decision in result.decisions)
