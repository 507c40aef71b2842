"""Values of inner tensors: streamed together, or visited a segment at a time."""

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest

from onnxslim_passes.calibration import Samples, segments, stream_values, visit_values
from onnxslim_passes.calibration.segments import main_tensors
from onnxslim_passes.errors import SamplesError, UnsupportedModelError
from onnxslim_passes.model import Model, load

Array = npt.NDArray[Any]
Values = dict[str, list[Array]]
SINGLE = np.float32


def graph(text: str, *, ir_version: int = 8, opset: int = 17) -> Model:
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}]>'
    return load(onnx.parser.parse_model(f"{header} g {text}"))


def visited(model: Model, names: list[str], feeds: list[dict[str, Array]]) -> Values:
    tensors = main_tensors(model.graph)
    found: Values = defaultdict(list)

    def visit(name: str, values: Array, feed: dict[str, Array]) -> None:
        found[name].append(values.copy())

    visit_values(model, [tensors[n] for n in names], Samples.from_feeds(feeds), visit)
    return found


def streamed(model: Model, names: list[str], feeds: list[dict[str, Array]]) -> Values:
    tensors = main_tensors(model.graph)
    found: Values = defaultdict(list)
    for values in stream_values(model, [tensors[n] for n in names], Samples.from_feeds(feeds)):
        for name, array in values.items():
            found[name].append(array)
    return found


def assert_same(model: Model, names: list[str], feeds: list[dict[str, Array]]) -> Values:
    a, b = visited(model, names, feeds), streamed(model, names, feeds)
    assert set(a) == set(b) == set(names)
    for name in names:
        assert len(a[name]) == len(feeds)
        for x, y in zip(a[name], b[name], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
            assert x.shape == y.shape
    return a


@pytest.fixture(params=[1, 1 << 30], ids=["a tensor a segment", "one segment"], autouse=True)
def segment_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size: int = request.param
    monkeypatch.setattr(segments, "_SEGMENT_BYTES", size)
    return size


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(SINGLE)


# `a` is needed by the last node: it has to pass all segments between.
SKIP = """(float[N, 4] x) => (float[N, 4] y) {
    a = Relu(x) b = Exp(a) c = Neg(b) d = Tanh(c) unused = Sin(c) y = Add(d, a) }"""


def test_every_tensor_and_its_values() -> None:
    feeds = [{"x": noise(n, 4, seed=n)} for n in (1, 5, 3)]
    found = assert_same(graph(SKIP), list("xabcdy"), feeds)
    for i, feed in enumerate(feeds):
        np.testing.assert_array_equal(found["x"][i], feed["x"])
        np.testing.assert_array_equal(found["a"][i], np.maximum(feed["x"], 0))
        np.testing.assert_allclose(found["c"][i], -np.exp(found["a"][i]), rtol=1e-6)


def test_inputs_alone_and_some_tensors_alone() -> None:
    feeds = [{"x": noise(2, 4)}]
    assert_same(graph(SKIP), ["x"], feeds)
    assert_same(graph(SKIP), ["b"], feeds)
    assert_same(graph(SKIP), ["y", "a"], feeds)


def test_the_model_stays_as_it_is() -> None:
    model = graph(SKIP)
    before = model.to_proto().SerializeToString(deterministic=True)
    visited(model, list("ay"), [{"x": noise(2, 4)}])
    assert model.to_proto().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_also_where_they_must_be_constant_nodes(ir_version: int) -> None:
    model = graph(
        """(float[N, 4] x) => (float[N, 4] y)
        <float[4] w = {1, 2, 3, 4}> { a = Mul(x, w) b = Relu(a) y = Add(b, w) }""",
        ir_version=ir_version,
    )
    assert_same(model, list("aby"), [{"x": noise(3, 4)}])


def test_bodies_capture_tensors_of_earlier_segments(if_model: onnx.ModelProto) -> None:
    model = load(if_model)
    feeds = [{"x": noise(2, 2), "flag": np.array(flag)} for flag in (True, False)]
    assert_same(model, ["x", "y"], feeds)
    captured = graph("""(bool c, float[N] x) => (float[N] y) {
        a = Exp(x) b = Neg(a)
        z = If(c)<then_branch = t () => (float[N] p) { p = Mul(a, b) },
                  else_branch = e () => (float[N] q) { q = Abs(a) }>
        y = Relu(z) }""")
    assert_same(
        captured, list("abzy"), [{"x": noise(3), "c": np.array(flag)} for flag in (True, False)]
    )


def test_sequences_are_not_cut_through() -> None:
    model = graph("""(float[N, 4] x) => (float[M, 4] y) {
        a = Relu(x) s = SequenceConstruct(a, x) b = Neg(a) y = ConcatFromSequence<axis=0>(s) }""")
    assert_same(model, list("aby"), [{"x": noise(2, 4)}])


def test_types_pass_between_segments() -> None:
    model = graph("""(float16[N, 4] x) => (int64[N] y) {
        h = Neg(x) f = Cast<to = 1>(h) s = Shape(f) i = Cast<to = 6>(f)
        y = ArgMax<axis = 1, keepdims = 0>(f) }""")
    found = assert_same(model, list("hfsiy"), [{"x": noise(2, 4).astype(np.float16)}])
    assert [found[n][0].dtype for n in "hfsiy"] == [np.float16, SINGLE, "i8", "i4", "i8"]


def test_errors() -> None:
    with pytest.raises(SamplesError, match="holds no samples"):
        visited(graph(SKIP), ["a"], [])
    texts = graph("(string[N] x) => (string[N] y) { y = Identity(x) }")
    with pytest.raises(UnsupportedModelError, match="holds string"):
        streamed(texts, ["y"], [{"x": np.array(["a"], object)}])
