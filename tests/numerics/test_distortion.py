import math

import numpy as np
import pytest

from onnxslim_passes.numerics import distortion


def test_a_known_ratio():
    original = np.full(1000, 10.0, np.float32)
    assert distortion.sqnr_db(original, original + np.float32(1)) == pytest.approx(20.0)


def test_float16_sums_do_not_overflow():
    original = np.full(100_000, 100.0, np.float16)
    assert distortion.sqnr_db(original, original + np.float16(1)) == pytest.approx(40.0)


def test_limits():
    zeros, ones = np.zeros(3), np.ones(3)
    assert distortion.sqnr_db(ones, ones) == math.inf
    assert distortion.sqnr_db(np.empty(0), np.empty(0)) == math.inf
    assert distortion.sqnr_db(zeros, ones) == -math.inf


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"shapes differ: \(2,\) and \(3,\)"):
        distortion.sqnr_db(np.ones(2), np.ones(3))


def test_squares_that_count_differently():
    original, changed = np.array([1.0, 2.0]), np.array([1.5, 2.0])
    plain = distortion.sqnr_db(original, changed)
    ones = distortion.weighted_sqnr_db(original, changed, np.ones(2))
    assert ones == pytest.approx(plain)
    assert distortion.weighted_sqnr_db(original, changed, np.array([0, 1])) == np.inf
    assert distortion.weighted_sqnr_db(original, changed, np.array([4, 0.0])) < plain
    assert distortion.weighted_sqnr_db(np.zeros(2), changed, np.ones(2)) == -np.inf
