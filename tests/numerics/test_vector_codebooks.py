import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from onnxslim_passes.numerics.clustering import kmeans_1d
from onnxslim_passes.numerics.distortion import sqnr_db
from onnxslim_passes.numerics.vector_codebooks import distinct_vectors, kmeans_vectors


def restored(book):
    return book.centroids[book.indices]


def vectors(count, length, seed=0, law="normal"):
    draw = getattr(np.random.default_rng(seed), law)
    return draw(0, 0.05, (count, length)).astype(np.float32)


@given(st.integers(0, 99), st.integers(1, 60), st.integers(1, 4), st.integers(2, 20))
def test_a_codebook_is_well_formed(seed, count, length, clusters):
    values = vectors(count, length, seed)
    values[::3] = 0
    book = kmeans_vectors(values, clusters, seed=seed)
    assert book.clusters <= clusters
    assert book.indices.shape == (count,)
    assert (restored(book)[::3] == 0).all()
    assert not np.signbit(restored(book)[::3]).any()
    if np.unique(values, axis=0).shape[0] <= clusters:
        np.testing.assert_array_equal(restored(book), values)


def test_the_error_is_that_of_scikit_learn():
    values = vectors(4000, 2)
    ours = np.sum((values - restored(kmeans_vectors(values, 32))) ** 2)
    theirs = KMeans(32, n_init=3, random_state=0).fit(values).inertia_
    # Both end in local optima.
    assert ours <= 1.03 * theirs


@pytest.mark.parametrize(("length", "clusters", "bits"), [(2, 16, 2), (2, 256, 4), (4, 16, 1)])
def test_groups_err_less_than_single_values_of_as_many_bits(length, clusters, bits):
    values = vectors(20_000, length, law="laplace")
    together = sqnr_db(values, restored(kmeans_vectors(values, clusters)))
    alone = sqnr_db(values, kmeans_1d(values, 1 << bits).values())
    assert together > alone + 1


def test_weights_count():
    values = vectors(5000, 2)
    weights = np.ones_like(values)
    weights[:, 0] = 100
    plain, weighted = kmeans_vectors(values, 16), kmeans_vectors(values, 16, weights=weights)
    assert np.sum(weights * (values - restored(weighted)) ** 2) < 0.7 * np.sum(
        weights * (values - restored(plain)) ** 2
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_results_scale_with_the_vectors(scale):
    values = vectors(2000, 2)
    factor = np.float32(2.0 ** round(np.log2(scale)))
    first, second = kmeans_vectors(values, 16), kmeans_vectors(values * factor, 16)
    np.testing.assert_array_equal(first.indices, second.indices)
    np.testing.assert_allclose(first.centroids * factor, second.centroids)


def test_one_seed_gives_one_result():
    values = vectors(40_000, 2)
    first, again, other = (kmeans_vectors(values, 64, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.indices, again.indices)
    assert not np.array_equal(first.indices, other.indices)


def test_distinct_vectors():
    values = np.array([[1, -0.0], [0, 1], [1, 0]], np.float32)
    found, inverse = distinct_vectors(values, 2)
    assert found.tolist() == [[0, 1], [1, 0]]
    assert inverse.tolist() == [1, 0, 1]
    assert distinct_vectors(values, 1) is None
    assert distinct_vectors(vectors(100_000, 2), 256) is None


def test_wrong_arguments():
    with pytest.raises(ValueError, match="clusters is 257; expected 2 to 256"):
        kmeans_vectors(vectors(3, 2), 257)
    with pytest.raises(ValueError, match=r"vectors\[0, 1\] is nan"):
        kmeans_vectors(np.array([[0, np.nan]]), 2)
    with pytest.raises(ValueError, match="weights have shape"):
        kmeans_vectors(vectors(3, 2), 2, weights=np.ones(3))
