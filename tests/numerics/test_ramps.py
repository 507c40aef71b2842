"""How sparsity rises, and how it is shared out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_passes.numerics.ramps import ramp, shared_out

LEVELS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


@pytest.mark.parametrize("kind", ["cubic", "linear", "steps"])
def test_a_ramp_rises_to_one(kind):
    shares = [ramp(share, kind) for share in np.linspace(0, 1, 50)]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= 0.25
    assert shares[-1] == 1


def test_cubic_removes_most_at_first():
    assert ramp(0.5, "cubic") == 0.875
    assert ramp(0.5, "linear") == 0.5
    assert [ramp(share, "steps") for share in (0, 0.24, 0.25, 0.9)] == [0.25, 0.25, 0.5, 1.0]


def test_a_share_outside_is_refused():
    with pytest.raises(ValueError, match="a fraction"):
        ramp(1.1, "cubic")


@given(st.lists(st.integers(10, 10**6), min_size=1, max_size=6), st.floats(0, 0.99), st.data())
def test_shares_reach_the_sparsity(sizes, sparsity, data):
    seed = data.draw(st.integers(0, 10**6))
    errors = np.sort(np.random.default_rng(seed).random((len(sizes), len(LEVELS))) ** 3, axis=1)
    shares = shared_out(sizes, LEVELS, errors, sparsity)
    assert all(0 <= share <= LEVELS[-1] for share in shares)
    kept = sum(size * (1 - share) for size, share in zip(sizes, shares, strict=True))
    # At most what is asked for, and, by interpolation, not much less.
    assert kept <= sum(sizes) * (1 - sparsity) * (1 + 1e-6) + 1e-6
    assert kept >= sum(sizes) * (1 - sparsity) * (1 - 1e-6) - 1e-6


def test_a_sensitive_layer_keeps_more():
    errors = np.array([[0, 1e-4, 1e-3, 5e-3, 0.01, 0.1], [0, 0.1, 0.5, 1, 2, 5]])
    tough, sensitive = shared_out([1000, 1000], LEVELS, errors, 0.6)
    assert tough > 0.85 > sensitive


def test_what_no_level_reaches_is_refused():
    with pytest.raises(ValueError, match="levels reach"):
        shared_out([10], LEVELS, np.zeros((1, 6)), 0.999)
    with pytest.raises(ValueError, match="one row a layer"):
        shared_out([10], LEVELS, np.zeros((1, 5)), 0.9)
