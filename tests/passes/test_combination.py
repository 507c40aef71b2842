"""Prune, cluster, quantize and store, one after the other: what each leaves for the next."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model
from onnxslim_passes.passes import PASSES
from onnxslim_passes.passes.fine_tune import FineTune
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.recipe import Recipe
from onnxslim_passes.runtime import open_session, optimized_graph
from onnxslim_passes.storage.unpacking import unpack_weights
from tests.zoo_small import SMALL


def conv_net() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 16, 12, 12] x) => (float[N, 32, 8, 8] y) {
            h = Conv(x, first, bias)  r = Relu(h)  y = Conv(r, second)
        }"""
    )
    rng = np.random.default_rng(0)
    sizes = np.geomspace(0.02, 0.2, 32)[:, None, None, None]
    arrays = {
        "first": rng.laplace(size=(32, 16, 3, 3)) * sizes,
        "second": rng.laplace(size=(32, 32, 3, 3)) * sizes,
        "bias": rng.normal(size=32),
    }
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return Model.from_proto(proto)


@pytest.mark.parametrize("group", [1, 2])
def test_tables_of_int8_codes_survive_quantization(group: int) -> None:
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.normal(size=(1, 16, 12, 12)).astype(np.float32)} for _ in range(4)]
    passes = [
        PASSES["prune-magnitude"](sparsity=0.2),
        PASSES["cluster-weights"](scales="channel", group=group, bits=3),
        PASSES["quantize-static"](),
        PASSES["store-weights"](),
    ]
    result = Pipeline(passes).run(conv_net(), samples=Samples.from_feeds(feeds))
    stored = {
        decision.where: decision
        for decision in result.report.passes[-1].decisions
        if decision.taken and "clusters" in decision.figures
    }
    assert len(stored) == 2
    for decision in stored.values():
        assert decision.figures["per"] == "tensor"
        # 3, and what the table and the decoder take of a few thousand weights.
        assert float(decision.figures["bits_per_weight"]) < 4
    operators = [node.op_type for node in optimized_graph(result.model).graph.node]
    assert operators.count("QLinearConv") == 2
    assert "Gather" not in operators


def test_deep_compression_keeps_zeros_and_shared_values_through_training() -> None:
    rng = np.random.default_rng(2)
    feeds = [{"x": rng.normal(size=(4, 16, 12, 12)).astype(np.float32)} for _ in range(4)]
    passes = [
        replace(each, epochs=1) if isinstance(each, FineTune) else each
        for each in Recipe.open("deep").passes
    ]
    samples = Samples.from_feeds(feeds)
    result = Pipeline(passes).run(conv_net(), samples=samples, training=samples, measure=False)
    unpack_weights(result.model)
    for weight in result.model.weights():
        if weight.name in ("first", "second"):
            assert np.mean(weight.values == 0) >= 0.79
            assert np.unique(weight.values).size <= 32


@pytest.mark.parametrize("level", ["compact", "smallest"])
@pytest.mark.parametrize(
    ("network", "quantizer", "kernels"),
    [
        ("conv_bn_opset13", "quantize-static", {"QLinearConv"}),
        ("mlp", "quantize-static", {"QLinearMatMul", "QGemm"}),
        ("transformer", "quantize-static", {"MatMulIntegerToFloat"}),
        ("transformer", "quantize-dynamic", {"DynamicQuantizeMatMul"}),
        ("lstm", "quantize-dynamic", {"DynamicQuantizeMatMul"}),
        ("lstm", "quantize-weights", {"LSTM"}),
    ],
)
def test_storing_after_everything_else_changes_no_output_and_no_kernel(
    network: str, quantizer: str, kernels: set[str], level: str
) -> None:
    small = SMALL[network]()
    passes = [
        PASSES["fuse-batch-norm"](),
        PASSES["prune-magnitude"](sparsity=0.3),
        PASSES["cluster-weights"](bits=4, scales="channel"),
        PASSES[quantizer](),
    ]
    samples = Samples.from_feeds(list(small.feeds))
    model = Model.from_proto(small.proto)
    dense = Pipeline(passes).run(model, samples=samples, measure=False).model
    storing = PASSES["store-weights"](level=level, min_elements=2)
    stored = Pipeline([*passes, storing]).run(model, samples=samples, measure=False)
    assert any(decision.taken for decision in stored.report.passes[-1].decisions)
    operators = [
        Counter(node.op_type for node in optimized_graph(each).graph.node)
        for each in (dense, stored.model)
    ]
    assert operators[0] == operators[1]
    assert kernels & set(operators[1])
    for feed in small.feeds:
        expected, given = open_session(dense).run(feed), open_session(stored.model).run(feed)
        assert all(given[name].tobytes() == expected[name].tobytes() for name in expected)
