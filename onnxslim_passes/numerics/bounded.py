"""k-means in which no value moves farther than a bound.

The fewest intervals of length 2 reach that cover all values are found from left to right. Where
there are more clusters than that, the shortest intervals for which they suffice are the start, and
Lloyd's iteration then moves each centroid as far as its values allow: the squared error falls and
the bound holds at every step.
"""

import math
from bisect import bisect_left, bisect_right

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray
from onnxslim_passes.numerics.clustering import settled
from onnxslim_passes.numerics.codebooks import Cells, Codebook, Reading, Row, share
from onnxslim_passes.numerics.histograms import HISTOGRAM_BINS

Floats = npt.NDArray[np.float64]

_HALVINGS = 10  # of the length of the intervals at the start
_TRIES = 4


class _TooFewError(Exception):
    """A row needs more clusters."""


def bounded_kmeans_1d(
    values: FloatArray,
    clusters: int,
    reach: npt.ArrayLike,
    *,
    axis: int | None = None,
    keep_zero: bool = True,
    bins: int = HISTOGRAM_BINS,
    weights: FloatArray | None = None,
) -> Codebook | None:
    """As `kmeans_1d`, but no value moves farther than `reach`.

    Where values come as means of bins, the ends of clusters are known to a bin only. So the result
    is checked against the values, and made again with a reach shorter by what was exceeded.

    Args:
        values: the weight, any shape; left unchanged.
        clusters: K, 2 to 65536.
        reach: >= 0; one number, or with `axis` one for each channel, shape (C,).
        axis: None for one codebook, or the channel axis for a codebook a channel.
        keep_zero: exact zeros stay exact zeros.
        bins: points of the histogram.
        weights: how much the squared error of each value counts, > 0, shaped like `values`.

    Returns:
        The codebook, or None if so many values cannot hold the bound.

    Raises:
        ValueError: NaN or infinity with its position, or an argument out of range.
    """
    reading = Reading(clusters=clusters, bins=bins, keep_zero=keep_zero, weights=weights)
    reading.check(values)
    count = 1 if axis is None else values.shape[axis]
    wanted = np.broadcast_to(np.asarray(reach, np.float64), (count,))
    allowed = wanted.copy()

    def fit(rows: list[Row]) -> list[Cells]:
        reaches = np.array([np.ldexp(allowed[row.number], -row.exponent) for row in rows])
        starts = [_start(row, clusters, reach) for row, reach in zip(rows, reaches, strict=True)]
        return settled(rows, starts, reaches)

    for _ in range(_TRIES):
        try:
            book = share(values, axis, reading, fit)
        except _TooFewError:
            return None
        excess = _largest_moves(values, book) - wanted
        if not (excess > 0).any():
            return book
        allowed = np.where(excess > 0, allowed - 2 * excess, allowed)
        if (allowed < 0).any():
            break
    return None


def _largest_moves(values: FloatArray, book: Codebook) -> Floats:
    """The largest difference in each channel, shape (C,); (1,) without channels."""
    moved = np.abs(values.astype(np.float64) - book.values().astype(np.float64))
    if book.axis is None:
        return np.array([moved.max(initial=0.0)])
    others = tuple(axis for axis in range(values.ndim) if axis != book.axis)
    return np.asarray(moved.max(axis=others, initial=0.0))


def _start(row: Row, clusters: int, reach: float) -> Floats:
    """K ascending centroids, one of them the row's pin, of which each point has one in reach."""
    points = row.histogram.points.tolist()
    best = _cover(points, row.pin, clusters, reach)
    if best is None:
        raise _TooFewError
    low, high = 0.0, reach
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = _cover(points, row.pin, clusters, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return np.array(best + best[-1:] * (clusters - len(best)))


def _cover(points: list[float], pin: float, most: int, reach: float) -> list[float] | None:
    """The middles of the fewest intervals of length 2 reach, the pin's included, if no more."""
    middles: list[float] = []
    pinned = not math.isnan(pin)
    at = 0
    while at < len(points):
        first = points[at]
        if pinned and first >= pin - reach:
            # The interval around the pin, even if no point lies in it.
            middles.append(pin)
            pinned = False
            at = max(at, bisect_right(points, pin + reach))
            continue
        if len(middles) + pinned == most:
            return None
        end = bisect_right(points, first + 2 * reach)
        if pinned:
            end = min(end, bisect_left(points, pin - reach))
        middles.append((first + points[end - 1]) / 2)
        at = end
    if pinned:
        middles.append(pin)
    return middles
