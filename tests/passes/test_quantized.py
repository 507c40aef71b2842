"""Models that are quantized already: left alone or completed, never twice, and said."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model, load
from onnxslim_passes.passes import PASSES
from onnxslim_passes.passes.base import Context, PassResult
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.runtime import open_session, optimized_graph, saturates_pairs

Array = npt.NDArray[Any]

QUANTIZING = ["quantize-dynamic", "quantize-static"]

RNG = np.random.default_rng(7)
CONSTANTS: dict[str, Any] = {
    "s": np.float32(0.05),
    "s16": (RNG.random(16) * 0.01 + 0.005).astype(np.float32),
    "z": np.uint8(128),
    "i": np.int8(0),
    "i16": np.zeros(16, np.int8),
    "conv8": RNG.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8),
    "uconv8": RNG.integers(0, 256, (16, 16, 3, 3)).astype(np.uint8),
    "mat8": RNG.integers(-127, 128, (16, 16)).astype(np.int8),
    "mat4": RNG.integers(0, 256, (16, 1, 8)).astype(np.uint8),
    "s4": np.full(16, 0.01, np.float32),
    "table8": RNG.integers(-127, 128, (512, 16)).astype(np.int8),
    "ids": np.array([1, 2, 3, 4], np.int64),
    "bias": RNG.normal(size=16).astype(np.float32),
    "huge": np.full(16, 1e9, np.float32),
}
IMAGE, ROWS = "1, 16, 16, 16", "64, 16"


def build(body: str, shape: str, out: str = "float[] y") -> Model:
    text = f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
    g (float[{shape}] x) => ({out}) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in CONSTANTS.items()
        if name in words
    )
    return Model.from_proto(proto)


def feeds(shape: str, count: int = 4) -> list[dict[str, Array]]:
    sizes = [int(size) for size in shape.split(",")]
    draw = [np.random.default_rng(seed).normal(size=sizes) for seed in range(count)]
    return [{"x": values.astype(np.float32)} for values in draw]


def run_pass(name: str, model: Model, shape: str) -> PassResult:
    return PASSES[name]().apply(model, Context(samples=Samples.from_feeds(feeds(shape))))


PAD = "<pads: ints = [1, 1, 1, 1]>"
DONE = {
    # a word of the decision, the shape of x, the graph
    "Q/DQ": (
        "already",
        IMAGE,
        f"q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        f"w = DequantizeLinear(conv8, s, i) c = Conv {PAD} (d, w)"
        "e = QuantizeLinear(c, s, z) y = DequantizeLinear(e, s, z)",
    ),
    "QLinearConv": (
        "runs on integers already: QLinearConv",
        IMAGE,
        f"q = QuantizeLinear(x, s, z) c = QLinearConv {PAD} (q, s, z, conv8, s, i, s, z)"
        "y = DequantizeLinear(c, s, z)",
    ),
    "ConvInteger": (
        "runs on integers already: ConvInteger",
        IMAGE,
        f"q, t, o = DynamicQuantizeLinear(x) c = ConvInteger {PAD} (q, uconv8, o, z)"
        "f = Cast <to: int = 1> (c) y = Mul(f, t)",
    ),
    "MatMulInteger": (
        "runs on integers already: MatMulInteger",
        ROWS,
        "q, t, o = DynamicQuantizeLinear(x) c = MatMulInteger(q, mat8, o, i)"
        "f = Cast <to: int = 1> (c) y = Mul(f, t)",
    ),
    "MatMulNBits": (
        "runs on integers already: com.microsoft.MatMulNBits",
        ROWS,
        "y = com.microsoft.MatMulNBits <K: int = 16, N: int = 16, bits: int = 4,"
        " block_size: int = 16> (x, mat4, s4)",
    ),
    "table": (
        "its table is stored as int8 already",
        ROWS,
        "d = DequantizeLinear(table8, s, i) t = Gather(d, ids)"
        "u = ReduceSum <keepdims: int = 0> (t) y = Add(x, u)",
    ),
}


@pytest.mark.parametrize("name", QUANTIZING)
@pytest.mark.parametrize("kind", DONE)
def test_nothing_is_quantized_twice(kind: str, name: str) -> None:
    word, shape, body = DONE[kind]
    model = build(body, shape)
    before = model.to_proto().SerializeToString()
    result = run_pass(name, model, shape)
    assert not result.changed
    assert model.to_proto().SerializeToString() == before
    assert [d for d in result.decisions if word in d.reason], result.decisions
    assert not any(d.taken for d in result.decisions)


@pytest.mark.parametrize("name", ["prune-magnitude", "cluster-weights"])
@pytest.mark.parametrize("kind", DONE)
def test_integers_are_no_float_weights(kind: str, name: str) -> None:
    _, shape, body = DONE[kind]
    model = build(body, shape)
    result = run_pass(name, model, shape)
    assert not result.changed
    (said,) = [d for d in result.decisions if "is stored as" in d.reason]
    assert said.where in ("conv8", "uconv8", "mat8", "mat4", "table8")


# ---------------- completion

HALF = {
    "Conv, a scale a channel": (
        IMAGE,
        f"w = DequantizeLinear <axis: int = 0> (conv8, s16, i16) y = Conv {PAD} (x, w, bias)",
        "QLinearConv",
    ),
    "Conv, one scale, no zero point": (
        IMAGE,
        f"w = DequantizeLinear(conv8, s) y = Conv {PAD} (x, w, bias)",
        "QLinearConv",
    ),
    "Conv, uint8 around 128": (
        IMAGE,
        f"w = DequantizeLinear(uconv8, s, z) y = Conv {PAD} (x, w)",
        "QLinearConv",
    ),
    "MatMul": (
        ROWS,
        "w = DequantizeLinear <axis: int = 1> (mat8, s16, i16) y = MatMul(x, w)",
        "MatMulIntegerToFloat",
    ),
    "MatMul and Add": (
        ROWS,
        "w = DequantizeLinear(mat8, s, i) h = MatMul(x, w) y = Add(h, bias)",
        "QGemm",
    ),
    "Gemm": (
        ROWS,
        "w = DequantizeLinear <axis: int = 0> (mat8, s16, i16)"
        "y = Gemm <transB: int = 1> (x, w, bias)",
        "QGemm",
    ),
}


def moved(codes: bytes) -> bytes:
    """int8 codes as uint8 ones, their zero point 128."""
    return (np.frombuffer(codes, np.int8) ^ np.int8(-128)).tobytes()


def completed(pairs: bool) -> QuantizeStatic:
    return QuantizeStatic(placement="everywhere", reduce_range=pairs)


@pytest.mark.parametrize("pairs", [False, True], ids=["as stored", "pairs fit"])
@pytest.mark.parametrize("kind", HALF)
def test_float_activations_are_completed(kind: str, pairs: bool) -> None:
    shape, body, operator = HALF[kind]
    model, reference = build(body, shape), build(body, shape)
    codes = {c.name: c.values.tobytes() for c in model.constants() if c.name in CONSTANTS}
    samples = Samples.from_feeds(feeds(shape))
    result = completed(pairs).apply(model, Context(samples=samples))
    assert result.changed
    (said,) = [d for d in result.decisions if "as they were stored" in d.reason]
    assert said.taken
    # The weight and its grid are the same bytes as before; as uint8 where pairs would saturate.
    after = {c.name: c.values.tobytes() for c in model.constants()}
    kept = [name for name in codes if "8" in name or name in ("s", "s16")]
    shifted = {name: after.get(f"{name}_unsigned") for name in kept if name not in after}
    assert all(after.get(name, codes[name]) == codes[name] for name in kept)
    assert all(value == moved(codes[name]) for name, value in shifted.items())
    assert len(shifted) == (pairs and "uint8" not in kind)
    assert operator in {node.op_type for node in optimized_graph(model, weights=False).graph.node}
    if pairs or not saturates_pairs():
        with open_session(reference) as before, open_session(model) as now:
            assert compare_outputs(before, now, feeds(shape)).sqnr_db > 35  # 8 bits: over 40 dB
    assert not completed(pairs).apply(model, Context(samples=samples)).changed


REFUSED = {
    "blocks": (
        "w = DequantizeLinear <axis: int = 0, block_size: int = 8> (mat8, blocks)y = MatMul(x, w)",
        "a scale for each block",
    ),
    "rows": (
        "w = DequantizeLinear <axis: int = 0> (mat8, s16, i16) y = MatMul(x, w)",
        "which is not the output channels'",
    ),
    "alpha": (
        "w = DequantizeLinear(mat8, s, i) y = Gemm <alpha: float = 0.5> (x, w)",
        "alpha or beta is not 1",
    ),
    "computed scale": (
        "t = Abs(s) w = DequantizeLinear(mat8, t, i) y = MatMul(x, w)",
        "a scale that is computed",
    ),
    "zero scale": (
        "w = DequantizeLinear(mat8, none, i) y = MatMul(x, w)",
        "not positive float32",
    ),
    "another taker": (
        "w = DequantizeLinear(mat8, s, i) m = MatMul(x, w) u = ReduceSum <keepdims: int = 0> (w)"
        "y = Add(m, u)",
        "in float, too",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_says_why_a_stored_weight_stays_behind_float(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONSTANTS, "blocks", np.full((2, 16), 0.01, np.float32))
    monkeypatch.setitem(CONSTANTS, "none", np.float32(0))
    body, reason = REFUSED[kind]
    model = build(body, ROWS)
    result = run_pass("quantize-static", model, ROWS)
    assert not result.changed
    (said,) = result.decisions
    assert said.reason.startswith("its weight is stored as integers behind DequantizeLinear")
    assert reason in said.reason


def test_bias_beyond_int32_beside_given_scales() -> None:
    model = build(f"w = DequantizeLinear(conv8, s, i) y = Conv {PAD} (x, w, huge)", IMAGE)
    samples = Samples.from_feeds(feeds(IMAGE))
    result = QuantizeStatic(placement="everywhere").apply(model, Context(samples=samples))
    assert not result.changed
    (said,) = result.decisions
    assert "its bias is beyond int32" in said.reason


# ---------------- real models


@pytest.mark.parametrize("name", QUANTIZING)
def test_network_from_tflite_is_left_alone(shared_models: Path, name: str) -> None:
    net = load(shared_models / "robust" / "mobilenet_v1_075_192_qdq_uint8_tf.onnx")
    with open_session(net) as session:
        samples = Samples.random(session.inputs, seed=0, count=2)
    result = PASSES[name]().apply(net, Context(samples=samples))
    assert not result.changed
    assert len({d.where for d in result.decisions if "already" in d.reason}) == 28


def test_half_quantized_network_is_completed(shared_models: Path) -> None:
    path = shared_models / "robust" / "dscnn_kws_dq_only_tf.onnx"
    net, reference = load(path), load(path)
    with open_session(net) as session:
        samples = Samples.random(session.inputs, seed=0, count=8)
        held_out = list(Samples.random(session.inputs, seed=1, count=4).feeds(session.inputs))
    result = QuantizeStatic(placement="everywhere").apply(net, Context(samples=samples))
    assert sum("as they were stored" in d.reason for d in result.decisions) == 5
    optimized = [node.op_type for node in optimized_graph(net, weights=False).graph.node]
    assert optimized.count("QLinearConv") == 9
    with open_session(reference) as before, open_session(net) as after:
        assert compare_outputs(before, after, held_out).sqnr_db > 20
