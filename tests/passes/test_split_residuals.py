"""split-residuals: the runtime keeps LayerNormalization, the outputs stay."""

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.split_residuals import SplitResiduals
from onnxslim_passes.runtime import open_session, optimized_graph

RESIDUAL = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 5, 64] x) => (float[N, 5, 64] y) <float[64, 64] w, float[64] scale, float[64] bias> {
    m = MatMul (x, w)
    biased = Add (m, bias)
    s = Add (x, biased)
    y = LayerNormalization (s, scale, bias)
}"""


def residual_net(kind: type[np.floating] = np.float32) -> Model:
    text = RESIDUAL if kind is np.float32 else RESIDUAL.replace("float[", "double[")
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (64, 64)), ("scale", (64,)), ("bias", (64,))):
        values = rng.normal(size=shape).astype(kind)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return Model.from_proto(proto)


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(1).normal(size=(2, 5, 64)).astype(np.float32)}]


def fused(model: Model) -> list[str]:
    return [node.op_type for node in optimized_graph(model).graph.node]


def test_the_runtime_fuses_add_and_leaves_sum_alone() -> None:
    model = residual_net()
    assert "SkipLayerNormalization" in fused(model)
    original = model.copy()
    result = SplitResiduals().apply(model, Context())
    assert result.changed
    assert [decision.taken for decision in result.decisions] == [True]
    assert "SkipLayerNormalization" not in fused(model)
    with open_session(original) as one, open_session(model) as other:
        assert compare_outputs(one, other, feeds()).sqnr_db > 100


def test_the_sum_with_a_bias_stays_an_add() -> None:
    model = residual_net()
    SplitResiduals().apply(model, Context())
    assert [node.op for node in model.graph.nodes] == ["MatMul", "Add", "Sum", "LayerNormalization"]


def test_a_second_run_finds_nothing() -> None:
    model = residual_net()
    SplitResiduals().apply(model, Context())
    assert not SplitResiduals().apply(model, Context()).decisions


@pytest.mark.parametrize("target", ["tensorrt", "qnn"])
def test_other_targets_keep_add(target: str) -> None:
    model = residual_net()
    result = SplitResiduals().apply(model, Context(target=target))
    assert not result.changed
    assert target in result.decisions[0].reason


def test_other_types_are_left_alone() -> None:
    result = SplitResiduals().apply(residual_net(np.float64), Context())
    assert not result.changed
    assert "float32" in result.decisions[0].reason
