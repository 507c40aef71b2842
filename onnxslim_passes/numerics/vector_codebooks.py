"""Codebooks of vectors: neighbouring weights share one index (product quantization).

With K vectors of g weights an index of log2(K) bits serves g weights, and the vectors lie where
pairs or quads of weights do, so that for the same bits the error is below that of single values
(Gersho and Gray 1992, Vector Quantization and Signal Compression, chapter 10; Stock et al. 2020,
"And the Bit Goes Down", arXiv:1907.05686, for networks).

Lloyd's iteration runs on a sample from k-means++ (scikit-learn's), then once on all vectors. Errors
may count differently for each element, which scikit-learn's `KMeans` cannot do:

    sum_j m_j (x_j - c_j)^2 = [m, m x] . [c^2, -2 c] + constant,

one matrix product for all vectors and centroids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray, check_finite
from onnxslim_passes.numerics.histograms import check_weights

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

MAX_VECTORS = 256

_SAMPLES_A_CLUSTER = 128
_SMALLEST_SAMPLE = 1 << 14
_MAX_STEPS = 50
_TOLERANCE = 1e-3  # of the error, between two steps
_CHUNK = 1 << 12  # vectors that are compared with all centroids at a time


@dataclass(frozen=True, kw_only=True)
class VectorCodebook:
    """K shared vectors, and which of them each vector takes.

    Attributes:
        centroids: float64, shape (K, g), distinct.
        indices: uint8, shape (n,), < K.
    """

    centroids: Floats
    indices: npt.NDArray[np.uint8]

    @property
    def clusters(self) -> int:
        """K."""
        return int(self.centroids.shape[0])


def kmeans_vectors(
    vectors: FloatArray,
    clusters: int,
    *,
    weights: FloatArray | None = None,
    seed: int = 0,
    keep_zero: bool = True,
) -> VectorCodebook:
    """Share `clusters` vectors so that the squared error is small.

    Args:
        vectors: shape (n, g); left unchanged.
        clusters: K, 2 to 256.
        weights: how much the squared error of each element counts, > 0, shape (n, g).
        seed: of the sample and of k-means++.
        keep_zero: vectors of zeros stay so.

    Returns:
        A codebook of at most K vectors; with at most K distinct ones, exactly these.

    Raises:
        ValueError: NaN or infinity with its position, or an argument out of range.
    """
    if not 2 <= clusters <= MAX_VECTORS:
        raise ValueError(f"clusters is {clusters}; expected 2 to {MAX_VECTORS}")
    check_finite(vectors, "vectors")
    if weights is not None:
        check_weights(weights, vectors.shape)
    if (known := distinct_vectors(vectors, clusters)) is not None:
        centroids, inverse = known
        indices = inverse.astype(np.uint8)
        return VectorCodebook(centroids=centroids.astype(np.float64), indices=indices)
    pinned = keep_zero and bool((vectors == 0).all(axis=1).any())
    # Divided by their size, squares of float32 neither overflow nor vanish.
    exponent = int(np.frexp(max(float(np.abs(vectors).max()), np.finfo(np.float64).tiny))[1])
    fitter = _Fitter(vectors, weights, exponent, pinned=pinned)
    centroids = fitter.fit(clusters, seed)
    indices, _ = fitter.nearest(centroids)
    return VectorCodebook(centroids=np.ldexp(centroids, exponent) + 0.0, indices=indices)


def distinct_vectors(vectors: Array, limit: int) -> tuple[Array, npt.NDArray[np.int64]] | None:
    """The distinct rows of (n, g), sorted by their elements, and which of them each row is.

    -0.0 counts as 0.0.

    Returns:
        None if there are more than `limit`; a small sample usually tells.
    """
    step = max(1, vectors.shape[0] // _CHUNK)
    if step > 1 and len(_unique(vectors[::step])[0]) > limit:
        return None
    found, inverse = _unique(vectors)
    return (found, inverse) if len(found) <= limit else None


def _unique(vectors: Array) -> tuple[Array, npt.NDArray[np.int64]]:
    found, inverse = np.unique(vectors + vectors.dtype.type(0), axis=0, return_inverse=True)
    return found, inverse.reshape(-1)


class _Fitter:
    """Vectors with weights, divided by a power of two."""

    def __init__(
        self, vectors: FloatArray, weights: FloatArray | None, exponent: int, *, pinned: bool
    ) -> None:
        self._vectors = vectors
        self._weights = weights
        self._exponent = exponent
        self._pinned = pinned

    def fit(self, clusters: int, seed: int) -> Floats:
        """Centroids (K, g); the first one is 0 if pinned."""
        rng = np.random.default_rng(seed)
        size = self._vectors.shape[0]
        wanted = max(_SMALLEST_SAMPLE, _SAMPLES_A_CLUSTER * clusters)
        sampled = size > wanted
        chosen = np.sort(rng.choice(size, wanted, replace=False)) if sampled else slice(None)
        points, weights = self._part(chosen)
        centroids = self._start(points, weights, clusters, seed)
        previous = np.inf
        for _ in range(_MAX_STEPS):
            indices, errors = nearest_vectors(points, weights, centroids)
            error = float(errors.sum())
            if previous - error <= _TOLERANCE * error:
                break
            previous = error
            centroids = self._moved(centroids, [(points, weights, indices)])
            centroids = self._refilled(centroids, points, indices, errors)
        if sampled:
            centroids = self._moved(centroids, self._assigned(centroids))
        return centroids

    def nearest(self, centroids: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
        """Indices and errors of all vectors."""
        parts = [(i, e) for _, _, i, e in self._walk(centroids)]
        return np.concatenate([i for i, _ in parts]), np.concatenate([e for _, e in parts])

    def _part(self, chosen: Any) -> tuple[Array, Array | None]:
        points = np.ldexp(self._vectors[chosen].astype(np.float64), -self._exponent)
        weights = None if self._weights is None else self._weights[chosen].astype(np.float32)
        return points.astype(np.float32), weights

    def _walk(
        self, centroids: Floats
    ) -> Iterator[tuple[Array, Array | None, npt.NDArray[np.uint8], Floats]]:
        for start in range(0, self._vectors.shape[0], _CHUNK):
            points, weights = self._part(slice(start, start + _CHUNK))
            yield points, weights, *nearest_vectors(points, weights, centroids)

    def _assigned(
        self, centroids: Floats
    ) -> Iterator[tuple[Array, Array | None, npt.NDArray[np.uint8]]]:
        for points, weights, indices, _ in self._walk(centroids):
            yield points, weights, indices

    def _start(self, points: Array, weights: Array | None, clusters: int, seed: int) -> Floats:
        from sklearn.cluster import kmeans_plusplus  # takes long to import

        shares = None if weights is None else weights.mean(axis=1)
        drawn, _ = kmeans_plusplus(
            points, clusters - self._pinned, sample_weight=shares, random_state=seed % (1 << 32)
        )
        zero = np.zeros((int(self._pinned), points.shape[1]))
        return np.concatenate([zero, drawn.astype(np.float64)])

    def _moved(
        self,
        centroids: Floats,
        parts: Any,
    ) -> Floats:
        """The weighted means of the vectors of each centroid; those without any stay."""
        count, length = centroids.shape
        totals, sums = np.zeros((count, length)), np.zeros((count, length))
        for points, weights, indices in parts:
            for j in range(length):
                share = None if weights is None else weights[:, j].astype(np.float64)
                moment = points[:, j] if share is None else share * points[:, j]
                totals[:, j] += np.bincount(indices, share, minlength=count)
                sums[:, j] += np.bincount(indices, moment, minlength=count)
        moved = np.divide(sums, totals, out=centroids.copy(), where=totals > 0)
        moved[: int(self._pinned)] = 0.0
        return moved

    def _refilled(
        self, centroids: Floats, points: Array, indices: npt.NDArray[np.uint8], errors: Floats
    ) -> Floats:
        """Centroids without vectors go where the errors are largest."""
        counts = np.bincount(indices, minlength=centroids.shape[0])
        counts[: int(self._pinned)] = 1
        empty = np.flatnonzero(counts == 0)
        if empty.size:
            worst = np.argsort(-errors, kind="stable")[: empty.size]
            centroids[empty] = points[worst]
        return centroids


def nearest_vectors(
    points: Array, weights: Array | None, centroids: Floats
) -> tuple[npt.NDArray[np.uint8], Floats]:
    """The nearest centroid of each point, and its weighted squared error.

    Args:
        points: float32, shape (n, g), of moderate size: their squares do not overflow.
        weights: float32, > 0, shape (n, g), or None: all the same.
        centroids: shape (K, g), K <= 256.

    Returns:
        uint8, shape (n,), and float64, shape (n,).
    """
    indices = np.empty(points.shape[0], np.uint8)
    errors = np.empty(points.shape[0])
    near = centroids.astype(np.float32)
    squares, double = np.square(near), -2 * near
    for start in range(0, points.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        here = points[part]
        if weights is None:
            distances = here @ double.T + squares.sum(axis=1)
            own = np.square(here).sum(axis=1)
        else:
            shares = weights[part]
            distances = np.hstack([shares, shares * here]) @ np.hstack([squares, double]).T
            own = (shares * np.square(here)).sum(axis=1)
        indices[part] = distances.argmin(axis=1)
        least = np.take_along_axis(distances, indices[part, None].astype(np.int64), 1)[:, 0]
        errors[part] = np.maximum(own + least, 0)
    return indices, errors
