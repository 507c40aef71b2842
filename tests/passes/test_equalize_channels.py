"""equalize-channels: the same outputs in float, better ones with one scale a tensor."""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import UnknownNameError
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, PassResult
from onnxslim_passes.passes.equalize_channels import EqualizeChannels
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]

RNG = np.random.default_rng(11)
UNEVEN = np.exp(RNG.normal(0, 1.5, 16)).astype(np.float32)
"""Factors of 16 channels, from about 1/20 to 20."""


def noise(*shape: int, seed: int = 0, scale: float = 0.3) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


WEIGHTS = {
    "a": noise(16, 8, 3, 3, seed=1) * UNEVEN[:, None, None, None],
    "ab": noise(16, seed=2) * UNEVEN,
    "d": noise(16, 1, 3, 3, seed=3) * UNEVEN[::-1, None, None, None],
    "db": noise(16, seed=4),
    "g": noise(16, 4, 3, 3, seed=5),
    "c": noise(12, 16, 1, 1, seed=6),
    "c2": noise(8, 16, 1, 1, seed=7),
    "t": noise(8, 16, 2, 2, seed=8) * UNEVEN[:, None, None],
    "u": noise(16, 6, 2, 2, seed=9),
    "slope": np.abs(noise(16, 1, 1, seed=10)),
    "m": noise(8, 16, seed=11) * UNEVEN,
    "mb": noise(16, seed=12) * UNEVEN,
    "n": noise(16, 10, seed=13),
    "nt": noise(10, 16, seed=14),
}
PAD = "pads: ints = [1, 1, 1, 1]"
IMAGE, ROWS = "N, 8, 8, 8", "N, 8"


def network(body: str, shape: str = IMAGE, outputs: str = "float[] y", **changed: Array) -> Model:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[{shape}] x) => ({outputs}) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    weights = WEIGHTS | changed
    proto.graph.initializer.extend(
        numpy_helper.from_array(values, name) for name, values in weights.items() if name in used
    )
    return Model.from_proto(proto)


def feeds(shape: str) -> list[dict[str, Array]]:
    sizes = [2 if size == "N" else int(size) for size in shape.split(", ")]
    return [{"x": noise(*sizes, seed=seed, scale=1.0)} for seed in range(30, 33)]


def equalize(model: Model, **options: Any) -> PassResult:
    return EqualizeChannels(**options).apply(model, Context())


def sqnr(reference: Model, candidate: Model, shape: str) -> float:
    with open_session(reference) as left, open_session(candidate) as right:
        return compare_outputs(left, right, feeds(shape)).sqnr_db


def quantized(model: Model, shape: str) -> Model:
    copy = model.copy()
    pass_ = QuantizeStatic(per_channel=False, placement="everywhere")
    assert pass_.apply(copy, Context(samples=Samples.from_feeds(feeds(shape)))).changed
    return copy


CASES = {
    # the graph, the shape of x, how many layers take channels that were scaled
    "relu": (f"h = Conv <{PAD}> (x, a, ab) r = Relu (h) y = Conv (r, c)", IMAGE, 1),
    "no-bias": ("h = Conv (x, a) r = Relu (h) y = Conv (r, c)", IMAGE, 1),
    "prelu": ("h = Conv (x, a, ab) r = PRelu (h, slope) y = Conv (r, c)", IMAGE, 1),
    "leaky": ("h = Conv (x, a, ab) r = LeakyRelu (h) y = Conv (r, c)", IMAGE, 1),
    "pool": (
        "h = Conv (x, a, ab) r = Abs (h) p = MaxPool <kernel_shape: ints = [2, 2]> (r)"
        "y = Conv (p, c)",
        IMAGE,
        1,
    ),
    "depthwise": (
        f"h = Conv <{PAD}> (x, a, ab) r = Relu (h) e = Conv <group: int = 16, {PAD}> (r, d, db)"
        "s = Relu (e) y = Conv (s, c)",
        IMAGE,
        2,
    ),
    "groups": ("h = Conv (x, a, ab) y = Conv <group: int = 4> (h, g)", IMAGE, 1),
    "two-takers": (
        "h = Conv (x, a, ab) r = Relu (h) p = Conv (r, c) q = Conv (r, c2)"
        "y = Concat <axis: int = 1> (p, q)",
        IMAGE,
        2,
    ),
    "transposed": (
        "h = ConvTranspose (x, t, ab) r = Relu (h) y = ConvTranspose <group: int = 2> (r, u)",
        IMAGE,
        1,
    ),
    "matmul": ("h = MatMul (x, m) b = Add (h, mb) r = Relu (b) y = MatMul (r, n)", ROWS, 1),
    "gemm": ("h = Gemm (x, m, mb) r = Relu (h) y = Gemm <transB: int = 1> (r, nt)", ROWS, 1),
}


@pytest.mark.parametrize(("body", "shape", "scaled"), CASES.values(), ids=CASES.keys())
def test_outputs_stay_and_channels_become_even(body: str, shape: str, scaled: int) -> None:
    floating = network(body, shape)
    model = floating.copy()
    result = equalize(model)
    taken = [decision for decision in result.decisions if decision.taken]
    assert len(taken) == scaled
    assert [node.op for node in model.graph.nodes] == [node.op for node in floating.graph.nodes]
    # Each product is rounded once more; float32 keeps 140 dB.
    assert sqnr(floating, model, shape) > 110
    for decision in taken:
        assert decision.figures["share_after"] > decision.figures["share_before"]
    assert not equalize(model).changed


@pytest.mark.parametrize("case", ["relu", "depthwise", "matmul"])
def test_one_scale_a_tensor_is_enough_then(case: str) -> None:
    """All channels matter alike to the outputs, whatever their scale in between."""
    body, shape, _ = CASES[case]
    column = UNEVEN[:, None]
    behind = {"c": WEIGHTS["c"] / column[:, :, None], "n": WEIGHTS["n"] / column}
    floating = network(body, shape, **(behind if case != "depthwise" else {}))
    model = floating.copy()
    equalize(model)
    gain = sqnr(floating, quantized(model, shape), shape) - sqnr(
        floating, quantized(floating, shape), shape
    )
    assert gain > 4


def test_ranges_are_those_of_the_paper() -> None:
    """Equation 11: both ranges become sqrt(r1 r2), but for one factor of all channels."""
    model = network("h = MatMul (x, m) r = Relu (h) y = MatMul (r, n)", ROWS)
    r1, r2 = np.abs(WEIGHTS["m"]).max(axis=0), np.abs(WEIGHTS["n"]).max(axis=1)
    equalize(model)
    constants = {constant.name: constant.values for constant in model.constants()}
    first, second = np.abs(constants["m"]).max(axis=0), np.abs(constants["n"]).max(axis=1)
    wanted = np.sqrt(r1 * r2)
    # The pass stops when no factor moves by more than 0.2 %.
    np.testing.assert_allclose(first / first.max(), wanted / wanted.max(), rtol=5e-3)
    np.testing.assert_allclose(second / second.max(), wanted / wanted.max(), rtol=5e-3)


def test_a_channel_without_weights_keeps_its_bias_small() -> None:
    """Training leaves channels that hold their bias alone; dividing it would stretch the range."""
    dying = WEIGHTS["a"].copy()
    dying[::4] *= 1e-25
    body = "h = Conv (x, a, db) r = Relu (h) y = Conv (r, c)"
    floating = network(body, a=dying)
    model = floating.copy()
    assert equalize(model).changed
    biases = {c.name: np.abs(c.values).max() for c in model.constants()}
    assert biases["db"] < 30 * np.abs(WEIGHTS["db"]).max()
    before = sqnr(floating, quantized(floating, IMAGE), IMAGE)
    assert sqnr(floating, quantized(model, IMAGE), IMAGE) > before - 1


def test_dead_channels_are_left() -> None:
    dead = WEIGHTS["m"].copy()
    dead[:, 3] = 0
    behind = WEIGHTS["n"].copy()
    behind[5] = 0
    model = network("h = MatMul (x, m) r = Relu (h) y = MatMul (r, n)", ROWS, m=dead, n=behind)
    floating = model.copy()
    assert equalize(model).changed
    assert all(np.isfinite(constant.values).all() for constant in model.constants())
    assert sqnr(floating, model, ROWS) > 110


REFUSED = {
    # the graph, the shape of x, what is said of the layer behind
    "first": ("y = Conv (x, a)", IMAGE, "'x' is made by no layer"),
    "clip": (
        "h = Conv (x, a) r = HardSigmoid (h) y = Conv (r, c)",
        IMAGE,
        "it comes through HardSigmoid .* which a factor does not pass",
    ),
    "residual": (
        "h = Conv (x, a) s = Conv (h, c) t = Sigmoid (h) y = Concat <axis: int = 1> (s, t)",
        IMAGE,
        "takes its input as it is",
    ),
    "shared": (
        "h = Conv (x, a) p = Conv (h, c) q = Conv (h, c) y = Sub (p, q)",
        IMAGE,
        "it is shared",
    ),
    "normalization": (
        "h = LayerNormalization (x, k) y = MatMul (h, n)",
        "N, 16",
        "made by LayerNormalization .* not by a layer with weights",
    ),
}


@pytest.mark.parametrize(("body", "shape", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_left_alone_has_its_reason(body: str, shape: str, reason: str) -> None:
    model = network(body, shape, k=np.ones(16, np.float32))
    result = equalize(model)
    assert not result.changed
    assert any(re.search(reason, d.reason) for d in result.decisions)


def test_a_layer_in_front_that_is_excluded_is_named() -> None:
    model = network("h = Conv (x, a) r = Relu (h) y = Conv (r, c)")
    result = equalize(model, exclude=("a",))
    assert not result.changed
    assert "in front is left: excluded by 'a'" in result.decisions[-1].reason
    with pytest.raises(UnknownNameError, match="Did you mean"):
        equalize(model, exclude=("aa",))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.floats(-6, 6), min_size=16, max_size=16), st.sampled_from(["Relu", "Neg", "Abs"])
)
def test_any_scales_between_layers_leave_the_outputs(logs: list[float], between: str) -> None:
    factors = np.exp(np.array(logs)).astype(np.float32)
    body = f"h = MatMul (x, m) r = {between} (h) y = MatMul (r, n)"
    model = network(body, ROWS, m=WEIGHTS["m"] * factors, n=WEIGHTS["n"] / factors[:, None])
    floating = model.copy()
    equalize(model)
    assert sqnr(floating, model, ROWS) > 110
