"""Statistics of channels."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_passes.calibration import ChannelStatistics, Samples, collect_statistics
from onnxslim_passes.calibration.segments import main_tensors
from onnxslim_passes.errors import SamplesError, UnsupportedModelError
from onnxslim_passes.model import Model, load

Array = npt.NDArray[Any]


def negation(shape: str, *, element: str = "float", opset: int = 18) -> Model:
    text = f"g ({element}[{shape}] x) => ({element}[{shape}] y) {{ y = Neg(x) }}"
    return load(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}'))


def statistics(model: Model, arrays: list[Array], **options: Any) -> ChannelStatistics:
    tensor = main_tensors(model.graph)["y"]
    samples = Samples.from_feeds([{"x": array} for array in arrays])
    return collect_statistics(model, [tensor], samples, **options)["y"]


def assert_matches(found: ChannelStatistics, y: Array, axis: int) -> None:
    rows = np.moveaxis(y.astype(np.float64), axis, 0).reshape(y.shape[axis], -1)
    assert found.seen == rows.shape[1]
    np.testing.assert_array_equal(found.min, rows.min(axis=1))
    np.testing.assert_array_equal(found.max, rows.max(axis=1))
    np.testing.assert_array_equal(found.absmax, np.abs(rows).max(axis=1))
    # Sums over one axis are float32's.
    np.testing.assert_allclose(found.mean, rows.mean(axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.second_moment, (rows**2).mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.variance, rows.var(axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [9, 12, 13, 18, 21])
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 3, 5, 4), 1), ((6, 7, 3), -1), ((6, 3), 1), ((6, 3), 0), ((6,), 0)]
)
def test_against_numpy(opset: int, shape: tuple[int, ...], axis: int) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) + 2
    model = negation(", ".join("ABCD"[: len(shape)]), opset=opset)
    found = statistics(model, [x], axis=axis)
    assert found.axis == axis % len(shape)
    assert_matches(found, -x, axis)


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(1, 11), unique=True, max_size=5))
def test_any_grouping_gives_the_same(cuts: list[int]) -> None:
    x = np.random.default_rng(1).normal(size=(12, 3, 4)).astype(np.float32)
    assert_matches(statistics(negation("N, 3, 4"), np.split(x, sorted(cuts))), -x, 1)


def test_a_small_variance_beside_a_large_mean() -> None:
    x = np.random.default_rng(2).uniform(99, 101, (4, 2, 200, 200)).astype(np.float32)
    found = statistics(negation("N, 2, H, W"), [x])
    np.testing.assert_allclose(found.variance, x.astype(np.float64).var(axis=(0, 2, 3)), rtol=2e-2)


def test_half_precision_does_not_overflow() -> None:
    x = np.full((2, 3, 4), 60000, np.float16)
    found = statistics(negation("N, 3, 4", element="float16"), [x])
    assert found.mean.tolist() == [-60000] * 3
    assert found.second_moment == pytest.approx([3.6e9] * 3)


def test_varying_lengths_and_empty_feeds() -> None:
    arrays = [np.ones((n, 3, k), np.float32) * k for n, k in ((1, 2), (0, 2), (2, 0), (3, 4))]
    found = statistics(negation("N, 3, K"), arrays)
    assert found.seen == 2 + 12
    assert found.max.tolist() == [-2] * 3
    assert found.min.tolist() == [-4] * 3
    never = statistics(negation("N, 3, K"), arrays[1:3])
    assert (never.seen, never.mean.size) == (0, 0)


def test_an_axis_for_each_tensor() -> None:
    model = negation("N, 3, 4")
    tensors = main_tensors(model.graph)
    samples = Samples.from_feeds([{"x": np.ones((2, 3, 4), np.float32)}])
    found = collect_statistics(model, [tensors["x"], tensors["y"]], samples, axis={"x": 1, "y": -1})
    assert (found["x"].mean.shape, found["y"].mean.shape) == ((3,), (4,))
    assert collect_statistics(model, [], samples) == {}


def test_errors() -> None:
    with pytest.raises(UnsupportedModelError, match="'y' has 2 axes, so that axis 2"):
        statistics(negation("N, 3"), [np.ones((1, 3), np.float32)], axis=2)
    arrays = [np.ones((1, k), np.float32) for k in (3, 4)]
    with pytest.raises(SamplesError, match="'y' has 4 channels along axis 1, but 3"):
        statistics(negation("N, K"), arrays)


def test_values_that_have_no_statistics() -> None:
    text = "g (float[N, 2] x) => (float[N, 2] y, float[N, 2] z) { y = Log(x) z = Neg(x) }"
    model = load(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> {text}'))
    tensors = main_tensors(model.graph)
    chosen = [tensors["y"], tensors["z"]]
    samples = Samples.from_feeds([{"x": np.zeros((1, 2), np.float32)}])
    with pytest.raises(SamplesError, match="'y' holds NaN, infinities"):
        collect_statistics(model, chosen, samples)
    assert list(collect_statistics(model, chosen, samples, strict=False)) == ["z"]
