import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_passes.numerics.bounded import bounded_kmeans_1d
from onnxslim_passes.numerics.clustering import kmeans_1d
from onnxslim_passes.numerics.distortion import squared_error
from tests.numerics.strategies import weights


def largest(values, book):
    return np.abs(values.astype(np.float64) - book.values().astype(np.float64)).max(initial=0)


@given(weights(min_size=1), st.integers(2, 9), st.floats(0.01, 1))
def test_no_value_moves_farther_than_the_bound(values, clusters, part):
    reach = part * np.abs(values.astype(np.float64)).max()
    book = bounded_kmeans_1d(values, clusters, reach)
    if book is not None:
        assert largest(values, book) <= reach
        assert (book.values()[values == 0] == 0).all()
        assert book.clusters <= clusters


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(2, 12))
def test_a_bound_that_even_intervals_hold_is_held(seed, clusters):
    values = np.random.default_rng(seed).normal(0, 1, 300)
    # Rounding of the ends of intervals.
    reach = np.ptp(values) / (2 * clusters) * (1 + 1e-9)
    book = bounded_kmeans_1d(values, clusters, reach)
    assert book is not None
    assert largest(values, book) <= reach


def test_gaps_need_no_clusters():
    values = np.concatenate([[-1.0, 1.0, 1.01], np.linspace(0.1, 0.14, 30)])
    assert bounded_kmeans_1d(values, 3, 0.021) is not None
    assert bounded_kmeans_1d(values, 2, 0.021) is None


def test_within_the_bound_the_error_is_small():
    values = np.random.default_rng(0).laplace(0, 0.05, 20_000)
    wide = bounded_kmeans_1d(values, 16, 10.0)
    best = squared_error(values, kmeans_1d(values, 16).values())
    # Without exchanges Lloyd's iteration ends in a local optimum.
    assert squared_error(values, wide.values()) <= 1.6 * best


def test_long_arrays_keep_the_bound_in_spite_of_bins():
    values = np.random.default_rng(0).normal(0, 0.05, 200_000).astype(np.float32)
    reach = 0.004
    book = bounded_kmeans_1d(values, 128, reach)
    assert largest(values, book) <= reach


def test_channels_have_bounds_of_their_own():
    values = np.random.default_rng(0).normal(0, 1, (3, 500)) * [[1], [10], [100]]
    reach = 0.2 * np.abs(values).max(axis=1)
    book = bounded_kmeans_1d(values, 8, reach, axis=0)
    moved = np.abs(values - book.values()).max(axis=1)
    assert (moved <= reach).all()
    assert bounded_kmeans_1d(values, 8, reach * [1, 1, 0.1], axis=0) is None


def test_wrong_arguments():
    with pytest.raises(ValueError, match="clusters is 1"):
        bounded_kmeans_1d(np.ones(3), 1, 0.1)
