import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.numerics import histograms
from tests.numerics.strategies import weights


def normal(size, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(0, 0.05, size).astype(dtype)


@given(weights(), st.integers(16, 64))
def test_a_histogram_stands_for_all_values(values, bins):
    histogram = histograms.weighted_histogram(values, bins)
    assert histogram.points.size <= bins
    assert histogram.weights.sum() == values.size
    assert (histogram.weights > 0).all()
    assert (np.diff(histogram.points) > 0).all()
    total = np.sum(values.astype(np.float64))
    slack = 1e-12 * np.abs(values.astype(np.float64)).sum() + 1e-300
    assert np.sum(histogram.points * histogram.weights) == pytest.approx(total, abs=slack)
    assert histogram.exact == (np.unique(values.astype(np.float64)).size <= bins)


@pytest.mark.parametrize(
    "values",
    [
        normal(300_000),
        np.random.default_rng(0).standard_cauchy(300_000).astype(np.float32),
        np.exp(np.random.default_rng(0).normal(0, 20, 300_000)),
        np.append(normal(300_000), np.float32([1e38, -3e38])),
        np.append(normal(300_000, np.float64), [1e308, -1.7e308]),
        np.append(normal(300_000, np.float64), [1e308, -1.7e308]) * 1e-310,
        np.concatenate([np.full(200_000, 0.5), normal(100_000, np.float64)]),
    ],
    ids=["normal", "cauchy", "lognormal", "outliers", "huge", "denormal", "atom"],
)
def test_bins_of_long_arrays(values):
    histogram = histograms.weighted_histogram(values)
    assert not histogram.exact
    assert 1000 < histogram.points.size <= histograms.HISTOGRAM_BINS
    assert histogram.weights.sum() == values.size
    assert (np.diff(histogram.points) > 0).all()
    assert histogram.points[0] >= values.min()
    assert histogram.points[-1] <= values.max()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_floats_are_always_counted_exactly(dtype):
    values = normal(200_000, dtype)
    histogram = histograms.weighted_histogram(values)
    points, counts = np.unique(values.astype(np.float64), return_counts=True)
    np.testing.assert_array_equal(histogram.points, points)
    np.testing.assert_array_equal(histogram.weights, counts)
    assert histogram.exact


@given(weights(), st.integers(1, 70))
def test_distinct_values_are_found_up_to_a_limit(values, limit):
    expected = np.unique(values.astype(np.float64))
    found = histograms.distinct_values(values, limit)
    if expected.size > limit:
        assert found is None
    else:
        assert found is not None
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found.astype(np.float64), expected)
        assert not np.signbit(found[found == 0]).any()


def test_distinct_values_of_a_long_array():
    values = np.tile(np.arange(-3, 4, dtype=np.float32), 100_000)
    assert histograms.distinct_values(values, 16).tolist() == [-3, -2, -1, 0, 1, 2, 3]


@given(weights(min_size=1), st.integers(16, 64))
def test_weights_add_up(values, bins):
    counts = np.arange(1, values.size + 1, dtype=np.float32).reshape(values.shape)
    histogram = histograms.weighted_histogram(values, bins, counts)
    assert histogram.weights.sum() == pytest.approx(counts.sum(dtype=np.float64))
    plain = histograms.weighted_histogram(values, bins)
    assert histogram.points.size == plain.points.size
    if plain.exact:
        np.testing.assert_array_equal(histogram.points, plain.points)


def test_weights_of_long_arrays_count_like_repeated_values():
    values = np.append(normal(150_000), np.float32(1e6))
    counts = np.random.default_rng(0).integers(1, 4, values.size)
    weighted = histograms.weighted_histogram(values, 1024, counts.astype(np.float32))
    total = np.sum(values.astype(np.float64) * counts)
    assert weighted.weights.sum() == counts.sum()
    assert np.sum(weighted.points * weighted.weights) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_values_are_refused(bad):
    values = np.ones((2, 3), np.float32)
    values[1, 2] = bad
    with pytest.raises(ValueError, match=r"values\[1, 2\] is (nan|inf)"):
        histograms.weighted_histogram(values)
    with pytest.raises(ValueError, match=r"weights\[1, 2\] is (nan|inf)"):
        histograms.weighted_histogram(np.ones((2, 3)), weights=values)
