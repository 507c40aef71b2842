"""int8 weights whose products fit the 16 bits of CPUs without VNNI."""

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, Pass, PassResult
from onnxslim_passes.passes.placement.pairs import largest_pair, pair_scale
from onnxslim_passes.passes.quantize_dynamic import QuantizeDynamic
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.runtime import open_session, saturates_pairs

Array = npt.NDArray[np.float32]

RNG = np.random.default_rng(0)
# Neighbours of one sign and nearly equal size: the worst case for sums of two.
HEAVY = {
    "w1": RNG.uniform(0.8, 1, (16, 32, 1, 1)).astype(np.float32),
    "w3": RNG.uniform(0.8, 1, (16, 33, 3, 3)).astype(np.float32),
    "wd": RNG.uniform(0.8, 1, (32, 1, 3, 3)).astype(np.float32),
    "wg": RNG.uniform(0.8, 1, (16, 8, 3, 3)).astype(np.float32),
    "ws": RNG.uniform(0.8, 1, (16, 1, 8)).astype(np.float32),
    "wm": RNG.uniform(0.8, 1, (32, 1, 3, 3)).astype(np.float32),
    "m": RNG.uniform(0.8, 1, (64, 48)).astype(np.float32),
    "t": RNG.uniform(0.8, 1, (48, 64)).astype(np.float32),
    "b": np.zeros(48, np.float32),
}
NETS = {
    "1x1": ("1, 32, 8, 8", "y = Conv(x, w1)"),
    "3x3, odd channels": ("1, 33, 8, 8", "y = Conv(x, w3)"),
    "depthwise": ("1, 32, 8, 8", "y = Conv <group = 32> (x, wd)"),
    "one input channel": ("1, 1, 64", "y = Conv(x, ws)"),
    "two outputs an input channel": ("1, 16, 8, 8", "y = Conv <group = 16> (x, wm)"),
    "grouped": ("1, 32, 8, 8", "y = Conv <group = 4> (x, wg)"),
    "matmul": ("8, 64", "y = MatMul(x, m)"),
    "gemm": ("8, 64", "y = Gemm(x, m, b)"),
    "gemm, transposed": ("8, 64", "y = Gemm <transB = 1> (x, t, b)"),
}


def build(kind: str) -> Model:
    shape, body = NETS[kind]
    text = f"""<ir_version: 10, opset_import: ["": 17]>
    g (float[{shape}] x) => (float[] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    used = {name: value for name, value in HEAVY.items() if f" {name}" in body}
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in used.items())
    return Model.from_proto(proto)


def feeds(kind: str) -> list[dict[str, Array]]:
    shape = tuple(int(size) for size in NETS[kind][0].split(","))
    return [{"x": RNG.uniform(0, 4, shape).astype(np.float32)} for _ in range(2)]


def quantize(kind: str, pass_: Pass, target: str = "cpu") -> tuple[PassResult, float]:
    model, data = build(kind), feeds(kind)
    reference = model.copy()
    result = pass_.apply(model, Context(samples=Samples.from_feeds(data), target=target))
    with open_session(reference) as before, open_session(model) as after:
        return result, compare_outputs(before, after, data).sqnr_db


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("target", ["cpu", "cpu-no-vnni"])
def test_no_sum_saturates(kind: str, target: str) -> None:
    result, sqnr_db = quantize(kind, QuantizeStatic(placement="everywhere"), target)
    assert result.changed
    assert sqnr_db > 35  # saturated sums leave about 6 dB
    said = [d for d in result.decisions if "saturating 16 bits" in d.reason]
    assert bool(said) == (target == "cpu-no-vnni" or saturates_pairs())


@pytest.mark.parametrize("kind", [kind for kind, (_, body) in NETS.items() if "Conv" not in body])
def test_dynamic_products_do_not_saturate(kind: str) -> None:
    result, sqnr_db = quantize(kind, QuantizeDynamic())
    assert result.changed
    assert sqnr_db > 35


@pytest.mark.skipif(not saturates_pairs(), reason="this CPU adds in 32 bits")
@pytest.mark.parametrize("kind", [kind for kind in NETS if kind != "depthwise"])
def test_full_codes_saturate_here(kind: str) -> None:
    pass_ = QuantizeStatic(placement="everywhere", reduce_range=False)
    assert quantize(kind, pass_)[1] < 20


@pytest.mark.parametrize("kind", NETS)
def test_scales_bound_pairs_in_the_order_of_addition(kind: str) -> None:
    (node,) = build(kind).graph.nodes
    weights = node.inputs[1].values
    scale = max(float(pair_scale(node, weights, None)), float(weights.max()) / 127)
    codes = np.rint(weights / scale).astype(np.int8)
    if kind == "depthwise":
        assert largest_pair(node, codes) == 0
    else:
        assert 120 <= largest_pair(node, codes) <= 128
