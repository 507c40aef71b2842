import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from onnxslim_passes.numerics import clustering
from onnxslim_passes.numerics.distortion import squared_error
from onnxslim_passes.numerics.histograms import weighted_histogram
from onnxslim_passes.numerics.mixtures import fit_mixture


def three_groups(size=3000):
    rng = np.random.default_rng(0)
    groups = [rng.normal(m, s, n) for m, s, n in ((-1, 0.3, size), (0, 0.1, size), (2, 0.5, 99))]
    return np.concatenate(groups)


def test_the_mixture_is_that_of_scikit_learn():
    values = three_groups()
    start = np.array([-1.0, 0.0, 1.0])
    ours = fit_mixture(np.sort(values), np.ones(values.size), start)
    theirs = GaussianMixture(3, means_init=start[:, None], tol=1e-7, max_iter=2000)
    theirs.fit(values[:, None])
    order = np.argsort(theirs.means_[:, 0])
    # Both stop at a gain of the likelihood; near the optimum means differ by its square root.
    assert ours.log_likelihood == pytest.approx(theirs.score(values[:, None]), abs=1e-3)
    np.testing.assert_allclose(ours.means, theirs.means_[order, 0], atol=0.02)
    np.testing.assert_allclose(ours.shares, theirs.weights_[order], atol=0.01)
    deviations = np.sqrt(theirs.covariances_[order, 0, 0])
    np.testing.assert_allclose(np.sqrt(ours.variances), deviations, atol=0.02)


def test_a_histogram_has_the_mixture_of_its_values():
    values = three_groups(100_000)
    histogram = weighted_histogram(values, clustering.MIXTURE_BINS)
    start = np.array([-1.0, 0.0, 1.0])
    of_bins = fit_mixture(histogram.points, histogram.weights, start)
    of_values = fit_mixture(np.sort(values), np.ones(values.size), start)
    np.testing.assert_allclose(of_bins.means, of_values.means, atol=1e-3)
    np.testing.assert_allclose(of_bins.variances, of_values.variances, rtol=1e-3)


def test_likelihood_never_falls_and_components_may_vanish():
    points = np.array([0.0, 1.0, 1.0 + 1e-9, 5.0])
    mixture = fit_mixture(points, np.array([1.0, 2, 3, 4]), np.array([0.0, 1.0, 3.0, 5.0]))
    assert mixture.means.size == 3
    assert np.isfinite(mixture.log_likelihood)
    assert mixture.shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(mixture.means, [0, 1, 5], atol=1e-4)


def test_shared_values_are_the_means_of_the_components():
    values = three_groups().astype(np.float32)
    book = clustering.gaussian_mixture_1d(values, 3)
    np.testing.assert_allclose(book.centroids, [-1, 0, 2], atol=0.15)
    # k-means has the least error there is.
    least = squared_error(values, clustering.kmeans_1d(values, 3).values())
    assert least <= squared_error(values, book.values())


@pytest.mark.parametrize("axis", [None, 0])
def test_zeros_stay_zeros_and_are_no_component(axis):
    values = np.random.default_rng(0).normal(0, 0.1, (3, 4000)).astype(np.float32)
    values[np.abs(values) < 0.1] = 0
    book = clustering.gaussian_mixture_1d(values, 8, axis=axis)
    np.testing.assert_array_equal(book.values() == 0, values == 0)
    assert book.clusters == 8


def test_few_distinct_values_are_kept():
    values = np.array([0.25, -1.0, 0.25, 3.0], np.float16)
    assert clustering.gaussian_mixture_1d(values, 4).values().tolist() == values.tolist()
    assert clustering.gaussian_mixture_1d(np.zeros(0, np.float32), 4).clusters == 0
