"""Prune, cluster, quantize and store, one after the other: what each leaves for the next."""

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
from onnxslim_passes.runtime import optimized_graph
from onnxslim_passes.storage.unpacking import unpack_weights


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
