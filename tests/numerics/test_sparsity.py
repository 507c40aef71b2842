import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.numerics import sparsity
from tests.numerics.strategies import DTYPES, weights

fractions = st.floats(0, 1)


@given(weights(), fractions)
def test_the_kept_count_is_exact_and_the_largest_are_kept(values, fraction):
    mask = sparsity.magnitude_mask(values, fraction)
    assert mask.shape == values.shape
    assert np.count_nonzero(~mask) == sparsity.pruned_count(values.size, fraction)
    magnitudes = np.abs(values.astype(np.float64))
    if mask.any() and not mask.all():
        assert magnitudes[mask].min() >= magnitudes[~mask].max()


@given(weights(), fractions)
def test_pruning_writes_positive_zeros_and_changes_nothing_else(values, fraction):
    mask = sparsity.magnitude_mask(values, fraction)
    pruned = sparsity.apply_mask(values, mask)
    assert pruned.dtype == values.dtype
    assert not np.signbit(pruned[~mask]).any()
    np.testing.assert_array_equal(pruned[mask], values[mask])


@given(st.integers(1, 40), fractions)
def test_of_equal_magnitudes_the_first_are_kept(size, fraction):
    values = np.where(np.arange(size) % 2, -1.0, 1.0).astype(np.float32)
    kept = size - sparsity.pruned_count(size, fraction)
    np.testing.assert_array_equal(sparsity.magnitude_mask(values, fraction), np.arange(size) < kept)


@given(st.lists(weights(max_size=20), max_size=4), fractions)
def test_one_threshold_for_many_arrays_is_that_of_their_concatenation(arrays, fraction):
    masks = list(sparsity.global_threshold(arrays, fraction).masks(arrays))
    if not arrays:
        assert masks == []
        return
    flat = np.concatenate([a.reshape(-1).astype(np.float64) for a in arrays])
    expected = sparsity.magnitude_mask(flat, fraction)
    np.testing.assert_array_equal(np.concatenate([m.reshape(-1) for m in masks]), expected)


def test_arrays_may_be_read_anew_at_each_walk():
    values = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    threshold = sparsity.global_threshold(lambda: iter(values), 0.75)
    kept = sum(int(mask.sum()) for mask in threshold.masks(iter(values)))
    assert kept == 300


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_longer_than_a_block(dtype):
    values = np.random.default_rng(1).normal(size=300_001).astype(dtype)
    mask = sparsity.magnitude_mask(values, 0.9)
    assert np.count_nonzero(~mask) == round(300_001 * 0.9)


@given(weights(), st.floats(0, 5))
def test_deviation_pruning_is_idempotent(values, threshold):
    once = sparsity.apply_mask(values, sparsity.deviation_mask(values, threshold))
    twice = sparsity.apply_mask(once, sparsity.deviation_mask(once, threshold))
    np.testing.assert_array_equal(once, twice)


def test_deviation_threshold_of_normal_weights():
    values = np.random.default_rng(0).normal(0, 0.02, 100_000).astype(np.float32)
    assert sparsity.deviation_threshold(values, 1.5) == pytest.approx(0.03, rel=0.01)
    pruned = 1 - sparsity.deviation_mask(values, 1.0).mean()
    assert pruned == pytest.approx(0.6827, abs=0.01)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_deviations_of_extreme_float64_numbers(scale):
    values = np.array([1.0, -1.0, 1.0]) * scale
    assert sparsity.deviation_threshold(values, 1.0) == pytest.approx(scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_weights_are_refused(bad):
    values = np.array([1.0, bad], np.float32)
    with pytest.raises(ValueError, match=r"weights\[1\] is (nan|inf); expected finite"):
        sparsity.magnitude_mask(values, 0.5)
    with pytest.raises(ValueError, match=r"weights\[1\] is (nan|inf); expected finite"):
        sparsity.deviation_mask(values, 0.5)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_sparsity_is_a_fraction(fraction):
    with pytest.raises(ValueError, match=r"expected a fraction in \[0, 1\]"):
        sparsity.magnitude_mask(np.ones(3), fraction)


def test_negative_deviations_are_refused():
    with pytest.raises(ValueError, match="expected a number of deviations >= 0"):
        sparsity.deviation_mask(np.ones(3), -1.0)


def test_nonzero_count_takes_negative_zero_for_zero():
    assert sparsity.nonzero_count(np.array([0.0, -0.0, 1e-45, 2], np.float32)) == 2
    assert sparsity.nonzero_count(np.array([0.0, -0.0, 2], ml_dtypes.bfloat16)) == 1


def test_entropies():
    assert sparsity.entropy_bits([1, 1, 1, 1]) == pytest.approx(2.0)
    assert sparsity.entropy_bits([5, 0]) == 0.0
    assert sparsity.entropy_bits([]) == 0.0
    assert sparsity.mask_entropy_bits(0.5) == pytest.approx(1.0)
    # Han et al.'s densities: 8% kept costs 0.402 bits a weight for the positions.
    assert sparsity.mask_entropy_bits(0.08) == pytest.approx(0.402, abs=1e-3)


@given(weights(max_size=12), st.data())
def test_n_of_m_keeps_the_largest_of_every_group(values, data):
    of = data.draw(st.integers(2, 5))
    kept = data.draw(st.integers(1, of - 1))
    axis = data.draw(st.integers(-values.ndim, values.ndim - 1))
    mask = sparsity.n_of_m_mask(values, kept, of, axis)
    rows = np.moveaxis(np.abs(values.astype(np.float64)), axis, -1)
    flags = np.moveaxis(mask, axis, -1)
    for start in range(0, rows.shape[-1], of):
        group, chosen = rows[..., start : start + of], flags[..., start : start + of]
        assert (chosen.sum(axis=-1) == min(kept, group.shape[-1])).all()
        least = np.where(chosen, group, np.inf).min(axis=-1, initial=np.inf)
        assert (np.where(chosen, 0, group).max(axis=-1, initial=0) <= least).all()


@pytest.mark.parametrize(("kept", "of"), [(0, 4), (4, 4), (5, 4)])
def test_n_of_m_that_prunes_nothing_or_all_is_refused(kept, of):
    with pytest.raises(ValueError, match="0 < N < M"):
        sparsity.n_of_m_mask(np.ones((4, 4), np.float32), kept, of, 0)


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)
)
def test_blocks_cover_a_weight(rows, columns, kernel, r, c):
    shape = (columns, rows, kernel)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    norms = sparsity.block_norms(values, (r, c), (1, 0))
    assert norms.shape == (-(-rows // r), -(-columns // c))
    first = values[:c, :r].astype(np.float64)
    assert norms[0, 0] == pytest.approx(np.sqrt(np.mean(first**2)))
    mask = sparsity.spread_mask(norms > np.median(norms), (r, c), (1, 0), shape)
    for row in range(rows):
        for column in range(columns):
            chosen = norms[row // r, column // c] > np.median(norms)
            assert (mask[column, row] == chosen).all()
