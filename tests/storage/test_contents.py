"""Codes and tables against plain NumPy, and giving up early."""

import numpy as np
import pytest

from onnxslim_passes.storage.contents import Contents, varints_bytes


def test_most_frequent_value_has_code_zero() -> None:
    shared = Contents(np.array([3, 0, 0, 5, 0, 3], np.float32)).shared
    assert shared is not None
    assert shared.table.tolist() == [0, 3, 5]
    assert shared.codes.tolist() == [1, 0, 0, 2, 0, 1]
    assert shared.counts.tolist() == [3, 2, 1]
    assert shared.entropy_bits == pytest.approx(1.459, abs=1e-3)


def test_values_are_compared_by_their_bits() -> None:
    zeros_and_nans = np.array([0, 0x80000000, 0x7FC00000, 0x7FC00001], np.uint32)
    contents = Contents(zeros_and_nans.view(np.float32))
    assert contents.shared is not None
    assert contents.shared.clusters == 4
    assert contents.entries == 3


@pytest.mark.parametrize("rare_at", [0, 777_777, 1_199_999])
def test_a_value_the_sample_misses_is_found(rare_at: int) -> None:
    values = np.zeros(1_200_000, np.float32)
    values[rare_at] = 2.5
    shared = Contents(values).shared
    assert shared is not None
    assert shared.table.tolist() == [0, 2.5]
    assert np.flatnonzero(shared.codes).tolist() == [rare_at]


def test_more_than_256_values_are_not_shared() -> None:
    values = np.zeros(1_200_000, np.float32)
    values[500_000:500_256] = np.arange(1, 257)
    assert Contents(values).shared is None
    assert Contents(np.arange(70_000, dtype=np.float16)).shared is None


def test_tables_per_channel() -> None:
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(24, 4)).astype(np.float32)
    codes = rng.integers(0, 4, (24, 90))
    values = np.take_along_axis(tables, codes, 1).T.copy()
    (shared,) = Contents(values).shared_by_channel
    assert shared.axis == 1
    assert shared.clusters == 4
    rebuilt = np.take_along_axis(shared.table, shared.codes.astype(np.int64), 1)
    assert (values == rebuilt.T).all()


def test_short_channels_are_not_worth_a_table() -> None:
    rng = np.random.default_rng(0)
    assert Contents(rng.normal(size=(960, 1, 3, 3)).astype(np.float32)).shared_by_channel == ()


@pytest.mark.parametrize("positions", [[], [0], [127, 128], [16383, 16384, 40_000], [2_097_152]])
def test_bytes_of_positions(positions: list[int]) -> None:
    elements = np.zeros(2_100_000, np.uint8)
    elements[positions] = 1
    expected = sum(max(1, -(-p.bit_length() // 7)) for p in positions)
    assert varints_bytes(elements) == expected
