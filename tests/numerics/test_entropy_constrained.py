"""Entropy-constrained quantization: never a smaller error than k-means, and fewer bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_passes.numerics.clustering import kmeans_1d
from onnxslim_passes.numerics.distortion import sqnr_db, squared_error
from onnxslim_passes.numerics.entropy_constrained import entropy_constrained_1d
from tests.numerics.strategies import DTYPES, weights

few = st.integers(2, 9)
rates = st.sampled_from([0.0, 1e-4, 0.003, 0.03, 0.3])


def entropy_bits(values):
    """Of all values together."""
    shares = np.unique(values, return_counts=True)[1] / values.size
    return values.size * float(-(shares * np.log2(shares)).sum())


def pruned(size=20_000, law="laplace", density=0.2):
    rng = np.random.default_rng(0)
    values = getattr(rng, law)(0, 0.05, size).astype(np.float32)
    values[np.abs(values) < np.quantile(np.abs(values), 1 - density)] = 0
    return values


def cost(values, restored, rate_weight):
    """D + lambda R with the lambda of these values, as the docstring defines it."""
    power = float(np.mean(values[values != 0].astype(np.float64) ** 2))
    return squared_error(values, restored) + rate_weight * power * entropy_bits(restored)


@given(weights(), few, rates, st.sampled_from(["optimal", "linear", "density"]))
def test_a_codebook_is_well_formed_and_zeros_stay(values, clusters, rate, init):
    book = entropy_constrained_1d(values, clusters, rate, init=init)
    assert book.centroids.dtype == values.dtype
    assert book.clusters <= clusters
    assert (np.diff(book.centroids.astype(np.float64)) > 0).all()
    restored = book.values()
    assert restored.shape == values.shape
    assert (restored[values == 0] == 0).all()
    assert not np.signbit(restored[restored == 0]).any()


@given(weights(min_size=1), few)
def test_without_a_rate_it_is_k_means(values, clusters):
    free = entropy_constrained_1d(values, clusters, 0.0).values()
    assert free.tobytes() == kmeans_1d(values, clusters).values().tobytes()


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(2, 24), st.sampled_from([1e-3, 0.01, 0.1]))
def test_no_less_error_than_k_means_and_no_higher_cost(seed, clusters, rate):
    values = np.random.default_rng(seed).laplace(0.01, 0.05, 300)
    plain = kmeans_1d(values, clusters).values()
    found = entropy_constrained_1d(values, clusters, rate).values()
    assert squared_error(values, found) >= squared_error(values, plain) * (1 - 1e-9)
    assert cost(values, found, rate) <= cost(values, plain, rate) * (1 + 1e-9)


@pytest.mark.parametrize("law", ["normal", "laplace"])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_bits_fall_and_error_rises_with_the_rate(law, density):
    values = pruned(law=law, density=density)
    found = [
        entropy_constrained_1d(values, 32, rate).values() for rate in (0, 1e-3, 0.003, 0.01, 0.03)
    ]
    bits = [entropy_bits(each) for each in found]
    errors = [squared_error(values, each) for each in found]
    assert bits == sorted(bits, reverse=True)
    assert errors == sorted(errors)
    assert bits[-1] < 0.8 * bits[0]


@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_fewer_bits_than_k_means_of_the_same_error(law):
    values = pruned(law=law, density=1.0)
    found = entropy_constrained_1d(values, 64, 0.01).values()
    error = squared_error(values, found)
    plain = next(
        restored
        for clusters in range(2, 65)
        if squared_error(values, restored := kmeans_1d(values, clusters).values()) <= error
    )
    assert entropy_bits(found) < 0.97 * entropy_bits(plain)


@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_fine_steps_reach_the_ratio_that_the_rate_promises(law):
    values = pruned(law=law, density=1.0)
    found = entropy_constrained_1d(values, 256, 1.4e-3).values()
    assert sqnr_db(values, found) == pytest.approx(31, abs=1.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_are_coded_as_if_alone(dtype):
    values = pruned(900).reshape(3, 300).astype(dtype)
    book = entropy_constrained_1d(values, 8, 0.01, axis=0)
    for row, restored in zip(values, book.values(), strict=True):
        alone = entropy_constrained_1d(row, 8, 0.01).values()
        assert restored.tobytes() == alone.tobytes()


def test_a_rare_zero_stays_although_its_word_is_long():
    values = np.concatenate([np.zeros(1), np.linspace(-1, 1, 400), np.full(5000, 0.02)])
    restored = entropy_constrained_1d(values, 8, 0.2).values()
    assert restored[0] == 0


@pytest.mark.parametrize("rate", [-0.1, np.nan, np.inf])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match="rate_weight is"):
        entropy_constrained_1d(np.ones(3), 2, rate)
