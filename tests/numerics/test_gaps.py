"""Gaps as symbols and bytes: nothing is lost, and clumps cost less than chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.numerics.gaps import (
    MAX_SYMBOLS,
    best_gap_symbols,
    gap_positions,
    gap_symbols,
)
from onnxslim_passes.numerics.rice import best_rice

positions = st.lists(st.integers(0, 5000), min_size=1, max_size=80, unique=True).map(
    lambda found: np.sort(np.array(found, np.int64))
)


@given(positions, st.integers(1, 230))
def test_positions_come_back(asked: np.ndarray, short: int) -> None:
    gaps = gap_symbols(asked, short)
    assert np.array_equal(gaps.positions, asked)
    assert np.array_equal(gap_positions(gaps), asked)
    assert gaps.extra.size == np.count_nonzero(gaps.symbols >= short)


@given(st.lists(st.integers(0, 2**33), min_size=1, max_size=9, unique=True), st.integers(200, 255))
def test_long_gaps_are_cut(found: list[int], short: int) -> None:
    asked: np.ndarray = np.sort(np.array(found, np.int64) >> 12)
    asked = np.unique(asked)
    gaps = gap_symbols(asked, short)
    assert np.array_equal(gap_positions(gaps), gaps.positions)
    assert np.isin(asked, gaps.positions).all()
    longest = short + 256 * (MAX_SYMBOLS - short)
    assert gaps.positions.size <= asked.size + asked[-1] // longest
    assert np.diff(gaps.positions, prepend=-1).max() <= longest


@pytest.mark.parametrize("density", [0.005, 0.08, 0.3])
def test_random_gaps_cost_their_entropy(density: float) -> None:
    mask = np.random.default_rng(0).random(400_000) < density
    entropy = -mask.size * (density * np.log2(density) + (1 - density) * np.log2(1 - density))
    assert best_gap_symbols(np.flatnonzero(mask)).bits <= 1.04 * entropy


def test_clumps_cost_less_than_rice_codes() -> None:
    rng = np.random.default_rng(0)
    # Most columns of a matrix are empty.
    mask = (rng.random((300, 400)) < 0.4) & (np.arange(400) % 200 < 60)
    found = np.flatnonzero(mask)
    assert best_gap_symbols(found).bits < 0.9 * best_rice(found).bits
