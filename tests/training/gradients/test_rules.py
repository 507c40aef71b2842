"""What ONNX's node tests do not show: free sizes, rare forms, straight-through gradients."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxslim_passes import runtime
from onnxslim_passes.errors import DifferentiationError
from onnxslim_passes.model import Model
from onnxslim_passes.training import Emitter, gradients
from tests.training.gradients.checking import Comparison, compare


def model_of(text: str, opset: int = 21) -> onnx.ModelProto:
    proto: onnx.ModelProto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]> g {text}'
    )
    return proto


def check(text: str, *shapes: tuple[int, ...], opset: int = 21, **fixed: object) -> Comparison:
    """Compares the gradients of all floating-point inputs on random data of these shapes."""
    proto = model_of(text, opset)
    generator = np.random.default_rng(1)
    names = [info.name for info in proto.graph.input if info.name not in fixed]
    feed = {
        name: np.asarray(generator.standard_normal(shape), np.float32)
        for name, shape in zip(names, shapes, strict=True)
    }
    feed |= {name: np.asarray(value) for name, value in fixed.items()}
    return compare(proto, feed, names)


FREE = {
    "conv": (
        "(float[N, 2, H, W] x, float[4, 1, 3, 2] w, float[4] b) => (float[N, 4, I, J] y)"
        " { y = Conv<group = 2, strides = [2, 1], pads = [1, 0, 2, 1], dilations = [1, 2]>"
        "(x, w, b) }",
        [(2, 2, 7, 6), (4, 1, 3, 2), (4,)],
    ),
    "conv of one channel a group": (
        "(float[N, 3, H] x, float[3, 1, 3] w) => (float[N, 3, I] y)"
        " { y = Conv<group = 3, strides = [2]>(x, w) }",
        [(2, 3, 8), (3, 1, 3)],
    ),
    "same padding": (
        "(float[N, 2, H] x, float[3, 2, 4] w) => (float[N, 3, H] y)"
        ' { y = Conv<auto_pad = "SAME_UPPER">(x, w) }',
        [(2, 2, 6), (3, 2, 4)],
    ),
    "transposed conv": (
        "(float[N, 4, H, W] x, float[4, 1, 3, 3] w) => (float[N, 2, I, J] y)"
        " { y = ConvTranspose<group = 2, strides = [2, 2], pads = [1, 1, 1, 1],"
        " output_padding = [1, 0]>(x, w) }",
        [(2, 4, 3, 4), (4, 1, 3, 3)],
    ),
    "max pool": (
        "(float[N, 2, H, W] x) => (float[N, 2, I, J] y)"
        " { y = MaxPool<kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1]>(x) }",
        [(2, 2, 7, 5)],
    ),
    "average pool": (
        "(float[N, 2, H, W] x) => (float[N, 2, I, J] y)"
        " { y = AveragePool<kernel_shape = [3, 2], strides = [2, 2]>(x) }",
        [(2, 2, 8, 5)],
    ),
    "global pools": (
        "(float[N, 2, H, W] x) => (float[N, 2, 1, 1] y)"
        " { a = GlobalAveragePool(x) b = GlobalMaxPool(x) c = GlobalLpPool<p = 3>(x)"
        " y = Sum(a, b, c) }",
        [(2, 2, 3, 4)],
    ),
    "batch norm": (
        "(float[N, 2, H] x, float[2] s, float[2] b, float[2] m, float[2] v) => (float[N, 2, H] y)"
        " { q = Exp(v) y = BatchNormalization(x, s, b, m, q) }",
        [(3, 2, 4), (2,), (2,), (2,), (2,)],
    ),
    "layer norm": (
        "(float[N, T, 5] x, float[5] s, float[5] b) => (float[N, T, 5] y)"
        " { y = LayerNormalization(x, s, b) }",
        [(2, 3, 5), (5,), (5,)],
    ),
    "instance norm": (
        "(float[N, 2, H] x, float[2] s, float[2] b) => (float[N, 2, H] y)"
        " { y = InstanceNormalization(x, s, b) }",
        [(3, 2, 4), (2,), (2,)],
    ),
    "concat and split": (
        "(float[N, A] x, float[N, B] z) => (float[N, A] y) { t = Concat<axis = 1>(x, z)"
        " u = Tanh(t) a = Shape<start = 1>(x) b = Shape<start = 1>(z)"
        " s = Concat<axis = 0>(a, b) y, w = Split<axis = 1>(u, s) }",
        [(3, 2), (3, 4)],
    ),
    "slice of a free axis": (
        "(float[N, T, 3] x) => (float[N, S, 3] y) { a = Constant<value_ints = [-4]>()"
        " b = Constant<value_ints = [-1]>() c = Constant<value_ints = [1]>()"
        " d = Constant<value_ints = [2]>() y = Slice(x, a, b, c, d) }",
        [(2, 6, 3)],
    ),
    "strided slice beside free axes": (
        "(float[N, 9, T] x) => (float[N, S, T] y) { a = Constant<value_ints = [7]>()"
        " b = Constant<value_ints = [0]>() c = Constant<value_ints = [1]>()"
        " d = Constant<value_ints = [-3]>() y = Slice(x, a, b, c, d) }",
        [(2, 9, 4)],
    ),
    "mean over free axes": (
        "(float[N, C, H, W] x) => (float[N, C] y) { a = Constant<value_ints = [2, 3]>()"
        " y = ReduceMean<keepdims = 0>(x, a) }",
        [(2, 3, 4, 5)],
    ),
    "depth to space": (
        "(float[N, 8, H, W] x) => (float[N, 2, I, J] y) { y = DepthToSpace<blocksize = 2,"
        ' mode = "CRD">(x) }',
        [(2, 8, 2, 3)],
    ),
    "nearest": (
        "(float[N, 2, H, W] x) => (float[N, 2, I, J] y) {"
        " s = Constant<value_floats = [1.0, 1.0, 2.0, 3.0]>() y = Resize(x, , s) }",
        [(2, 2, 3, 2)],
    ),
    "linear": (
        "(float[N, 2, H, W] x) => (float[N, 2, I, J] y) {"
        " s = Constant<value_floats = [1.0, 1.0, 1.5, 2.0]>()"
        ' y = Resize<mode = "linear">(x, , s) }',
        [(2, 2, 4, 3)],
    ),
    "lower triangle": (
        "(float[N, T, T] x) => (float[N, T, T] y) { y = Trilu<upper = 0>(x) }",
        [(2, 4, 4)],
    ),
    "diagonal": (
        "(float[3, 3, 2] a, float[2, 4] b) => (float[3, 4] y)"
        ' { y = Einsum<equation = "iij,jk->ik">(a, b) }',
        [(3, 3, 2), (2, 4)],
    ),
    "summed index": (
        "(float[N, 3, 2] a, float[N, 4] b) => (float[4] y)"
        ' { y = Einsum<equation = "nij,nk->k">(a, b) }',
        [(5, 3, 2), (5, 4)],
    ),
}


@pytest.mark.parametrize(("text", "shapes"), FREE.values(), ids=FREE.keys())
def test_sizes_may_be_free(text: str, shapes: list[tuple[int, ...]]) -> None:
    found = check(text, *shapes)
    assert found.holds, found


def convolution(x: str, w: str, attributes: str) -> str:
    free = ", ".join("ABCDE"[: x.count(",") + 1])
    return f"(float[{x}] x, float[{w}] w) => (float[{free}] y) {{ y = Conv<{attributes}>(x, w) }}"


# One for each way that the gradients of a convolution are computed; two samples each.
CONVOLUTIONS = {
    "few places": ("N, 3, 4, 4", "5, 3, 3, 3", "pads = [1, 1, 1, 1], strides = [1, 2]"),
    "many places and channels": ("N, 32, 9, 9", "3, 32, 2, 2", "dilations = [2, 1]"),
    "groups": ("N, 4, 6, 6", "6, 2, 3, 3", "group = 2, strides = [2, 2], pads = [0, 1, 1, 0]"),
    "one place a window": ("N, 3, 6, 6", "4, 3, 1, 1", ""),
    "depthwise rows": (
        "N, 3, 7, 8",
        "3, 1, 3, 3",
        "group = 3, strides = [1, 2], pads = [1, 1, 1, 1]",
    ),
    "depthwise elements": ("N, 2, 3, 40", "2, 1, 3, 3", "group = 2, dilations = [1, 2]"),
    "depthwise with two outputs": ("N, 3, 6, 6", "6, 1, 3, 3", "group = 3"),
    "depthwise in one dimension": ("N, 3, 9", "3, 1, 4", "group = 3, strides = [2], pads = [1, 2]"),
    "depthwise in three": ("N, 2, 4, 5, 4", "2, 1, 2, 2, 3", "group = 2, dilations = [1, 2, 1]"),
    "three dimensions": ("N, 2, 4, 5, 4", "3, 2, 2, 2, 3", "strides = [1, 2, 1]"),
}


@pytest.mark.parametrize("parts", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_every_form_of_convolution(parts: tuple[str, str, str]) -> None:
    shapes = [tuple(int(n) for n in text.replace("N", "2").split(",")) for text in parts[:2]]
    found = check(convolution(*parts).replace("Conv<>", "Conv"), *shapes)
    assert found.holds, found


@pytest.mark.parametrize("operator", ["AveragePool", "LpPool"])
def test_windows_that_only_ceil_mode_has(operator: str) -> None:
    # One channel and few windows: a product and Col2Im, which knows whole windows only.
    attributes = "ceil_mode = 1, kernel_shape = [3, 3], strides = [2, 2]"
    text = f"(float[1, 1, 4, 4] x) => (float[1, 1, 2, 2] y) {{ y = {operator}<{attributes}>(x) }}"
    found = check(text, (1, 1, 4, 4))
    assert found.holds, found


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "GRU before", "RNN"])
def test_recurrent_nets_with_lengths_states_and_peepholes(kind: str, direction: str) -> None:
    count, hidden, gates = 1 + (direction == "bidirectional"), 3, {"L": 4, "G": 3, "R": 1}[kind[0]]
    operator, _, before = kind.partition(" ")
    lstm = operator == "LSTM"
    text = (
        f"(float[T, B, 2] x, float[{count}, {gates * hidden}, 2] w,"
        f" float[{count}, {gates * hidden}, {hidden}] r, float[{count}, {2 * gates * hidden}] b,"
        f" float[{count}, B, {hidden}] h{', float[C, B, 3] c, float[C, 9] p' if lstm else ''},"
        f" int32[B] n) => (float[T, {count}, B, {hidden}] y, float[{count}, B, {hidden}] z"
        f"{', float[D, B, 3] d' if lstm else ''}) {{ y, z{', d' if lstm else ''} = {operator}"
        f'<hidden_size = {hidden}, direction = "{direction}"'
        f"{', linear_before_reset = 1' if before else ''}>(x, w, r, b, n, h"
        f"{', c, p' if lstm else ''}) }}"
    )
    shapes = [
        (4, 2, 2),
        (count, gates * hidden, 2),
        (count, gates * hidden, hidden),
        (count, 2 * gates * hidden),
        (count, 2, hidden),
    ]
    shapes += [(count, 2, hidden), (count, 3 * hidden)] if lstm else []
    found = check(text.replace("[C,", f"[{count},"), *shapes, n=np.int32([4, 2]))
    assert found.holds, found


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ('activations = ["Sigmoid", "Affine", "Tanh"]', "no gradient with activation 'Affine'"),
        ("clip = 3.0", "no gradient with clip"),
    ],
)
def test_recurrent_forms_without_gradient_are_refused(attribute: str, message: str) -> None:
    text = (
        "(float[T, B, 2] x, float[1, 12, 2] w, float[1, 12, 3] r) => (float[T, 1, B, 3] y)"
        f" {{ y = LSTM<hidden_size = 3, {attribute}>(x, w, r) }}"
    )
    with pytest.raises(DifferentiationError, match=message):
        check(text, (4, 2, 2), (1, 12, 2), (1, 12, 3))


def gradient_of(text: str, wrt: list[str], feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradients of the sum of the first output."""
    model = Model.from_proto(model_of(text))
    emit = Emitter(model)
    tensors = {tensor.name: tensor for tensor in model.graph.inputs}
    loss = emit.reduce_sum(model.graph.outputs[0])
    found = gradients(emit, loss, [tensors[name] for name in wrt])
    for name in wrt:
        emit.output(found[tensors[name]], f"d {name}")
    with runtime.open_session(model) as session:
        result = session.run(feed)
    return {name: result[f"d {name}"] for name in wrt} | {"y": result["y"]}


FAKE = (
    "(float[2, 3] x, float{shape} s) => (float[2, 3] y) {{ z = Constant<value: tensor ="
    " int8{shape} {zeros}>() q = QuantizeLinear<axis = 0{block}>(x, s, z)"
    " y = DequantizeLinear<axis = 0{block}>(q, s, z) }}"
)


@pytest.mark.parametrize(
    ("shape", "zeros", "block"),
    [("", "{0}", ""), ("[2]", "{0, 0}", ""), ("[1, 3]", "{0, 0, 0}", ", block_size = 2")],
    ids=["tensor", "channel", "block"],
)
def test_scales_have_the_gradient_of_learned_step_sizes(shape: str, zeros: str, block: str) -> None:
    x = np.float32([[0.26, -0.9, 40], [1.3, -0.52, -90]])
    scale = np.full([int(n) for n in shape.strip("[]").split(",") if n], 0.25, np.float32)
    text = FAKE.format(shape=shape, zeros=zeros, block=block)
    found = gradient_of(text, ["x", "s"], {"x": x, "s": scale})
    ratio = x / 0.25
    inside = (ratio >= -128) & (ratio <= 127)
    steps = np.where(inside, np.round(ratio) - ratio, np.clip(np.round(ratio), -128, 127))
    assert np.array_equal(found["x"], inside.astype(np.float32))
    axes = {"": (0, 1), "[2]": (1,), "[1, 3]": (0,)}[shape]
    # Float32: differences of numbers up to 160.
    np.testing.assert_allclose(found["s"].ravel(), steps.sum(axes).ravel(), atol=2e-5)


def test_rounding_passes_the_gradient() -> None:
    text = "(float[3] x) => (float[3] y) { r = Round(x) y = Mul(r, r) }"
    found = gradient_of(text, ["x"], {"x": np.float32([0.4, 1.6, -2.2])})
    assert found["x"].tolist() == [0, 4, -4]


def test_dynamic_quantization_passes_the_gradient() -> None:
    text = (
        "(float[4] x) => (float[4] y)"
        " { q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z) }"
    )
    found = gradient_of(text, ["x"], {"x": np.float32([0.4, 1.6, -2.2, 0])})
    # dy s / s, rounded twice.
    np.testing.assert_allclose(found["x"], 1, rtol=3e-7)


def test_dropout_in_training_passes_what_it_kept() -> None:
    text = (
        "(float[64] x) => (float[64] y) { r = Constant<value_float = 0.25>()"
        " t = Constant<value: tensor = bool {1}>() y = Dropout<seed = 7>(x, r, t) }"
    )
    found = gradient_of(text, ["x"], {"x": np.ones(64, np.float32)})
    assert 0 < np.count_nonzero(found["x"]) < 64
    np.testing.assert_allclose(found["x"], found["y"], rtol=1e-6)


def test_rows_that_are_masked_away_have_no_gradient() -> None:
    text = (
        "(float[2, 3] x, float[2, 3] mask) => (float[2, 3] y) { s = Add(x, mask) p = Softmax(s)"
        " n = IsNaN(p) z = Constant<value_float = 0.0>() q = Where(n, z, p) y = Mul(q, x) }"
    )
    mask = np.float32([[0, 0, -np.inf], [-np.inf] * 3])
    x = np.float32([[1, 2, 3], [4, 5, 6]])
    found = gradient_of(text, ["x"], {"x": x, "mask": mask})
    assert np.isfinite(found["x"]).all()
    assert not found["x"][1].any()
