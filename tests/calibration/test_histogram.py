"""The histogram by octaves."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim_passes.calibration.histogram import Histogram

Array = npt.NDArray[Any]

values = hnp.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
)


def counted(*pieces: Array) -> Histogram:
    seen = Histogram()
    for piece in pieces:
        seen.update(piece)
    return seen


@given(values=values)
def test_every_value_is_in_a_bin_and_bins_ascend(values: Array) -> None:
    seen = counted(values)
    lower, upper, counts = seen.bins()
    assert counts.sum() == seen.total == values.size
    assert (seen.low, seen.high) == (lower[0], upper[-1]) == (values.min(), values.max())
    assert (lower <= upper).all()
    assert (upper[:-1] <= lower[1:]).all()


@given(values=values)
def test_bins_are_narrow(values: Array) -> None:
    lower, upper, _ = counted(values).bins()
    peak = np.abs(values).max().astype(np.float64)
    told = np.maximum(np.abs(lower), np.abs(upper)) > peak * 2.0**-30
    width = (upper - lower)[told]
    # Below float32's normal numbers, bins are 2**14 of its smallest steps.
    limit = np.maximum(np.abs(upper), np.abs(lower))[told] / 512 + 2.0**-135
    assert (width <= limit).all()


@given(values=values, cuts=st.lists(st.integers(0, 60), max_size=5))
def test_counts_do_not_depend_on_grouping_or_order(values: Array, cuts: list[int]) -> None:
    whole = counted(values).bins()
    parts = counted(*np.split(values[::-1], sorted(cuts))).bins()
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


def test_counts_against_numpy() -> None:
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    lower, upper, counts = counted(x[:70_001], x[70_001:]).bins()
    some = np.random.default_rng(1).integers(1, len(lower) - 1, 50)
    for i in some:
        inside = (lower[i] < x) & (x < upper[i])
        on_edge = (x == lower[i]) | (x == upper[i])
        assert np.count_nonzero(inside) <= counts[i] <= np.count_nonzero(inside | on_edge)


def test_zeros_of_both_signs_have_one_bin() -> None:
    lower, upper, counts = counted(np.array([0.0, -0.0, 1.0, -1.0], np.float32)).bins()
    assert counts.tolist() == [1, 2, 1]
    assert (lower[1], upper[1]) == (0, 0)


def test_non_finite_values_are_refused_and_not_counted() -> None:
    seen = counted(np.ones(3, np.float32))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            seen.update(np.array([1.0, bad], np.float32))
    assert seen.total == 3


def test_views_that_are_not_contiguous() -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (x.T, x[:, ::2], x[::-1]):
        for a, b in zip(counted(view).bins(), counted(view.copy()).bins(), strict=True):
            np.testing.assert_array_equal(a, b)
