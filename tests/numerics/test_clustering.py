import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from onnxslim_passes.numerics import clustering
from onnxslim_passes.numerics.distortion import sqnr_db, squared_error
from tests.numerics.exact_kmeans import exact_distortion
from tests.numerics.strategies import DTYPES, weights

INITS = ("optimal", "linear", "density", "kmeans++")
inits = st.sampled_from(INITS)
few = st.integers(2, 9)


def normal(size, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(0, 0.05, size).astype(dtype)


# --- laws of a codebook -------------------------------------------------------------------------


@given(weights(), few, inits)
def test_a_codebook_is_well_formed(values, clusters, init):
    book = clustering.kmeans_1d(values, clusters, init=init)
    assert book.centroids.dtype == values.dtype
    assert book.indices.dtype == np.uint8
    assert book.indices.shape == values.shape
    assert book.clusters <= clusters
    assert (1 << book.bits) >= book.clusters
    assert (np.diff(book.centroids.astype(np.float64)) > 0).all()
    restored = book.values()
    assert restored.dtype == values.dtype
    assert restored.shape == values.shape
    assert not np.signbit(restored[restored == 0]).any()


@given(weights(min_size=1), few, inits)
def test_every_value_goes_to_its_nearest_centroid(values, clusters, init):
    book = clustering.kmeans_1d(values, clusters, init=init)
    wide = values.astype(np.float64)
    distances = np.abs(wide[..., None] - book.centroids.astype(np.float64))
    taken = np.abs(wide - book.values().astype(np.float64))
    np.testing.assert_array_equal(taken, distances.min(axis=-1))


@given(weights(), few, inits)
def test_exact_zeros_stay_exact_zeros(values, clusters, init):
    restored = clustering.kmeans_1d(values, clusters, init=init).values()
    assert (restored[values == 0] == 0).all()


@given(weights(max_size=6), inits)
def test_few_distinct_values_are_kept_exactly(values, init):
    distinct = np.unique(values.astype(np.float64)).size
    book = clustering.kmeans_1d(values, max(2, distinct), init=init)
    assert book.clusters == distinct
    np.testing.assert_array_equal(book.values(), values)


@given(weights(), few, inits)
def test_clustering_twice_changes_nothing_more(values, clusters, init):
    once = clustering.kmeans_1d(values, clusters, init=init).values()
    twice = clustering.kmeans_1d(once, clusters, init=init).values()
    assert once.tobytes() == twice.tobytes()


@given(weights(), few, inits, st.integers(0, 2**40))
def test_one_seed_gives_one_result(values, clusters, init, seed):
    first = clustering.kmeans_1d(values, clusters, init=init, seed=seed)
    second = clustering.kmeans_1d(values.copy(), clusters, init=init, seed=seed)
    assert first.centroids.tobytes() == second.centroids.tobytes()
    assert first.indices.tobytes() == second.indices.tobytes()


@given(weights(rank=2, min_size=1, max_size=12), few, inits, st.integers(0, 1), st.randoms())
def test_permuted_channels_give_permuted_codebooks(values, clusters, init, axis, random):
    order = list(range(values.shape[axis]))
    random.shuffle(order)
    book = clustering.kmeans_1d(values, clusters, axis=axis, init=init)
    moved = clustering.kmeans_1d(np.take(values, order, axis), clusters, axis=axis, init=init)
    np.testing.assert_array_equal(moved.centroids, book.centroids[order])
    np.testing.assert_array_equal(moved.indices, np.take(book.indices, order, axis))


@given(weights(rank=3, min_size=1, max_size=6), few, st.integers(-3, 2))
def test_a_channel_is_clustered_as_if_it_were_alone(values, clusters, axis):
    book = clustering.kmeans_1d(values, clusters, axis=axis)
    assert book.centroids.shape == (values.shape[axis], book.clusters)
    for channel in range(values.shape[axis]):
        alone = np.take(values, channel, axis)
        expected = clustering.kmeans_1d(alone, clusters).values()
        np.testing.assert_array_equal(np.take(book.values(), channel, axis), expected)


@given(weights(), few)
def test_the_weight_is_left_alone(values, clusters):
    before = values.tobytes()
    clustering.kmeans_1d(values, clusters)
    assert values.tobytes() == before


# --- quality ------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([2, 5, 16]), st.sampled_from(["normal", "laplace"]))
def test_the_distortion_is_the_optimum(seed, clusters, law):
    values = getattr(np.random.default_rng(seed), law)(0, 0.05, 200).astype(np.float32)
    book = clustering.kmeans_1d(values, clusters)
    # float32 centroids
    assert squared_error(values, book.values()) <= 1.00001 * exact_distortion(values, clusters)


@pytest.mark.parametrize("law", ["normal", "laplace"])
@pytest.mark.parametrize(("size", "clusters"), [(2000, 4), (1500, 16), (1500, 32)])
def test_the_distortion_of_many_values_is_near_the_optimum(law, size, clusters):
    values = getattr(np.random.default_rng(1), law)(0, 0.05, size).astype(np.float32)
    book = clustering.kmeans_1d(values, clusters)
    # Merging points costs what the module says at most.
    assert squared_error(values, book.values()) <= 1.001 * exact_distortion(values, clusters)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 9))
def test_the_distortion_beside_a_kept_zero_is_the_optimum(seed, clusters):
    values = np.random.default_rng(seed).laplace(0.02, 0.05, 60)
    values[:10] = 0
    book = clustering.kmeans_1d(values, clusters)
    optimum = exact_distortion(values[10:], clusters, fixed=0.0)
    assert squared_error(values, book.values()) <= 1.00001 * optimum


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 6))
def test_weights_count_like_repeated_values(seed, clusters):
    rng = np.random.default_rng(seed)
    values, counts = rng.normal(0, 0.05, 100), rng.integers(1, 9, 100)
    weighted = clustering.kmeans_1d(values, clusters, weights=counts.astype(np.float32))
    repeated = clustering.kmeans_1d(np.repeat(values, counts), clusters)
    np.testing.assert_allclose(weighted.centroids, repeated.centroids, rtol=1e-12)


@pytest.mark.parametrize("clusters", [4, 16])
@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_a_histogram_is_as_good_as_the_raw_values(law, clusters):
    rng = np.random.default_rng(3)
    values = getattr(rng, law)(0, 0.05, 20_000).astype(np.float32)
    start = np.linspace(values.min(), values.max(), clusters)[:, None]
    raw = KMeans(clusters, init=start, n_init=1, tol=0, max_iter=1000).fit(values[:, None])
    ours = squared_error(values, clustering.kmeans_1d(values, clusters).values())
    assert ours <= 1.001 * raw.inertia_


@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_a_linear_start_ends_where_lloyd_ends(law):
    values = getattr(np.random.default_rng(3), law)(0, 0.05, 20_000).astype(np.float32)
    start = np.linspace(values.min(), values.max(), 16)[:, None]
    raw = KMeans(16, init=start, n_init=1, tol=0, max_iter=1000).fit(values[:, None])
    found = clustering.kmeans_1d(values, 16, init="linear", keep_zero=False).values()
    assert squared_error(values, found) == pytest.approx(raw.inertia_, rel=0.02)


@pytest.mark.parametrize("init", ["optimal", "density", "kmeans++"])
@pytest.mark.parametrize("clusters", [64, 256])
def test_many_clusters_reach_the_rate_of_panter_and_dite(init, clusters):
    """Of an optimal quantizer of a normal variable: distortion sqrt(3) pi / 2 / K^2 variance."""
    values = normal(200_000)
    optimum = np.sqrt(3) * np.pi / 2 / clusters**2
    ours = squared_error(values, clustering.kmeans_1d(values, clusters, init=init).values())
    assert ours / np.sum(values.astype(np.float64) ** 2) <= 1.08 * optimum


def test_a_centroid_is_the_mean_of_its_values():
    values = normal(100_000)
    book = clustering.kmeans_1d(values, 16)
    for code, centroid in enumerate(book.centroids):
        assert values[book.indices == code].mean() == pytest.approx(centroid, abs=1e-4)


def test_one_outlier_does_not_spoil_the_rest():
    values = normal(200_000)
    values[77] = 1e30
    book = clustering.kmeans_1d(values, 16)
    assert book.values()[77] == np.float32(1e30)
    rest = np.delete(np.arange(values.size), 77)
    plain = sqnr_db(values[rest], clustering.kmeans_1d(values[rest], 15).values())
    assert sqnr_db(values[rest], book.values()[rest]) == pytest.approx(plain, abs=0.3)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pruned_weights_keep_their_zeros(dtype, axis):
    values = normal((4, 30_000), dtype)
    values[np.abs(values) < 0.07] = 0
    book = clustering.kmeans_1d(values, 16, axis=axis)
    np.testing.assert_array_equal(book.values() == 0, values == 0)
    assert sqnr_db(values, book.values()) > 20


def test_zero_is_an_ordinary_value_without_keep_zero():
    values = np.concatenate([np.zeros(10), np.full(30, 0.01), np.full(5, 1.0)])
    book = clustering.kmeans_1d(values, 2, keep_zero=False)
    assert book.centroids[0] == pytest.approx(0.0075)


@pytest.mark.parametrize("scale", [1e-35, 1e-30, 1e30])
def test_results_scale_with_the_weights(scale):
    # Powers of two near the scales: exact in float32, so that codes must agree.
    factor = 2.0 ** round(np.log2(scale))
    values = normal(5000).astype(np.float16).astype(np.float32)
    scaled = (values.astype(np.float64) * factor).astype(np.float32)
    book, scaled_book = (clustering.kmeans_1d(v, 16) for v in (values, scaled))
    np.testing.assert_array_equal(book.indices, scaled_book.indices)


def test_denormal_weights():
    values = (normal(5000, np.float64) * 1e-40).astype(np.float32)
    book = clustering.kmeans_1d(values, 16)
    assert book.clusters == 16
    assert sqnr_db(values, book.values()) > 19


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_extreme_float64_weights(scale):
    values = normal(100_000, np.float64) * scale
    book = clustering.kmeans_1d(values, 16)
    assert sqnr_db(values / scale, book.values() / scale) > 19


def test_float64_weights_that_differ_in_their_last_digits():
    noise = normal(100_000, np.float64) * 1e-10
    book = clustering.kmeans_1d(1.0 + noise, 16)
    assert sqnr_db(1.0 + noise - 1.0, book.values() - 1.0) > 19


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("axis", [None, 0])
def test_empty_weights(shape, axis):
    values = np.empty(shape, np.float32)
    book = clustering.kmeans_1d(values, 4, axis=axis)
    assert book.values().shape == shape
    assert book.clusters == 0
    assert book.bits == 0


def test_constant_and_zero_weights():
    for number in (0.0, -0.0, 0.25):
        book = clustering.kmeans_1d(np.full((2, 2), number, np.float16), 4)
        assert book.centroids.tolist() == [abs(number)]
        assert book.bits == 0


def test_channels_with_fewer_values_repeat_their_last():
    values = np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]], np.float32)
    book = clustering.kmeans_1d(values, 4, axis=0)
    assert book.centroids.tolist() == [[1, 1, 1], [1, 2, 3]]
    np.testing.assert_array_equal(book.values(), values)


def test_more_clusters_than_a_byte_counts():
    values = normal(50_000)
    book = clustering.kmeans_1d(values, 1000)
    assert book.indices.dtype == np.uint16
    assert book.bits == 10
    assert sqnr_db(values, book.values()) > 50


def test_more_clusters_than_float16_tells_apart():
    values = (1.0 + normal(1000, np.float64) * 0.01).astype(np.float16)
    distinct = np.unique(values).size
    assert clustering.kmeans_1d(values, 256).clusters == distinct


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clusters": 1}, "clusters is 1; expected 2 to 65536"),
        ({"clusters": 4, "init": "random"}, "init is 'random'; expected 'optimal'"),
        ({"clusters": 4, "axis": 2}, "axis 2 does not exist"),
        ({"clusters": 4, "bins": 8}, "bins is 8; expected at least 16"),
        ({"clusters": 4, "weights": np.ones(20)}, r"weights have shape \(20,\); expected \(4, 5\)"),
        ({"clusters": 4, "weights": np.zeros((4, 5))}, "the smallest weight is 0.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        clustering.kmeans_1d(np.arange(20, dtype=np.float32).reshape(4, 5), **arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_weights_are_refused(bad):
    values = np.ones((2, 3), np.float32)
    values[1, 2] = bad
    with pytest.raises(ValueError, match=r"values\[1, 2\] is (nan|inf)"):
        clustering.kmeans_1d(values, 2)


def test_all_starts_agree_on_separated_groups():
    rng = np.random.default_rng(0)
    groups = [centre + rng.normal(0, 0.01, 500) for centre in (-1.0, -0.3, 0.4, 2.0)]
    values = np.concatenate(groups).astype(np.float32)
    inits = ("optimal", "density", "kmeans++")
    books = [clustering.kmeans_1d(values, 4, init=init).centroids for init in inits]
    for first, second in itertools.pairwise(books):
        np.testing.assert_allclose(first, second)
    np.testing.assert_allclose(books[0], [-1.0, -0.3, 0.4, 2.0], atol=2e-3)
