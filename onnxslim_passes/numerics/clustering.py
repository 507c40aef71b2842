"""Weight sharing: few values by 1-D k-means or a Gaussian mixture.

Han, Mao, Dally: "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
Quantization and Huffman Coding", ICLR 2016, section 3: K centroids minimize the sum of squared
differences to the weights.

How it is done:

1. A weight becomes a histogram of at most 2^16 points (`histograms`). Only values in a bin that a
   cluster border crosses can go to the wrong side, so the distortion is that of k-means on the raw
   values within 0.1% (tests and benchmarks/histogram_kmeans.py measure it), and 10^8 values cost a
   few walks over the data.
2. Centroids start at the optimum, found by dynamic programming (`partition`): exact for few
   distinct values (256, or 16 K), within 0.05% for more. Or evenly spaced over the range
   ("linear"), at quantiles ("density"), or by k-means++ (scikit-learn's).
3. Lloyd's iteration with exchanges of clusters settles them (`intervals`); from a linear start
   without exchanges. That ends at a squared error of about 1.5 times the optimum, and is what the
   paper found best: the few large weights, which matter, keep values of their own. The
   frequencies of the values differ more, too, so that Huffman codes are shorter.
4. Every value goes to its nearest centroid, after centroids were rounded to the weight's dtype.

scikit-learn's `KMeans` is the reference in the tests, not the engine, for two measured reasons. It
stops once centroids move by less than 1e-4 of the *total* variance, and never moves a cluster to
another region: 10^6 normal weights and 256 clusters from a linear start end after 7 iterations at
2.2 times the distortion reached here. And one `fit` takes about 10 ms, for every channel.
"""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray
from onnxslim_passes.numerics.codebooks import Cells, Codebook, Reading, Row, share
from onnxslim_passes.numerics.histograms import HISTOGRAM_BINS
from onnxslim_passes.numerics.intervals import Rows, settle
from onnxslim_passes.numerics.mixtures import fit_mixture
from onnxslim_passes.numerics.partition import optimal_centroids

Init = Literal["optimal", "linear", "density", "kmeans++"]
Floats = npt.NDArray[np.float64]

MIXTURE_BINS = 1 << 12
"""Points that a mixture is fitted to: its densities are smooth, and every point costs K of them."""

_INITS = ("optimal", "linear", "density", "kmeans++")
# More centroids than this start at quantiles: the tables of the optimum would be too large.
_MOST_OPTIMAL = 1 << 8


def kmeans_1d(
    values: FloatArray,
    clusters: int,
    *,
    axis: int | None = None,
    init: Init = "optimal",
    seed: int = 0,
    keep_zero: bool = True,
    bins: int = HISTOGRAM_BINS,
    weights: FloatArray | None = None,
) -> Codebook:
    """Share `clusters` values among the weights so that the squared error is small.

    Args:
        values: the weight, any shape; left unchanged.
        clusters: K, 2 to 65536.
        axis: None for one codebook, or the channel axis for a codebook a channel.
        init: where centroids start; only "kmeans++" draws them.
        seed: of k-means++; the same for every channel, so that channels do not depend on each
            other.
        keep_zero: exact zeros stay exact zeros (see the module's text).
        bins: points of the histogram.
        weights: how much the squared error of each value counts, > 0, shaped like `values`.

    Returns:
        A codebook of at most K values; with at most K distinct weights, exactly these.

    Raises:
        ValueError: NaN or infinity with its position, or an argument out of range.
    """
    check_init(init)
    reading = Reading(clusters=clusters, bins=bins, keep_zero=keep_zero, weights=weights)
    reading.check(values)
    return share(values, axis, reading, lambda rows: fitted(rows, clusters, init, seed))


def gaussian_mixture_1d(
    values: FloatArray,
    clusters: int,
    *,
    axis: int | None = None,
    init: Init = "optimal",
    seed: int = 0,
    keep_zero: bool = True,
    bins: int = MIXTURE_BINS,
    weights: FloatArray | None = None,
) -> Codebook:
    """Share the means of a Gaussian mixture of `clusters` components.

    EM starts at the clusters of `kmeans_1d`, as scikit-learn's `GaussianMixture` starts at those of
    `KMeans`. Each value takes the nearest mean, not that of the component it most likely comes
    from: a wide component claims the tails on both sides of a narrow one, and would send them to
    its mean in the middle.

    Arguments as for `kmeans_1d`. With zeros kept, K - 1 components describe the other values.

    Returns:
        A codebook of at most K values; with at most K distinct weights, exactly these.

    Raises:
        ValueError: NaN or infinity with its position, or an argument out of range.
    """
    check_init(init)
    reading = Reading(clusters=clusters, bins=bins, keep_zero=keep_zero, weights=weights)
    reading.check(values)

    def fit(rows: list[Row]) -> list[Cells]:
        starts = fitted(rows, clusters, init, seed)
        return [
            Cells(_mixed(row, start.centroids)) for row, start in zip(rows, starts, strict=True)
        ]

    return share(values, axis, reading, fit)


def check_init(init: str) -> None:
    """Raise `ValueError` for an unknown start."""
    if init not in _INITS:
        raise ValueError(f"init is {init!r}; expected {', '.join(map(repr, _INITS))}")


def fitted(rows: list[Row], clusters: int, init: Init, seed: int) -> list[Cells]:
    """The cells of k-means, one of each row's centroids exactly its pin unless that is NaN."""
    starts = _starts(rows, clusters, init, seed)
    return settled(rows, starts, exchange=init != "linear")


def settled(
    rows: list[Row], starts: list[Floats], reach: Floats | None = None, *, exchange: bool = True
) -> list[Cells]:
    """Lloyd's iteration from these centroids; see `settle`."""
    table = Rows([row.histogram for row in rows])
    pins = np.array([row.pin for row in rows]) - table.middles
    shifted = np.stack(starts) - table.middles[:, None]
    settled = settle(table, shifted, pins, reach, exchange=exchange)
    # The pinned centroid must come back as exactly 0, which x - m + m need not be.
    return [
        Cells(np.where(centroids == pin, 0.0, centroids + middle))
        for centroids, pin, middle in zip(settled, pins, table.middles, strict=True)
    ]


def _starts(rows: list[Row], clusters: int, init: Init, seed: int) -> list[Floats]:
    """K ascending starting centroids a row, one of them exactly its pin unless that is NaN."""
    if init == "optimal":
        if clusters <= _MOST_OPTIMAL:
            pins = np.array([row.pin for row in rows])
            return optimal_centroids([row.histogram for row in rows], clusters, pins)
        init = "density"
    return [_initial(row, clusters, init, seed) for row in rows]


def _initial(row: Row, clusters: int, init: Init, seed: int) -> Floats:
    """Numbers equal to the pin (zeros) are not in the histogram."""
    points, weights, pin = row.histogram.points, row.histogram.weights, row.pin
    if init == "linear":
        low, high = points[0], points[-1]
        if pin == pin:
            low, high = min(low, pin), max(high, pin)
        centroids = np.linspace(low, high, clusters)
    elif init == "density":
        cumulative = np.cumsum(weights)
        shares = (np.arange(clusters) + 0.5) / clusters * cumulative[-1]
        centroids = points[np.searchsorted(cumulative, shares)]
    else:
        # Here, because the import takes a second and 75 MB, and most recipes do without.
        from sklearn.cluster import kmeans_plusplus

        count = min(clusters, points.size)
        chosen, _ = kmeans_plusplus(
            points[:, None], count, sample_weight=weights, random_state=seed % (1 << 32)
        )
        centroids = np.sort(np.append(chosen[:, 0], np.full(clusters - count, points[-1])))
    centroids = np.asarray(centroids, np.float64).copy()
    if pin == pin:
        centroids[np.argmin(np.abs(centroids - pin))] = pin
    return np.sort(centroids)


def _mixed(row: Row, start: Floats) -> Floats:
    """The means of a mixture, and the pin."""
    if math.isnan(row.pin):
        return fit_mixture(row.histogram.points, row.histogram.weights, start).means
    others = start[start != row.pin]
    means = fit_mixture(row.histogram.points, row.histogram.weights, others).means
    return np.sort(np.append(means, row.pin))
