"""smooth-activations: the same outputs in float, better ones on integers."""

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
from onnxslim_passes.passes.quantize_dynamic import QuantizeDynamic
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.passes.smooth_activations import SmoothActivations
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]
Feed = dict[str, Array]

NORMALIZED = "n = LayerNormalization (x, g, b)"
DECOMPOSED = """m = ReduceMean <axes: ints = [-1]> (x) d = Sub (x, m) q = Mul (d, d)
    v = ReduceMean <axes: ints = [-1]> (q) e = Add (v, tiny) r = Sqrt (e) z = Div (d, r)
    k = Mul (z, g) n = Add (k, b)"""


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def outliers(seed: int) -> Array:
    """A scale of each of 32 channels, two of them 50 times as large."""
    scale = np.abs(noise(32, seed=seed)) + np.float32(0.5)
    scale[[3, 17]] *= 50
    return scale


WEIGHTS = {
    "g": outliers(1),
    "b": noise(32, seed=2) * outliers(1),
    "o": (1 / outliers(1)).astype(np.float32),
    "w": noise(32, 24, seed=3, scale=0.2),
    "w2": noise(32, 16, seed=4, scale=0.2),
    "wt": noise(24, 32, seed=5, scale=0.2),
    "u": noise(32, 32, seed=6, scale=0.2) * outliers(1),
    "c": noise(32, seed=7) * outliers(1),
    "tiny": np.array([1e-5], np.float32),
}


def network(body: str, outputs: str = "float[N, T, A] y", shape: str = "N, T, 32") -> Model:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[{shape}] x) => ({outputs}) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(values, name) for name, values in WEIGHTS.items() if name in used
    )
    return Model.from_proto(proto)


def feeds(*shape: int) -> list[Feed]:
    return [{"x": noise(*(shape or (2, 6, 32)), seed=seed)} for seed in range(30, 34)]


def smooth(model: Model, data: list[Feed] | None = None, **options: Any) -> PassResult:
    context = Context(samples=Samples.from_feeds(data if data is not None else feeds()))
    return SmoothActivations(**options).apply(model, context)


def sqnr(reference: Model, candidate: Model, data: list[Feed]) -> float:
    with open_session(reference) as left, open_session(candidate) as right:
        return compare_outputs(left, right, data).sqnr_db


def quantized(model: Model) -> Model:
    copy = model.copy()
    assert QuantizeDynamic().apply(copy, Context()).changed
    return copy


CASES = [
    pytest.param(f"{NORMALIZED} y = MatMul (n, w)", "LayerNormalization", id="normalization"),
    pytest.param(f"{DECOMPOSED} y = MatMul (n, w)", "Mul", id="decomposed"),
    pytest.param("h = MatMul (x, u) n = Add (h, c) y = MatMul (n, w)", "MatMul", id="linear"),
    pytest.param("h = MatMul (x, u) n = Relu (h) y = MatMul (n, w)", "MatMul", id="relu"),
    pytest.param("n = Mul (x, g) y = MatMul (n, w)", "Mul", id="mul"),
    pytest.param(
        f"{NORMALIZED} p = MatMul (n, w) q = MatMul (n, w2) y = Concat <axis: int = -1> (p, q)",
        "LayerNormalization",
        id="two-products",
    ),
    pytest.param(
        f"{NORMALIZED} p = MatMul (n, w) q = MatMul (n, w) y = Sub (p, q) z = Add (y, p)",
        "LayerNormalization",
        id="shared-weight",
    ),
]


@pytest.mark.parametrize(("body", "maker"), CASES)
def test_outliers_move_into_what_makes_them(body: str, maker: str) -> None:
    outputs = "float[N, T, A] z" if " z = Add" in body else "float[N, T, A] y"
    floating = network(body, outputs)
    model = floating.copy()
    nodes = [node.op for node in model.graph.nodes]
    result = smooth(model)
    taken = [decision for decision in result.decisions if decision.taken]
    assert result.changed
    assert f"from {maker} " in taken[-1].reason
    assert [node.op for node in model.graph.nodes] == nodes
    assert sqnr(floating, model, feeds()) > 100
    before = sqnr(floating, quantized(floating), feeds())
    assert sqnr(floating, quantized(model), feeds()) > before + 4


@pytest.mark.parametrize(
    "product", ["Gemm <transB: int = 1> (n, wt)", "Gemm <alpha: float = 0.5> (n, w)"]
)
def test_gemm(product: str) -> None:
    floating = network(f"n = Mul (x, g) y = {product}", "float[N, A] y", "N, 32")
    model, data = floating.copy(), feeds(12, 32)
    assert smooth(model, data).changed
    assert sqnr(floating, model, data) > 100
    assert sqnr(floating, quantized(model), data) > sqnr(floating, quantized(floating), data) + 6


RESIDUAL = f"{NORMALIZED} p = MatMul (n, u) y = Add (p, n)"


def test_others_that_take_the_activation_make_a_mul_necessary() -> None:
    floating = network(RESIDUAL)
    model = floating.copy()
    result = smooth(model, insert_below_db=60.0)
    assert result.changed
    assert 20 < float(result.decisions[0].figures["output_db"]) < 60
    assert "takes the activation as it is" in result.decisions[0].reason
    assert [node.op for node in model.graph.nodes].count("Mul") == 1
    assert sqnr(floating, model, feeds()) > 100


def test_a_mul_is_put_only_where_it_is_wanted() -> None:
    model = network(RESIDUAL)
    result = smooth(model, insert_below_db=-100.0)
    assert not result.changed
    assert "a Mul is not worth its time" in result.decisions[0].reason


def test_another_taker_of_a_constant_keeps_its_values() -> None:
    body = f"{NORMALIZED} p = MatMul (n, w) s = Mul (x, g) t = MatMul (s, w2)"
    body += " y = Concat <axis: int = -1> (p, t)"
    floating = network(body)
    model = floating.copy()
    assert smooth(model).changed
    assert sqnr(floating, model, feeds()) > 100


def test_a_lone_outlier_is_scaled_alone() -> None:
    """One channel of 32 stands out: weights of the others must not get coarser for it."""
    floating = network("n = Mul (x, o) y = MatMul (n, w)")
    data = feeds()
    for feed in data:
        feed["x"] = feed["x"] / WEIGHTS["o"]
        feed["x"][:, :, 5] *= 100
    model, evened = floating.copy(), floating.copy()
    (decision,) = [d for d in smooth(model, data).decisions if d.taken]
    assert decision.figures["channels"] == 1
    assert "threshold" in decision.figures
    smooth(evened, data, alpha=0.7)
    assert sqnr(floating, quantized(model), data) > sqnr(floating, quantized(evened), data)
    assert sqnr(floating, model, data) > 100  # reordered float32 products


def test_even_channels_stay_as_they_are() -> None:
    model = network("y = MatMul (x, w)")
    result = smooth(model, min_gain_db=3)
    assert not result.changed
    assert "its channels are even" in result.decisions[0].reason


@pytest.mark.parametrize("alpha", [None, 0.5, 0.8])
def test_a_second_run_finds_nothing(alpha: float | None) -> None:
    model = network(RESIDUAL)
    assert smooth(model, alpha=alpha, insert_below_db=60.0).changed
    assert not smooth(model, alpha=alpha, insert_below_db=60.0, min_gain_db=0.01).changed


def test_dead_channels_and_zero_weights() -> None:
    floating = network("n = Mul (x, g) y = MatMul (n, w)")
    scale, weight = WEIGHTS["g"].copy(), WEIGHTS["w"].copy()
    scale[:4], weight[4:8] = 0, 0
    for constant in floating.constants():
        constant.values = {"g": scale, "w": weight}[constant.name]
    model = floating.copy()
    assert smooth(model).changed
    assert sqnr(floating, model, feeds()) > 100


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("n = Mul (x, g) p = MatMul (n, w) q = MatMul (x, w) y = Add (p, q)", "several activ"),
        ("n = Mul (x, g) p = Cast <to: int = 1> (w) y = MatMul (n, p)", "MatMul and Gemm are"),
    ],
)
def test_what_is_passed_over(body: str, reason: str) -> None:
    model = network(body)
    result = smooth(model)
    assert not result.changed
    assert any(reason in decision.reason for decision in result.decisions)


def test_samples_are_needed() -> None:
    with pytest.raises(SamplesError, match="needs calibration samples"):
        SmoothActivations().apply(network("y = MatMul (x, w)"), Context())


# ---------------- convolutions behind a gate

GATE = "p = GlobalAveragePool (x) f = Conv (p, squeeze) a = HardSigmoid (f) z = Mul (x, a)"
GATED = f"{GATE} y = Conv <pads: ints = [1, 1, 1, 1]> (z, k, kb)"
GATED_WEIGHTS = {
    "squeeze": noise(32, 32, 1, 1, seed=8, scale=0.2),
    "k": noise(24, 32, 3, 3, seed=9, scale=0.1),
    "kb": noise(24, seed=10),
    "l": noise(16, 32, 1, 1, seed=11, scale=0.1),
    "grouped": noise(32, 1, 1, 1, seed=12),
    "one": np.ones((1, 32, 1, 1), np.float32),
}


def gated(body: str = GATED, outputs: str = "float[N, 24, 8, 8] y") -> Model:
    proto = network(body, outputs, "N, 32, 8, 8").to_proto()
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(v, name) for name, v in GATED_WEIGHTS.items() if name in used
    )
    return Model.from_proto(proto)


def images() -> list[Feed]:
    """Two channels are 50 times as large as others."""
    scale = outliers(1).reshape(1, 32, 1, 1)
    return [{"x": noise(2, 32, 8, 8, seed=seed) * scale} for seed in range(3)]


def test_outliers_of_a_gated_convolution_go_into_its_weight() -> None:
    model, data = gated(), images()
    plain = model.copy()
    assert smooth(model, data).changed
    assert sqnr(plain, model, data) > 100
    assert not smooth(model.copy(), data).changed
    (scaled,) = [
        node for node in model.graph.nodes if node.op == "Mul" and node.inputs[0].name == "a"
    ]
    assert scaled.inputs[1].shape == (1, 32, 1, 1)
    finer = {}
    for name, candidate in (("plain", plain), ("smooth", model)):
        copy = candidate.copy()
        context = Context(samples=Samples.from_feeds(data))
        assert QuantizeStatic(placement="everywhere", op_types=("Conv",)).apply(copy, context)
        finer[name] = sqnr(candidate, copy, data)
    assert finer["smooth"] > finer["plain"] + 3


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (GATED + " o = Relu (z)", "float[N, 24, 8, 8] y, float[N, 32, 8, 8] o"),
        (GATED, "float[N, 24, 8, 8] y, float[N, 32, 8, 8] z"),
        ("z = Mul (x, one) y = Conv (z, l)", "float[N, 16, 8, 8] y"),
        ("z = Mul (x, x) y = Conv (z, l)", "float[N, 16, 8, 8] y"),
        (
            f"{GATE} y = Conv <group: int = 32> (z, grouped)",
            "float[N, 32, 8, 8] y",
        ),
    ],
)
def test_other_convolutions_stay(body: str, outputs: str) -> None:
    model = gated(body, outputs)
    result = smooth(model, images())
    assert not result.changed
    assert any("behind a gate" in decision.reason for decision in result.decisions)


def test_two_convolutions_share_a_gate_only_if_both_are_smoothed() -> None:
    body, outputs = GATED + " o = Conv (z, l)", "float[N, 24, 8, 8] y, float[N, 16, 8, 8] o"
    model, data = gated(body, outputs), images()
    plain = model.copy()
    assert smooth(model, data).changed
    assert sqnr(plain, model, data) > 100
    partial = gated(body, outputs)
    result = smooth(partial, data, exclude=("l",))
    assert not result.changed
    assert any("takes the activation as it is" in d.reason for d in result.decisions)
