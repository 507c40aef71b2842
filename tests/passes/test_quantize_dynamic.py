"""quantize-dynamic: products and embeddings as int8, fused by the runtime, in every graph."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.quantize_dynamic import QuantizeDynamic
from onnxslim_passes.runtime import open_session, optimized_graph

Array = npt.NDArray[Any]
Feed = dict[str, Array]


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(
    body: str,
    inputs: str = "float[N, 64] x",
    output: str = "float[A, B] y",
    opset: int = 17,
    **weights: Array,
) -> Model:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": {opset}]>
        g ({inputs}) => ({output}) {{ {body} }}"""
    )
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    return Model.from_proto(proto)


def quantize(model: Model, **options: Any) -> PassResult:
    return QuantizeDynamic(**options).apply(model, Context())


def run(model: Model, feed: Feed) -> Array:
    with open_session(model) as session:
        value: Array = next(iter(session.run(feed).values()))
    return value


def sqnr_db(reference: Array, candidate: Array) -> float:
    noise_power = float(np.square(reference.astype(np.float64) - candidate).sum())
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / noise_power))


def operators(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in optimized_graph(model, weights=False).graph.node)


def decisions(result: PassResult) -> dict[str, Decision]:
    return {decision.where: decision for decision in result.decisions}


PRODUCTS = {
    "matmul": ("y = MatMul(x, w)", {}),
    "matmul with bias": ("h = MatMul(x, w) y = Add(h, b)", {}),
    "gemm": ("y = Gemm(x, w, b)", {}),
    "gemm, all transposed and scaled": (
        "t = Transpose(x) y = Gemm <transA = 1, transB = 1, alpha = 0.5, beta = 2.0> (t, v, b)",
        {},
    ),
    "gemm without bias": ("y = Gemm(x, w)", {}),
    "per tensor": ("y = Gemm(x, w, b)", {"per_channel": False}),
    "7 bits": ("y = Gemm(x, w, b)", {"reduce_range": True}),
}


@pytest.mark.parametrize(("body", "options"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_one_fused_kernel(body: str, options: dict[str, Any]) -> None:
    weights = {"w": noise(64, 48), "b": noise(48, seed=1), "v": noise(48, 64)}
    used = {k: v for k, v in weights.items() if f" {k}" in body}
    model = build(body, **used)
    reference = model.copy()
    assert quantize(model, **options).changed
    assert operators(model)["DynamicQuantizeMatMul"] == 1
    feed = {"x": noise(5, 64, seed=2)}
    # Two 8-bit roundings of noise over +-4 deviations: 40 dB each; 7 bits lose 6 dB of one.
    assert sqnr_db(run(reference, feed), run(model, feed)) > 32


def test_one_activation_is_quantized_once_for_all_its_products() -> None:
    model = build(
        "q = MatMul(x, w) k = MatMul(x, v) s = Add(q, k) y = Relu(s)",
        w=noise(64, 48),
        v=noise(64, 48, seed=1),
    )
    quantize(model)
    found = operators(model)
    assert found["DynamicQuantizeLinear"] == 1
    assert found["MatMulIntegerToFloat"] == 2


def test_shared_weights_are_stored_once() -> None:
    model = build("h = MatMul(x, w) y = MatMul(h, w)", w=noise(64, 64))
    quantize(model)
    assert [c.shape for c in model.constants() if c.dtype == np.int8 and c.size > 64] == [(64, 64)]
    assert all(c.dtype != np.float32 or c.size <= 64 for c in model.constants())


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-20, 1e20), st.integers(0, 5))
def test_error_is_bounded_by_both_grids(rows: int, columns: int, gain: float, seed: int) -> None:
    weight = noise(rows, columns, seed=seed) * np.float32(gain)
    model = build("y = MatMul(x, w)", inputs=f"float[N, {rows}] x", w=weight)
    reference, feed = model.copy(), {"x": noise(3, rows, seed=seed + 1)}
    quantize(model)
    x = feed["x"]
    step_x = (max(x.max(), 0) - min(x.min(), 0)) / 255
    step_w = np.abs(weight).max(axis=0) / 127
    # |dx| <= step_x (half a step, and the rounded zero point), |dw| <= step_w / 2.
    bound = rows * (step_x * np.abs(weight).max(axis=0) + step_w / 2 * np.abs(x).max())
    bound = bound + rows * step_x * step_w
    assert (np.abs(run(model, feed) - run(reference, feed)) <= bound * 1.01).all()


# ---------------- embeddings


def embedding() -> Model:
    # Rows of very different size: one scale for the table would lose the small ones.
    table = noise(160, 32) * np.logspace(-3, 1, 160, dtype=np.float32)[:, None]
    return build(
        "y = Gather(table, ids)", inputs="int64[N, T] ids", output="float[N, T, 32] y", table=table
    )


def test_embeddings_keep_a_scale_a_row() -> None:
    model = embedding()
    reference = model.copy()
    assert quantize(model).changed
    ids = np.arange(160).reshape(16, 10)
    expected, found = run(reference, {"ids": ids}), run(model, {"ids": ids})
    steps = np.abs(expected).max(axis=-1, keepdims=True) / 127
    assert (np.abs(found - expected) <= 0.5001 * steps).all()
    assert model.nbytes() < 0.5 * reference.nbytes()


def test_embeddings_can_stay() -> None:
    model = embedding()
    result = quantize(model, embeddings=False)
    assert not result.changed
    assert [d.reason for d in result.decisions] == ["embeddings=false"]


def test_a_tied_embedding_is_quantized_in_both_places_or_in_none() -> None:
    def tied() -> Model:
        return build(
            "e = Gather(t, ids) f = Transpose <perm = [0, 1]> (e) y = Gemm <transB = 1> (e, t)",
            inputs="int64[N] ids",
            t=noise(160, 32),
        )

    model = tied()
    assert quantize(model).changed
    assert all(c.dtype != np.float32 or c.size <= 160 for c in model.constants())
    model = tied()
    result = quantize(model, embeddings=False)
    assert not result.changed
    assert any("also feeds" in d.reason for d in result.decisions)


# ---------------- bodies and functions


def test_bodies_are_quantized(if_model: onnx.ModelProto) -> None:
    model = Model.from_proto(if_model)
    reference = model.copy()
    result = quantize(model)
    taken = {where for where, decision in decisions(result).items() if decision.taken}
    assert taken - {"cpu"} == {"choose/then_branch/then_mm", "choose/else_branch/else_mm"}
    for flag in (True, False):
        feed = {"x": noise(2, 2), "flag": np.array(flag)}
        np.testing.assert_allclose(run(model, feed), run(reference, feed), atol=0.1)


def test_functions_are_quantized() -> None:
    weight = numpy_helper.from_array(noise(64, 48), "w")
    function = onnx.helper.make_function(
        "own",
        "Layer",
        ["a"],
        ["c"],
        [
            onnx.helper.make_node("Constant", [], ["w"], value=weight),
            onnx.helper.make_node("MatMul", ["a", "w"], ["c"], name="inner"),
        ],
        [onnx.helper.make_opsetid("", 17)],
    )
    proto = build("y = Relu(x)").to_proto()
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "Layer", "own"
    proto.functions.append(function)
    proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
    model = Model.from_proto(proto)
    reference, feed = model.copy(), {"x": noise(3, 64)}
    assert quantize(model).changed
    assert sqnr_db(run(reference, feed), run(model, feed)) > 32
    assert operators(model)["DynamicQuantizeMatMul"] == 1


# ---------------- what stays, and why

UNFIT = {
    "conv": (
        "y = Conv(x, w)",
        {"inputs": "float[1, 8, 4, 4] x", "output": "float[A, B, C, D] y", "w": noise(8, 8, 1, 1)},
        "ConvInteger",
    ),
    "two activations": ("y = MatMul(x, x)", {"inputs": "float[4, 4] x"}, "both operands"),
    "left weight": ("y = MatMul(w, x)", {"w": noise(4, 64)}, "first operand"),
    "batch of matrices": (
        "y = MatMul(x, w)",
        {"output": "float[A, B, C] y", "w": noise(2, 64, 8)},
        "a matrix is needed",
    ),
    "also added": ("h = MatMul(x, w) y = Add(h, w)", {"w": noise(64, 64)}, "also feeds"),
    "columns": (
        "y = Gather <axis = 1> (w, i)",
        {"inputs": "int64[N] i", "w": noise(64, 64)},
        "axis 1",
    ),
    "small table": ("y = Gather(w, i)", {"inputs": "int64[N] i", "w": noise(8, 8)}, "fewer than"),
    "NaN": ("y = MatMul(x, w)", {"w": np.full((64, 8), np.nan, np.float32)}, "NaN"),
}


@pytest.mark.parametrize(("body", "given_", "reason"), UNFIT.values(), ids=UNFIT)
def test_says_why_a_node_stays(body: str, given_: dict[str, Any], reason: str) -> None:
    model = build(body, **given_)
    before = model.to_proto().SerializeToString()
    result = quantize(model)
    assert not result.changed
    assert model.to_proto().SerializeToString() == before
    assert any(reason in decision.reason for decision in result.decisions)


def test_recurrent_networks_stay() -> None:
    model = build(
        "s, h, c = LSTM <hidden_size = 4> (x, w, r) y = Squeeze(h, zero)",
        inputs="float[T, 1, 8] x",
        w=noise(1, 16, 8),
        r=noise(1, 16, 4),
        zero=np.array([0]),
    )
    (only,) = quantize(model).decisions
    assert not only.taken
    assert "LSTM" in only.reason


def test_a_second_run_changes_nothing() -> None:
    model = build("h = MatMul(x, w) y = Add(h, b)", w=noise(64, 48), b=noise(48))
    assert quantize(model).changed
    once = model.to_proto().SerializeToString()
    assert not quantize(model).changed
    assert model.to_proto().SerializeToString() == once


def test_older_opsets_are_raised() -> None:
    model = build("y = MatMul(x, w)", opset=9, w=noise(64, 48))
    assert quantize(model).changed
    assert model.opset == 11


@pytest.mark.long
def test_minilm(shared_models: Path) -> None:
    """onnxruntime's own dynamic quantizer: 18.3 dB, 58 MB with float embeddings."""
    model = load(shared_models / "models" / "minilm_l6.onnx")
    reference = model.copy()
    quantize(model)
    ids = np.load(shared_models / "data" / "stsb_test.npz")["a"][:4].astype(np.int64)
    words = ids != 0
    feed = {
        "input_ids": ids,
        "attention_mask": words.astype(np.int64),
        "token_type_ids": np.zeros_like(ids),
    }
    # What the model makes of padding means nothing.
    assert sqnr_db(run(reference, feed)[words], run(model, feed)[words]) > 15
    assert model.nbytes() < 24e6
