"""correct-bias: the mean error of each quantized channel is gone, and nothing is slower."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import SamplesError
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, PassResult
from onnxslim_passes.passes.correct_bias import CorrectBias
from onnxslim_passes.passes.quantize_dynamic import QuantizeDynamic
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.runtime import open_session, optimized_graph

Array = npt.NDArray[Any]

CONV = "Conv <pads: ints = [1, 1, 1, 1]>"
TWO_CONVS = f"h = {CONV} (x, w, b) r = Relu (h) y = {CONV} (r, v)"
IMAGE, ROWS = (2, 16, 8, 8), (12, 16)


def noise(*shape: int, seed: int = 0, scale: float = 0.2) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


WEIGHTS = {
    "w": noise(16, 16, 3, 3, seed=1),
    "v": noise(16, 16, 3, 3, seed=2),
    "b": noise(16, seed=3),
    "m": noise(16, 8, seed=4),
    "n": noise(8, 16, seed=5),
    "c": noise(8, seed=6),
    "s": noise(1, seed=7),
}


def network(body: str, shape: str = "N, 16, 8, 8", rank: int = 4, opset: int = 17) -> Model:
    sizes = ", ".join("ABCD"[:rank])
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
    g (float[{shape}] x) => (float[{sizes}] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(values, name) for name, values in WEIGHTS.items() if name in body
    )
    return Model.from_proto(proto)


def feeds(shape: tuple[int, ...] = IMAGE) -> list[dict[str, Array]]:
    """Positive values, so that rounding errors of weights shift the means."""
    return [{"x": np.abs(noise(*shape, seed=seed, scale=1)) + 1} for seed in range(20, 24)]


def quantized(floating: Model, data: list[dict[str, Array]]) -> Model:
    model = floating.copy()
    context = Context(samples=Samples.from_feeds(data))
    pass_ = QuantizeStatic(placement="everywhere", per_channel=False, reduce_range=True)
    assert pass_.apply(model, context).changed
    return model


def correct(model: Model, floating: Model, data: list[dict[str, Array]]) -> PassResult:
    context = Context(samples=Samples.from_feeds(data), floating=floating)
    return CorrectBias().apply(model, context)


def sqnr(floating: Model, model: Model, data: list[dict[str, Array]]) -> float:
    with open_session(floating) as reference, open_session(model) as candidate:
        return compare_outputs(reference, candidate, data).sqnr_db


def channel_error(
    floating: Model, model: Model, data: list[dict[str, Array]], axes: tuple[int, ...]
) -> float:
    """The largest mean error of a channel of the output."""
    with open_session(floating) as reference, open_session(model, optimize="none") as candidate:
        errors = [candidate.run(f)["y"] - reference.run(f)["y"] for f in data]
    return float(np.abs(np.mean([error.mean(axes) for error in errors], axis=0)).max())


@pytest.mark.parametrize(
    ("body", "shape", "size"),
    [
        pytest.param(TWO_CONVS, "N, 16, 8, 8", IMAGE, id="conv"),
        pytest.param("y = Gemm (x, m, c)", "N, 16", ROWS, id="gemm"),
        pytest.param("y = Gemm (x, m, s)", "N, 16", ROWS, id="one-number"),
        pytest.param("y = Gemm <transB: int = 1> (x, n)", "N, 16", ROWS, id="gemm-no-bias"),
        pytest.param("h = MatMul (x, m) y = Add (c, h)", "N, 16", ROWS, id="matmul"),
        pytest.param(
            "h = MatMul (x, m) y = Add (h, c)", "N, T, 16", (2, 5, 16), id="matmul-float-bias"
        ),
        pytest.param("y = ConvTranspose (x, w, b)", "N, 16, 8, 8", IMAGE, id="transposed"),
    ],
)
@pytest.mark.parametrize("opset", [13, 20])
def test_means_are_those_of_float(body: str, shape: str, size: tuple[int, ...], opset: int) -> None:
    floating, data = network(body, shape, len(size), opset), feeds(size)
    model = quantized(floating, data)
    axes = (0, 2, 3) if len(size) == 4 else tuple(range(len(size) - 1))
    before = channel_error(floating, model, data, axes)
    result = correct(model, floating, data)
    assert result.changed
    assert channel_error(floating, model, data, axes) < before / 10
    assert all(decision.taken for decision in result.decisions)


def test_outputs_come_nearer() -> None:
    floating, data = network(TWO_CONVS), feeds()
    model = quantized(floating, data)
    before = sqnr(floating, model, data)
    correct(model, floating, data)
    assert sqnr(floating, model, data) > before + 3


def test_grouping_of_samples_hardly_matters() -> None:
    floating, data = network(TWO_CONVS), feeds((4, *IMAGE[1:]))
    singles = [{"x": feed["x"][i : i + 1]} for feed in data for i in range(4)]
    together, apart = quantized(floating, data), quantized(floating, data)
    correct(together, floating, data)
    correct(apart, floating, singles)
    assert sqnr(together, apart, data) > sqnr(floating, apart, data) + 10


def test_layers_stay_fused() -> None:
    floating, data = network(TWO_CONVS), feeds()
    model = quantized(floating, data)
    before = Counter(node.op_type for node in optimized_graph(model).graph.node)
    correct(model, floating, data)
    after = Counter(node.op_type for node in optimized_graph(model).graph.node)
    assert after == before
    assert after["QLinearConv"] == 2


def test_a_bias_that_two_layers_share_serves_both() -> None:
    body = f"h = {CONV} (x, w, b) r = Relu (h) y = {CONV} (r, v, b)"
    floating, data = network(body), feeds()
    model = quantized(floating, data)
    correct(model, floating, data)
    assert channel_error(floating, model, data, (0, 2, 3)) < 0.01


def test_without_integer_weights_there_is_nothing_to_do() -> None:
    floating, data = network(TWO_CONVS), feeds()
    model = floating.copy()
    result = correct(model, floating, data)
    assert not result.changed
    assert result.decisions == ()


def test_a_layer_without_counterpart_is_named() -> None:
    floating, data = network(TWO_CONVS), feeds()
    model = quantized(floating, data)
    renamed = floating.copy()
    renamed.graph.nodes[0].outputs[0].name = "elsewhere"
    refused = [d for d in correct(model, renamed, data).decisions if not d.taken]
    assert len(refused) == 1
    assert "'h' has no counterpart of this name" in refused[0].reason


def test_a_product_without_bias_is_left_alone() -> None:
    floating, data = network("y = MatMul (x, m)", "N, 16", 2), feeds(ROWS)
    model = quantized(floating, data)
    result = correct(model, floating, data)
    assert not result.changed
    assert result.decisions[0].reason == "it has no bias, and one more Add would cost time"


def test_dynamic_quantization_has_no_layers_of_this_kind() -> None:
    floating, data = network("h = MatMul (x, m) y = Add (h, c)", "N, 16", 2), feeds(ROWS)
    model = floating.copy()
    QuantizeDynamic().apply(model, Context())
    assert not correct(model, floating, data).changed


def test_the_float_model_is_needed() -> None:
    floating, data = network(TWO_CONVS), feeds()
    model = quantized(floating, data)
    with pytest.raises(SamplesError, match="in a pipeline, after quantize-static"):
        CorrectBias().apply(model, Context(samples=Samples.from_feeds(data)))
