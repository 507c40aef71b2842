"""Shared values that are cheap to code: entropy-constrained scalar quantization.

Chou, Lookabaugh and Gray 1989, "Entropy-Constrained Vector Quantization"; for the weights of
networks Choi, El-Khamy and Lee 2017, "Towards the Limit of Network Quantization". k-means lowers
the squared error D of K shared values, whatever codes cost. Here

    D + lambda R,    R = - sum over k of n_k log2(n_k / n)

is lowered, R the bits of an ideal code for which of the K values an element takes. As in Lloyd's
iteration, two steps take turns until nothing is gained:

1. An element x goes to the value c_k with the smallest (x - c_k)^2 + lambda l_k, where l_k =
   - log2(n_k / n). Less 'x^2' these are lines in x, so that values have intervals: the lower
   envelope of the lines. A value that is not on the envelope is given up.
2. c_k becomes the mean of its elements, and n_k their number.

Zeros that are kept belong to the code: they have the shortest word where they are many, and a
small element next to them may join them.
"""

import math

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray
from onnxslim_passes.numerics.clustering import Init, check_init, fitted
from onnxslim_passes.numerics.codebooks import Cells, Codebook, Reading, Row, share
from onnxslim_passes.numerics.histograms import HISTOGRAM_BINS

Floats = npt.NDArray[np.float64]

_MAX_STEPS = 500
_LEAST_GAIN = 1e-7


def entropy_constrained_1d(
    values: FloatArray,
    clusters: int,
    rate_weight: float,
    *,
    axis: int | None = None,
    init: Init = "optimal",
    seed: int = 0,
    keep_zero: bool = True,
    bins: int = HISTOGRAM_BINS,
) -> Codebook:
    """Share at most `clusters` values so that squared error and code length are small together.

    Args:
        values: the weight, any shape; left unchanged.
        clusters: K at most, 2 to 65536; k-means with so many is the start.
        rate_weight: lambda, >= 0: the squared error that a bit is worth, as a fraction of the mean
            square of the values (of those that are not zero, where zeros are kept). With many
            clusters 1.4 * 10^(-S / 10) gives a signal-to-noise ratio of S to S + 2 dB: at the best
            one, fine steps have dD / dR = - 2 ln(2) D. 0 is k-means.
        axis: None for one codebook, or the channel axis for a codebook a channel.
        init: where k-means starts.
        seed: of k-means++.
        keep_zero: exact zeros stay exact zeros.
        bins: points of the histogram.

    Returns:
        A codebook of at most K values; elements may take another than the nearest one.

    Raises:
        ValueError: NaN or infinity with its position, or an argument out of range.
    """
    check_init(init)
    if not 0 <= rate_weight < math.inf:
        raise ValueError(f"rate_weight is {rate_weight}; expected 0 or more")
    reading = Reading(clusters=clusters, bins=bins, keep_zero=keep_zero)
    reading.check(values)

    def fit(rows: list[Row]) -> list[Cells]:
        starts = fitted(rows, clusters, init, seed)
        if not rate_weight:
            return starts
        return [
            _constrained(row, start.centroids, rate_weight)
            for row, start in zip(rows, starts, strict=True)
        ]

    return share(values, axis, reading, fit)


def _constrained(row: Row, centroids: Floats, rate_weight: float) -> Cells:
    """Iterates from these centroids, one of which is the row's pin unless that is NaN."""
    points, weights = row.histogram.points, row.histogram.weights
    centroids = np.unique(centroids)  # values that were not needed repeat another
    power = float(weights @ points**2) / float(weights.sum())
    bit = rate_weight * power
    sums = [np.concatenate([[0.0], np.cumsum(weights * points**degree)]) for degree in range(3)]
    borders = (centroids[1:] + centroids[:-1]) / 2
    cost = math.inf
    for _ in range(_MAX_STEPS):
        edges = np.searchsorted(points, borders, side="right")
        edges = np.concatenate([[0], edges, [points.size]])
        count, first, second = (np.diff(each[edges]) for each in sums)
        pinned = centroids == row.pin
        taken = (count > 0) | pinned
        borders = _kept_borders(borders, taken)
        count, first, second, pinned = count[taken], first[taken], second[taken], pinned[taken]
        centroids = np.where(pinned, row.pin, first / np.maximum(count, 1e-300))
        numbers = count + np.where(pinned, row.zeros, 0.0)
        lengths = np.log2(numbers.sum()) - np.log2(numbers)
        error = float((second - 2 * centroids * first + centroids**2 * count).sum())
        following = error + bit * float((numbers * lengths).sum())
        if following > cost * (1 - _LEAST_GAIN):
            break
        cost = following
        best = Cells(centroids, borders)
        centroids, borders = _envelope(centroids, bit * lengths, row.pin)
        borders = _around(row, centroids, borders)
    return best


def _kept_borders(borders: Floats, taken: npt.NDArray[np.bool_]) -> Floats:
    """The borders between those intervals that are taken, each up to where the next one begins."""
    starts = np.concatenate([[-math.inf], borders])[taken]
    return starts[1:]


def _around(row: Row, centroids: Floats, borders: Floats) -> Floats:
    """Borders with the pin between those next to it, so that zeros stay zeros."""
    at = np.flatnonzero(centroids == row.pin)
    if not at.size:
        return borders
    negative = row.histogram.points[row.histogram.points < 0]
    last = negative[-1] / 2 if negative.size else -math.inf
    number = np.arange(borders.size)
    return np.where(number < at[0], np.minimum(borders, last), np.maximum(borders, 0.0))


def _envelope(centroids: Floats, prices: Floats, pin: float) -> tuple[Floats, Floats]:
    """The centroids c of which (x - c)^2 + price is smallest somewhere, and the borders between.

    The pin is always among them.
    """
    pinned = centroids == pin
    if pinned.any():
        # Lowered until it touches the envelope.
        prices = np.where(pinned, np.min(prices + (centroids - pin) ** 2), prices)
    kept: list[int] = []
    borders: list[float] = []
    heights = centroids**2 + prices
    for number in range(centroids.size):
        border = -math.inf
        while kept:
            last = kept[-1]
            rise = 2 * (centroids[number] - centroids[last])
            border = float((heights[number] - heights[last]) / rise)
            if not borders or border > borders[-1] or pinned[last]:
                break
            kept.pop()
            borders.pop()
        if kept:
            borders.append(border)
        kept.append(number)
    return centroids[kept], np.maximum.accumulate(borders)
