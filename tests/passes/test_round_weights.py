"""round-weights: ONNX Runtime judges the outputs."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import SamplesError, UnknownNameError
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.numerics.affine import fake_quantize, weight_grid
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.passes.round_weights import RoundWeights
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]
Feeds = list[dict[str, Array]]


def model_of(text: str, **arrays: Array) -> Model:
    """A model of ONNX text, with initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]> {text}')
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def noise(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(dtype)


def correlated(name: str, *shape: int, count: int = 6, dtype: Any = np.float32) -> Feeds:
    """Feeds whose axis 1 (or last, of a matrix) is correlated and of unequal size."""
    rng = np.random.default_rng(5)
    axis = 1 if len(shape) > 2 else len(shape) - 1
    mixing = np.eye(shape[axis]) + rng.normal(0, 1, (shape[axis], shape[axis])) * 0.5
    mixing *= np.exp(rng.normal(size=(1, shape[axis])))
    feeds = []
    for _ in range(count):
        plain = np.moveaxis(rng.normal(size=shape), axis, -1)
        feeds.append({name: np.moveaxis(plain @ mixing, -1, axis).astype(dtype)})
    return feeds


def run(model: Model, feeds: Feeds, **options: Any) -> tuple[PassResult, dict[str, Decision]]:
    result = RoundWeights(**options).apply(model, Context(samples=Samples.from_feeds(feeds)))
    return result, {decision.where: decision for decision in result.decisions}


def gain(decision: Decision) -> float:
    """Decibels over rounding to nearest."""
    return float(decision.figures["sqnr_db"]) - float(decision.figures["nearest_sqnr_db"])


def sqnr(reference: Model, candidate: Model, feeds: Feeds) -> float:
    with open_session(reference) as before, open_session(candidate) as after:
        return compare_outputs(before, after, feeds).sqnr_db


LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    # node, shape of the weight, shape of the data
    "matmul": ("MatMul(x, w)", (24, 16), (32, 24)),
    "matmul of sequences": ("MatMul(x, w)", (24, 16), (2, 24, 24)),
    "matmul of a vector": ("MatMul(x, w)", (24, 16), (24,)),
    "matmul from the left": ("MatMul(w, x)", (16, 24), (3, 24, 10)),
    "gemm": ("Gemm(x, w)", (24, 16), (32, 24)),
    "gemm transB": ("Gemm<transB=1>(x, w)", (16, 24), (32, 24)),
    "gemm transA": ("Gemm<transA=1>(x, w)", (24, 16), (24, 32)),
    "gemm from the left": ("Gemm<alpha=2.0>(w, x)", (16, 24), (24, 32)),
    "gemm from the left, transposed": ("Gemm<transA=1,transB=1>(w, x)", (24, 16), (32, 24)),
    "conv 1x1": ("Conv(x, w)", (16, 8, 1, 1), (2, 8, 9, 7)),
    "conv 3x3": ("Conv<pads=[1,1,1,1]>(x, w)", (16, 8, 3, 3), (2, 8, 9, 7)),
    "conv strided": ("Conv<strides=[2,1],pads=[0,1,1,0]>(x, w)", (16, 8, 3, 3), (2, 8, 9, 7)),
    "conv dilated": ("Conv<dilations=[2,1]>(x, w)", (16, 8, 3, 2), (2, 8, 9, 7)),
    "conv same": ('Conv<auto_pad="SAME_UPPER",strides=[2,2]>(x, w)', (9, 8, 3, 2), (2, 8, 9, 8)),
    "conv same lower": ('Conv<auto_pad="SAME_LOWER">(x, w)', (16, 8, 2, 4), (2, 8, 9, 8)),
    "conv valid": ('Conv<auto_pad="VALID">(x, w)', (16, 8, 3, 3), (2, 8, 9, 7)),
    "conv grouped": ("Conv<group=2>(x, w)", (16, 4, 3, 3), (2, 8, 9, 7)),
    "conv depthwise": ("Conv<group=8>(x, w)", (16, 1, 3, 3), (2, 8, 9, 7)),
    "conv 1-d": ("Conv<strides=[2]>(x, w)", (16, 8, 3), (2, 8, 21)),
    "conv 3-d": ("Conv(x, w)", (6, 4, 2, 2, 2), (2, 4, 5, 6, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_figures_are_those_of_onnx_runtime(name: str) -> None:
    node, shape, data = LAYERS[name]
    text = f"g (float[{','.join(map(str, data))}] x) => (float y) {{ y = {node} }}"
    model = model_of(text, w=noise(*shape))
    original, feeds = model.copy(), correlated("x", *data)
    result, decisions = run(model, feeds, bits=4)
    assert result.changed
    figures = decisions["w"].figures
    assert gain(decisions["w"]) >= 0
    # What the Hessian foretells is what the runtime computes: so it saw the layer's inputs.
    assert sqnr(original, model, feeds) == pytest.approx(figures["sqnr_db"], abs=0.02)
    outputs = open_session(original).run(feeds[0])["y"]
    channels = model.weights()[0].shape[model.weights()[0].channel_axis or 0]
    assert figures["positions"] == len(feeds) * outputs.size // channels
    again, told = run(model, feeds, bits=4)
    assert not again.changed
    assert told["w"].reason == "its values lie on a grid of 4 bits already"


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["channel", "tensor", "block"])
def test_grids(bits: int, symmetric: bool, per: str) -> None:
    model = model_of("g (float[N,8,9,7] x) => (float y) { y = Conv(x, w) }", w=noise(16, 8, 3, 3))
    original, feeds = model.copy(), correlated("x", 2, 8, 9, 7)
    _, decisions = run(model, feeds, bits=bits, symmetric=symmetric, per=per, block_size=8)
    figures = decisions["w"].figures
    assert gain(decisions["w"]) > 0.5
    assert sqnr(original, model, feeds) == pytest.approx(figures["sqnr_db"], abs=0.05)
    values, most = model.weights()[0].values, (1 << bits) - symmetric
    shared = {"tensor": values.reshape(1, -1), "channel": values.reshape(16, -1)}
    rows = shared.get(per, values.reshape(-1, 8))
    assert max(np.unique(row).size for row in rows) <= most


def test_quantization_finds_the_grid() -> None:
    model = model_of(
        "g (float[N,8,9,7] x) => (float[N,16,7,5] y) { y = Conv(x, w) }", w=noise(16, 8, 3, 3)
    )
    feeds = correlated("x", 2, 8, 9, 7)
    run(model, feeds, reduce_range=False)
    rounded = model.weights()[0].values
    assert np.array_equal(fake_quantize(rounded, weight_grid(rounded, np.int8, 0)), rounded)
    samples = Samples.from_feeds(feeds)
    # Without VNNI scales are raised for pairs of products; the grid is then another one.
    pass_ = QuantizeStatic(placement="everywhere", reduce_range=False)
    pass_.apply(model, Context(samples=samples))
    stored = {str(c.name): c.values for c in model.constants()}
    scale = stored["w_scale"].reshape(-1, 1, 1, 1)
    assert np.array_equal(stored["w_quantized"] * scale, rounded)


def test_zeros_stay_zeros() -> None:
    weight = noise(24, 16)
    weight[np.random.default_rng(1).random(weight.shape) < 0.7] = 0
    model = model_of("g (float[N,24] x) => (float[N,16] y) { y = MatMul(x, w) }", w=weight)
    run(model, correlated("x", 32, 24), bits=4, symmetric=False)
    assert (model.weights()[0].values[weight == 0] == 0).all()


def test_float16() -> None:
    model = model_of(
        "g (float16[N,24] x) => (float16[N,16] y) { y = MatMul(x, w) }",
        w=noise(24, 16, dtype=np.float16),
    )
    feeds = correlated("x", 32, 24, dtype=np.float16)
    result, decisions = run(model, feeds, bits=4)
    assert result.changed
    assert model.weights()[0].dtype == np.float16
    assert gain(decisions["w"]) > 0
    assert not run(model, feeds, bits=4)[0].changed


MLP = """g (float[N,24] x) => (float[N,8] y) {
    a = MatMul(x, q)  b = MatMul(x, k)  c = Add(a, b)  d = Relu(c)  y = MatMul(d, v)
}"""


def mlp() -> Model:
    return model_of(MLP, q=noise(24, 20), k=noise(24, 20, seed=1), v=noise(20, 8, seed=2))


def test_memory_limit_and_batches_change_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, split = mlp(), mlp()
    feeds = correlated("x", 32, 24)
    run(whole, feeds, bits=4)
    monkeypatch.setattr("onnxslim_passes.passes.round_weights.LIMIT_BYTES", 1)
    halves = [{"x": part} for feed in feeds for part in np.split(feed["x"], 2)]
    _, decisions = run(split, halves, bits=4)
    for ours, theirs in zip(whole.weights(), split.weights(), strict=True):
        # Sums in another order tip a rounding that was close to a tie, and those that follow it.
        assert np.mean(ours.values == theirs.values) >= 0.9
    assert decisions["v"].figures["positions"] == 6 * 32


def test_sequential_rounds_for_the_inputs_that_are_left() -> None:
    apart, sequential = mlp(), mlp()
    feeds = correlated("x", 32, 24)
    run(apart, feeds, bits=2)
    _, decisions = run(sequential, feeds, bits=2, sequential=True)
    first, last = (
        [np.array_equal(a.values, b.values) for a, b in zip(one, two, strict=True)]
        for one, two in (
            (apart.weights()[:2], sequential.weights()[:2]),
            (apart.weights()[2:], sequential.weights()[2:]),
        )
    )
    assert first == [True, True]
    assert last == [False]
    assert [d.taken for d in decisions.values()] == [True] * 3


def test_a_shared_weight_counts_all_its_inputs() -> None:
    model = model_of(
        """g (float[N,24] x, float[N,24] z) => (float[N,48] y) {
            a = MatMul(x, w)  b = MatMul(z, w)  y = Concat<axis=1>(a, b)
        }""",
        w=noise(24, 24),
    )
    original = model.copy()
    pairs = zip(correlated("x", 32, 24), correlated("z", 8, 24)[::-1] * 1, strict=True)
    feeds = [one | {"z": 3 * np.tile(two["z"], (4, 1))} for one, two in pairs]
    _, decisions = run(model, feeds, bits=4)
    assert decisions["w"].figures["positions"] == 6 * 64
    measured = sqnr(original, model, feeds)
    assert measured == pytest.approx(decisions["w"].figures["sqnr_db"], abs=0.02)


REFUSALS: dict[str, tuple[str, dict[str, Array], str]] = {
    "transposed before": (
        "t = Transpose(w) y = MatMul(x, t)",
        {"w": noise(16, 24)},
        "another node stands between it and",
    ),
    "stack of matrices": (
        "y = MatMul(x, w)",
        {"w": noise(3, 24, 16)},
        "it has shape (3, 24, 16); of MatMul and Gemm only matrices are rounded",
    ),
    "other operator": (
        'y = Einsum<equation="ij,jk->ik">(x, w)',
        {"w": noise(24, 16)},
        "taken by Einsum; only MatMul, Gemm and Conv are rounded",
    ),
    "both constant": (
        "c = MatMul(k, w) y = MatMul(x, c)",
        {"w": noise(24, 16), "k": noise(24, 24)},
        "takes constants only; run fold-constants first",
    ),
    "also an embedding": (
        "i = Constant<value_ints=[1]>() e = Gather(w, i) m = MatMul(x, w) y = Add(m, e)",
        {"w": noise(24, 16)},
        "it also feeds",
    ),
    "two directions": (
        "m = MatMul(x, w) y = Gemm<transB=1>(m, w)",
        {"w": noise(24, 24)},
        "take it along different axes",
    ),
    "not a number": (
        "y = MatMul(x, w)",
        {"w": np.full((24, 16), np.nan, np.float32)},
        "is nan; expected finite numbers",
    ),
    "empty": (
        "y = MatMul(x, w)",
        {"w": noise(24, 0)},
        "has fewer elements than min_elements=1",
    ),
    "a bias": ("y = Add(x, w)", {"w": noise(24)}, "a bias (taken by Add): left as it is"),
    "zero input, infinite": (
        "n = Log(x) y = MatMul(n, w)",
        {"w": noise(24, 16)},
        "its input holds NaN or infinity on the samples",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_have_reasons(name: str) -> None:
    nodes, arrays, reason = REFUSALS[name]
    model = model_of(f"g (float[N,24] x) => (float y) {{ {nodes} }}", **arrays)
    result, decisions = run(model, correlated("x", 32, 24))
    assert not result.changed
    assert not decisions["w"].taken
    assert reason in decisions["w"].reason


def test_too_many_inputs() -> None:
    _, decisions = run(mlp(), correlated("x", 32, 24), max_inputs=20)
    reason = "24 inputs make too large a Hessian; max_inputs is 20"
    assert [decisions[name].reason == reason for name in "qkv"] == [True, True, False]


def test_branches_are_refused_aloud(if_model: onnx.ModelProto) -> None:
    model = Model.from_proto(if_model)
    feeds: Feeds = [{"x": np.ones((2, 2), np.float32), "flag": np.array(True)}]
    result, decisions = run(model, feeds)
    assert not result.changed
    reasons = [d.reason for where, d in decisions.items() if where.endswith("inner")]
    assert len(reasons) == 2
    assert all("stands in the body of a control-flow node" in reason for reason in reasons)


def test_inputs_never_seen_round_to_nearest() -> None:
    model = model_of("g (float[N,24] x) => (float y) { y = MatMul(x, w) }", w=noise(24, 16))
    original = model.weights()[0].values
    _, decisions = run(model, [{"x": np.zeros((4, 24), np.float32)}], bits=4, search_range=False)
    assert decisions["w"].reason.endswith("its inputs were 0 on all samples")
    # A scale has 16 significant bits: a hair less than the full range.
    steps = np.abs(original).max(axis=0) / 7
    assert (np.abs(model.weights()[0].values - original) <= steps * 0.5001).all()


def test_samples_and_names_are_asked_for() -> None:
    with pytest.raises(SamplesError, match="round-weights needs calibration samples"):
        RoundWeights().apply(mlp(), Context())
    with pytest.raises(UnknownNameError, match="include"):
        run(mlp(), correlated("x", 32, 24), include=("nowhere",))


def test_in_a_pipeline_the_file_shrinks() -> None:
    model = model_of("g (float[N,96] x) => (float[N,80] y) { y = MatMul(x, w) }", w=noise(96, 80))
    samples = Samples.from_feeds(correlated("x", 32, 96))
    pipeline = Pipeline([RoundWeights(bits=3, per="tensor")])
    result = pipeline.run(model, samples=samples, measure=False)
    assert result.report.fidelity["sqnr_db"] > 12
    assert result.report.after["file_bytes"] < 0.25 * result.report.before["file_bytes"]


def test_overrides_round_some_weights_otherwise() -> None:
    text = "g (float[N, 24] x) => (float[N, M] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    model = model_of(text, w=noise(24, 16, seed=1), v=noise(16, 32, seed=2))
    feeds = correlated("x", 32, 24)
    _, found = run(model, feeds, bits=4, overrides=[{"nodes": "v", "bits": 2, "per": "tensor"}])
    assert (found["w"].figures["bits"], found["v"].figures["bits"]) == (4, 2)
    values = {weight.name: weight.values for weight in model.weights()}
    assert np.unique(values["v"]).size <= 3
    assert max(np.unique(column).size for column in values["w"].T) <= 15
    assert np.unique(values["w"]).size > 15


def test_overrides_can_leave_a_weight() -> None:
    model = model_of("g (float[N, 24] x) => (float[N, M] y) { y = MatMul(x, w) }", w=noise(24, 16))
    before = model.to_proto().SerializeToString(deterministic=True)
    result, found = run(model, correlated("x", 32, 24), overrides=[{"nodes": "w", "bits": 0}])
    assert not result.changed
    assert "bits=0" in found["w"].reason
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_an_override_of_nothing_is_an_error() -> None:
    model = model_of("g (float[N, 24] x) => (float[N, M] y) { y = MatMul(x, w) }", w=noise(24, 16))
    with pytest.raises(UnknownNameError, match="overrides"):
        run(model, correlated("x", 32, 24), overrides=[{"nodes": "W1", "bits": 4}])
    with pytest.raises(ValueError, match="bits is 1"):
        RoundWeights(overrides=[{"nodes": "w", "bits": 1}])


@pytest.mark.parametrize("kind", ["MatMul", "Conv"])
def test_quantize_static_keeps_the_grid_where_pairs_saturate(kind: str) -> None:
    """On cpu-no-vnni the integers stand for the rounded weights, bit for bit."""
    if kind == "MatMul":
        text = "g (float[32, 128] x) => (float[N, M] y) { y = MatMul(x, w) }"
        weight, feeds = noise(128, 64, seed=1), correlated("x", 32, 128)
    else:
        text = """g (float[1, 32, 16, 16] x) => (float[N, C, H, W] y)
        { h = Conv <pads: ints = [1, 1, 1, 1]> (x, w) y = Relu(h) }"""
        weight, feeds = noise(32, 32, 3, 3, seed=1), correlated("x", 1, 32, 16, 16)
    model = model_of(text, w=weight)
    samples = Samples.from_feeds(feeds)
    context = Context(samples=samples, target="cpu-no-vnni")
    found = RoundWeights().apply(model, context)
    assert "widens it again" not in found.decisions[0].reason
    rounded = model.weights()[0].values.copy()
    QuantizeStatic(placement="everywhere").apply(model, context)
    stored = {constant.name: constant.values for constant in model.constants()}
    axis = 1 if kind == "MatMul" else 0
    scale = stored["w_scale"].reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    assert np.array_equal(stored["w_quantized"].astype(np.float32) * scale, rounded)
