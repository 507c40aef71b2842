"""Rates of uniform grids: laws, and the limit of Gish and Pierce."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from onnxslim_passes.numerics.distortion import sqnr_db
from onnxslim_passes.numerics.rates import (
    MOST_DISTINCT,
    entropy_bits,
    equal_slope_rates,
    few_distinct,
    round_to_step,
    short_step,
    step_for_rate,
)

ORDINARY = st.floats(-1e3, 1e3, width=32)
WEIGHTS = nps.arrays(np.float32, st.integers(1, 300), elements=ORDINARY)
RATES = st.floats(0.1, 7.0)


@given(WEIGHTS, RATES)
def test_rounding_to_the_step_takes_no_more_than_the_rate(weights: np.ndarray, rate: float) -> None:
    step = step_for_rate(weights, rate)
    assert step > 0
    assert entropy_bits(np.rint(weights.astype(np.float64) / step)) <= rate + 1e-9


@given(st.integers(0, 1000), st.floats(0.5, 5.0))
def test_more_bits_make_less_error(seed: int, rate: float) -> None:
    weights = np.random.default_rng(seed).laplace(size=4000)
    steps = [step_for_rate(weights, each) for each in (rate, rate + 0.5)]
    coarse, fine = (sqnr_db(weights, np.rint(weights / step) * step) for step in steps)
    assert fine > coarse + 1  # half a bit is 3 dB where steps are fine


@pytest.mark.parametrize("rate", [3.0, 4.5, 6.0])
def test_normal_weights_reach_what_gish_and_pierce_found(rate: float) -> None:
    weights = np.random.default_rng(0).normal(size=200_000)
    step = step_for_rate(weights, rate)
    found = sqnr_db(weights, np.rint(weights / step) * step)
    # Samples of 200,000 have their entropy, and so the ratio, to about 0.01 bits.
    assert found == pytest.approx(20 * np.log10(2) * rate - 1.53, abs=0.1)


@pytest.mark.parametrize("value", [0.0, 3e-39, 2.5, -1e30])
def test_one_value_takes_no_bits(value: float) -> None:
    weights = np.full(20, value, np.float32)
    step = step_for_rate(weights, 4.0)
    rounded = np.rint(weights.astype(np.float64) / step) * step
    assert entropy_bits(rounded) == 0
    assert np.allclose(rounded, weights, rtol=1e-6, atol=0)


def test_what_is_no_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="rate is 0; expected bits a weight, above 0"):
        step_for_rate(np.ones(3), 0)
    with pytest.raises(ValueError, match=r"NaN|nan"):
        step_for_rate(np.array([1.0, np.nan]), 3)


@given(nps.arrays(np.int64, st.integers(1, 2000), elements=st.integers(-(1 << 30), 1 << 30)))
def test_few_distinct_moves_large_integers_by_a_small_part(codes: np.ndarray) -> None:
    found = few_distinct(codes)
    assert np.unique(found).size <= MOST_DISTINCT
    assert np.array_equal(few_distinct(-codes), -found)
    assert np.array_equal(few_distinct(found), found)
    if np.unique(codes).size <= MOST_DISTINCT:
        assert np.array_equal(found, codes)
    small = np.abs(codes) < 4  # 30 octaves leave that many below the first one at the least
    assert np.array_equal(found[small], codes[small])
    assert (np.abs(found - codes) <= np.abs(codes) / 4).all()


def test_few_distinct_leaves_the_bulk_alone() -> None:
    rng = np.random.default_rng(0)
    codes = np.rint(rng.normal(0, 12, 100_000)).astype(np.int64)
    codes[:200] = rng.integers(300, 2000, 200)
    found = few_distinct(codes)
    assert np.array_equal(found[200:], codes[200:])
    assert np.unique(found).size <= MOST_DISTINCT
    assert (np.abs(found - codes)[:200] <= codes[:200] / 64).all()


TENSORS = st.lists(
    st.tuples(st.integers(1, 10**7), st.floats(1, 6), st.floats(1e-12, 1e3)),
    min_size=1,
    max_size=8,
)


@given(TENSORS, st.floats(2, 6))
def test_bits_are_spent_where_an_exchange_gains_nothing(
    tensors: list[tuple[int, float, float]], rate: float
) -> None:
    sizes, rates, errors = zip(*tensors, strict=True)
    found = equal_slope_rates(sizes, rates, errors, rate=rate, lowest=1.0)
    share = np.array(sizes) / sum(sizes)
    assert found @ share == pytest.approx(rate, abs=1e-6)
    assert (found >= 1.0).all()
    assert (found <= 6.5).all()
    slopes = np.array(errors) * 4.0 ** (np.array(rates) - found) / share
    inner = (found > 1.0) & (found < 6.5)
    if inner.any():
        level = slopes[inner].max()
        assert slopes[inner].min() == pytest.approx(level, rel=1e-4)
        assert (slopes[found == 1.0] <= level * 1.0001).all()  # would rather give bits
        assert (slopes[found == 6.5] >= level * 0.9999).all()  # would rather take some


def test_tensors_without_error_get_the_least() -> None:
    found = equal_slope_rates([10, 10], [4, 4], [0, 1], rate=4.0, lowest=2.0)
    assert found == pytest.approx([2, 6])


def test_a_rate_beyond_the_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rate is 7.*expected 1\.0 to 6\.5"):
        equal_slope_rates([1], [4], [1], rate=7.0, lowest=1.0)


def test_feedback_is_kept_only_where_the_output_gains() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1, 16, 24)) * (rng.random((1, 16, 24)) > 0.2)
    inputs = rng.normal(size=(4, 24)) @ rng.normal(size=(24, 24))
    hessian = (inputs.T @ inputs)[None]
    nearest, plain = round_to_step(rows, 0.5)
    found, fed_back = round_to_step(rows, 0.5, hessian)
    assert (plain, fed_back) == (False, True)
    assert (found[rows == 0] == 0).all()
    errors = [np.asarray(rows - codes * 0.5) for codes in (nearest, found)]
    before, after = (float(np.sum((error @ hessian) * error)) for error in errors)
    assert after < before
    assert not round_to_step(nearest * 0.5, 0.5, hessian)[1]


@given(st.floats(1e-30, 1e30))
def test_short_steps_are_not_finer_and_give_exact_multiples(step: float) -> None:
    short = short_step(step)
    assert step <= short <= step * 1.002
    codes = np.arange(-(1 << 13), 1 << 13, 977)
    assert np.array_equal((codes * short).astype(np.float32).astype(np.float64), codes * short)
