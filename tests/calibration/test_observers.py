"""Laws of observers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim_passes.calibration import MinMax, Observer

OBSERVERS = [MinMax]

values = hnp.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@pytest.mark.parametrize("observer", OBSERVERS)
@given(values=values, cuts=st.lists(st.integers(0, 40), max_size=5))
def test_any_grouping_gives_the_same_range(
    observer: type[Observer], values: np.ndarray, cuts: list[int]
) -> None:
    whole, parts = observer(), observer()
    whole.update(values)
    for part in np.split(values, sorted(cuts)):
        parts.update(part)
    assert whole.range() == parts.range()


@given(values=values)
def test_min_max_is_the_smallest_and_the_largest(values: np.ndarray) -> None:
    observer = MinMax()
    observer.update(values)
    assert observer.range() == (values.min(), values.max())


@pytest.mark.parametrize("observer", OBSERVERS)
def test_nothing_seen_has_no_range(observer: type[Observer]) -> None:
    seen = observer()
    seen.update(np.zeros((0, 3)))
    assert all(math.isnan(bound) for bound in seen.range())
