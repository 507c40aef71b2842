"""Rice codes: positions come back, sizes are those of the streams, near the entropy."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.numerics.rice import (
    MAX_PARAMETER,
    best_rice,
    rice_low,
    rice_positions,
    rice_size,
    rice_unary,
)


@given(
    positions=st.sets(st.integers(0, 5000), min_size=1, max_size=200),
    parameter=st.integers(0, MAX_PARAMETER),
)
def test_positions_come_back(positions: set[int], parameter: int) -> None:
    given_positions = np.array(sorted(positions), np.int64)
    unary, low = rice_unary(given_positions, parameter), rice_low(given_positions, parameter)
    assert rice_positions(unary, low, parameter).tolist() == given_positions.tolist()
    size = rice_size(given_positions, parameter)
    assert unary.size == (size.unary_bits + 7) // 8
    assert low.max() < 1 << parameter
    assert size.bits == size.unary_bits + parameter * low.size


def test_without_low_bits_the_stream_is_the_mask() -> None:
    mask = np.array([0, 1, 1, 0, 0, 0, 1, 0, 1, 1], np.uint8)
    stream = rice_unary(np.flatnonzero(mask), 0)
    assert np.unpackbits(stream, bitorder="little")[: mask.size].tolist() == mask.tolist()


@pytest.mark.parametrize("density", [0.0005, 0.01, 0.08, 0.2, 0.35, 0.5, 0.9])
def test_the_best_parameter_is_near_the_entropy(density: float) -> None:
    mask = np.random.default_rng(0).random(200_000) < density
    positions = np.flatnonzero(mask)
    best = best_rice(positions)
    assert best.bits == min(rice_size(positions, k).bits for k in range(MAX_PARAMETER + 1))
    if density <= 0.5:
        p = positions.size / mask.size
        entropy = -mask.size * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
        assert best.bits <= 1.07 * entropy


def test_places_beyond_32_bits() -> None:
    positions: npt.NDArray[np.int64] = np.array([3, 2**31, 2**31 + 1, 2**33], np.int64)
    size = best_rice(positions)
    assert size.parameter == MAX_PARAMETER
    unary, low = rice_unary(positions, size.parameter), rice_low(positions, size.parameter)
    assert rice_positions(unary, low, size.parameter).tolist() == positions.tolist()
