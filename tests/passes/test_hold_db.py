"""quantize-static:hold_db: activations that harm most get more bits, found by rounding them."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model, check_model
from onnxslim_passes.numerics.affine import choose_grid
from onnxslim_passes.passes.base import Context, NoProgress, PassResult
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.passes.sensitivity import decibels, rounding_errors, tolerable
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.runtime import Optimization, open_session

Array = npt.NDArray[Any]


def noise(*shape: int, seed: int = 0, scale: float = 0.2) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


ATTENTION = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 6, 32] x) => (float[N, 6, 32] y) {
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    kt = Transpose <perm = [0, 2, 1]> (k)
    z = MatMul (q, kt)
    s = Add (z, mask)
    p = Softmax (s)
    v = MatMul (x, wv)
    o = MatMul (p, v)
    y = MatMul (o, wo)
}"""


def attention() -> Model:
    """One head whose mask holds the lowest float32."""
    proto = onnx.parser.parse_model(ATTENTION)
    lowest = np.finfo(np.float32).min
    weights = {name: noise(32, 32, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))}
    weights["mask"] = np.where(np.triu(np.ones((6, 6)), 1) > 0, lowest, 0).astype(np.float32)
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in weights.items())
    for node in proto.graph.node:
        node.name = f"make_{node.output[0]}"
    return Model.from_proto(proto)


FEEDS = [{"x": noise(2, 6, 32, seed=seed, scale=1.0)} for seed in range(4)]


def quantize(model: Model, target: str = "cpu", **options: Any) -> PassResult:
    context = Context(samples=Samples.from_feeds(FEEDS), target=target)
    return QuantizeStatic(**options).apply(model, context)


def sqnr(model: Model) -> float:
    check_model(model)
    with open_session(attention()) as reference, open_session(model) as candidate:
        return compare_outputs(reference, candidate, FEEDS).sqnr_db


def test_masked_scores_stay_float_and_the_rest_is_quantized() -> None:
    """8 bits over a mask of -3.4e38 make all scores alike, 16 no less: only float is left."""
    model, plain = attention(), attention()
    quantize(plain, "qnn", hold_db=0)
    result = quantize(model, "qnn")
    assert sqnr(plain) < 10
    assert sqnr(model) > 20
    (masked,) = [d for d in result.decisions if d.where == "make_s" and "hold_db" in d.reason]
    assert not masked.taken
    assert "stays float: rounded alone, it leaves the outputs" in masked.reason
    assert model.opset == 17, "no activation has 16 bits, for which opset 21 would be needed"
    around = model.graph.node("make_p").inputs[0]
    assert around.inputs[0].op == "Add"
    assert model.graph.node("make_z").outputs[0].outputs[0].op == "QuantizeLinear"


def test_what_8_bits_harm_has_16_where_the_target_takes_them() -> None:
    model = attention()
    result = quantize(model, "qnn", hold_db=38)
    wide = [d for d in result.decisions if "has 16 bits" in d.reason]
    assert wide
    assert all(decision.taken for decision in wide)
    zeros = {str(n.inputs[2].dtype) for n in model.graph.nodes if n.op == "QuantizeLinear"}
    assert zeros == {"uint8", "uint16"}
    assert model.opset == 21


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_without_16_bits_nodes_beside_them_stay_float(target: str) -> None:
    model = attention()
    placement = "everywhere" if target == "cpu" else None
    result = quantize(model, target, hold_db=45, placement=placement)
    reasons = [decision.reason for decision in result.decisions if not decision.taken]
    assert any("harms the outputs most when it is rounded (hold_db)" in r for r in reasons)
    assert not any("has 16 bits" in decision.reason for decision in result.decisions)
    quantized = attention()
    quantize(quantized, target, placement=placement)
    assert sqnr(model) > sqnr(quantized)


def test_errors_are_those_of_each_tensor_alone() -> None:
    model, samples = attention(), Samples.from_feeds(FEEDS[:2])
    ranges = {"q": (-4.0, 4.0), "k": (-4.0, 4.0), "o": (-1.0, 1.0)}
    grids = {name: choose_grid(*ends, np.uint8) for name, ends in ranges.items()}
    errors = rounding_errors(model, grids, samples, allowed=0.0, progress=NoProgress())
    assert list(errors) == ["q", "k", "o"]
    exact, grid = attention(), grids["o"]
    graph, taker = exact.graph, exact.graph.node("make_y")
    parameters = [graph.add_constant("o", part) for part in (grid.scale, grid.zero_point)]
    quantized = graph.add_node("QuantizeLinear", [taker.inputs[0], *parameters]).outputs[0]
    taker.inputs[0] = graph.add_node("DequantizeLinear", [quantized, *parameters]).outputs[0]
    with open_session(model) as reference, open_session(exact) as candidate:
        wanted = compare_outputs(reference, candidate, FEEDS[:2]).sqnr_db
    assert decibels(errors["o"]) == pytest.approx(wanted, abs=0.05)


def test_a_group_that_does_little_is_not_split() -> None:
    model, samples = attention(), Samples.from_feeds(FEEDS[:1])
    grids = {name: choose_grid(-4.0, 4.0, np.uint16) for name in ("q", "k", "v")}
    errors = rounding_errors(model, grids, samples, allowed=1.0, progress=NoProgress())
    assert len(set(errors.values())) == 1


def test_as_many_as_the_allowed_error_holds() -> None:
    errors = {"a": 0.5, "b": 0.1, "c": math.inf, "d": 0.2}
    assert tolerable(errors, 0.35) == {"b", "d"}
    assert tolerable(errors, 0.05) == set()
    assert tolerable({}, 1.0) == set()
    assert decibels(0.01) == pytest.approx(20)
    assert decibels(0) == math.inf


@pytest.mark.parametrize(("target", "optimize"), [("tensorrt", "basic"), ("cpu", "all")])
def test_results_for_other_targets_are_compared_as_the_pairs_say(
    target: str, optimize: Optimization
) -> None:
    """int8 activations saturate in the kernels of some CPUs, not on the target."""
    passes = [QuantizeStatic(activations="int8", symmetric=True, reduce_range=False)]
    samples = Samples.from_feeds(FEEDS)
    result = Pipeline(passes).run(attention(), samples=samples, target=target, measure=False)
    with (
        open_session(attention()) as reference,
        open_session(result.model, optimize=optimize) as candidate,
    ):
        wanted = compare_outputs(reference, candidate, FEEDS).sqnr_db
    assert result.report.fidelity["sqnr_db"] == pytest.approx(wanted, abs=1e-6)
