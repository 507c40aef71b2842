"""Weight sharing: 1-D k-means on a weighted histogram, and the codebooks it makes.

Han, Mao, Dally: "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
Quantization and Huffman Coding", ICLR 2016, section 3: K centroids minimize the sum of squared
differences to the weights; centroids start evenly spaced over the range ("linear", best in the
paper since large weights matter), at quantiles ("density"), or by k-means++ (scikit-learn's).

How it is done:

1. A weight becomes a histogram of at most 2^16 points: its distinct values with their counts when
   they are so few (always for 16-bit floats), else the mean and count of each bin. Only values in
   a bin that a cluster border crosses can go to the wrong side, so the distortion is that of
   k-means on the raw values within 0.1% (tests and benchmarks/histogram_kmeans.py measure it), and
   10^8 values cost a few walks over the data.
2. Lloyd's iteration runs on the sorted points: clusters are intervals, so one step is K - 1 binary
   searches and differences of prefix sums, for all channels of a weight at once. At rest, clusters
   are exchanged: where splitting one lowers the error by more than merging two neighbours raises
   it, both are done, and the iteration goes on. So the start matters little.
3. Every value goes to its nearest centroid, after centroids were rounded to the weight's dtype.

scikit-learn's `KMeans` is the reference in the tests, not the engine, for two measured reasons. It
stops once centroids move by less than 1e-4 of the *total* variance, and never moves a cluster to
another region: 10^6 normal weights and 256 clusters from a linear start end after 7 iterations at
2.2 times the distortion reached here. And one `fit` takes about 10 ms: a weight of 1,000 channels
takes 10 s, and 0.8 s here. Its `kmeans_plusplus` is used as it is.

Zeros: with `keep_zero`, a weight that has exact zeros gets a centroid that is exactly 0.0 and stays
there (one of the K codes); zeros stay zeros, values nearer to 0 than to any other centroid join
them. A weight without zeros spends no code on it. -0.0 counts as zero and comes back as +0.0.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import (
    FloatArray,
    blocks,
    by_channel,
    check_finite,
    normalized_axis,
    working_dtype,
)

Init = Literal["linear", "density", "kmeans++"]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

HISTOGRAM_BINS = 1 << 16
MAX_CLUSTERS = 1 << 16

_MAX_STEPS = 2000
# A row is at rest when a step lowers its distortion by less than this fraction: first coarsely, to
# try exchanges of clusters, then finely. Near rest Lloyd's gains shrink geometrically, so what is
# left on the table is a small multiple of the last gain.
_COARSE, _FINE = 1e-3, 1e-7
_ROW_BLOCK = 1 << 22  # elements of the channels that are iterated together


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """A set of numbers as distinct points with weights.

    Attributes:
        points: float64, shape (P,), strictly ascending, finite.
        weights: float64, shape (P,), > 0: how many numbers each point stands for.
        exact: True if the points are the numbers themselves, False if they are means of bins.
    """

    points: Floats
    weights: Floats
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """K shared values and, for each weight, which of them it takes.

    Attributes:
        centroids: in the weight's dtype, ascending; shape (K,) per tensor; (C, K) per channel,
            where a channel with fewer values repeats its last one.
        indices: uint8 (uint16 for K > 256), shape of the weight, < K.
        axis: the channel axis, counted from 0; None per tensor.
    """

    centroids: npt.NDArray[Any]
    indices: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    axis: int | None = None

    @property
    def clusters(self) -> int:
        """K, the number of centroids (of a channel)."""
        return int(self.centroids.shape[-1])

    @property
    def bits(self) -> int:
        """Bits that an index needs: 0 for a single centroid."""
        return max(self.clusters - 1, 0).bit_length()

    def values(self) -> npt.NDArray[Any]:
        """The clustered weight: centroids taken by the indices, same shape and dtype."""
        if self.axis is None:
            if self.centroids.size == 0:
                return np.empty(self.indices.shape, self.centroids.dtype)
            return np.take(self.centroids, self.indices)
        rows = by_channel(self.indices, self.axis)
        offsets = np.arange(rows.shape[0], dtype=np.int64)[:, None] * self.clusters
        taken = self.centroids.reshape(-1)[rows + offsets]
        shape = np.moveaxis(self.indices, self.axis, 0).shape
        return np.ascontiguousarray(np.moveaxis(taken.reshape(shape), 0, self.axis))


def distinct_values(values: FloatArray, limit: int) -> npt.NDArray[Any] | None:
    """The distinct values, ascending, in their dtype; None if there are more than `limit`.

    -0.0 and 0.0 are one value, 0.0. Ordinary weights are answered after a small part of them.
    """
    counted = _distinct_counts(values, limit)
    return None if counted is None else counted[0]


def weighted_histogram(values: FloatArray, bins: int = HISTOGRAM_BINS) -> Histogram:
    """At most `bins` points that stand for all of `values`.

    Up to `bins` distinct values are counted exactly. Else bins of one width cover the bulk of the
    values, and the tails outside it get a share of the bins by the same rule, so one huge outlier
    does not coarsen the rest. Counts add up to ``values.size``, and so do the bins' sums to the sum
    of the values within rounding.

    Raises:
        ValueError: NaN or infinity with its position, or `bins` < 16.
    """
    _check_bins(bins)
    check_finite(values)
    return _histogram(values.reshape(-1), bins)


def kmeans_1d(
    values: FloatArray,
    clusters: int,
    *,
    axis: int | None = None,
    init: Init = "linear",
    seed: int = 0,
    keep_zero: bool = True,
    bins: int = HISTOGRAM_BINS,
) -> Codebook:
    """Share `clusters` values among the weights so that the squared error is small.

    Args:
        values: the weight, any shape; left unchanged.
        clusters: K, 2 to 65536.
        axis: None for one codebook, or the channel axis for a codebook a channel.
        init: where centroids start; "linear" and "density" are deterministic.
        seed: of k-means++; the same for every channel, so that channels do not depend on each
            other.
        keep_zero: exact zeros stay exact zeros (see the module's text).
        bins: points of the histogram.

    Returns:
        A codebook of at most K values; with at most K distinct weights, exactly these.

    Raises:
        ValueError: NaN or infinity with its position, or an argument out of range.
    """
    if not 2 <= clusters <= MAX_CLUSTERS:
        raise ValueError(f"clusters is {clusters}; expected 2 to {MAX_CLUSTERS}")
    if init not in ("linear", "density", "kmeans++"):
        raise ValueError(f"init is {init!r}; expected 'linear', 'density' or 'kmeans++'")
    _check_bins(bins)
    check_finite(values)
    if axis is None:
        rows = values.reshape(1, -1)
    else:
        axis = normalized_axis(axis, values.ndim)
        rows = by_channel(values, axis)
    index_dtype = np.dtype(np.uint8 if clusters <= 256 else np.uint16)
    if values.size == 0:
        shape = (0,) if axis is None else (rows.shape[0], 0)
        empty = np.empty(values.shape, index_dtype)
        return Codebook(centroids=np.empty(shape, values.dtype), indices=empty, axis=axis)
    centroids = [
        row
        for group in _row_groups(rows)
        for row in _cluster_rows(group, clusters, init, seed, keep_zero, bins)
    ]
    indices = np.empty(rows.shape, index_dtype)
    for row, shared, codes in zip(rows, centroids, indices, strict=True):
        _assign(row, shared, codes)
    if axis is None:
        return Codebook(centroids=centroids[0], indices=indices.reshape(values.shape))
    moved = indices.reshape(np.moveaxis(values, axis, 0).shape)
    return Codebook(
        centroids=_padded(centroids),
        indices=np.ascontiguousarray(np.moveaxis(moved, 0, axis)),
        axis=axis,
    )


# --- histograms ---------------------------------------------------------------------------------


def _distinct_counts(values: FloatArray, limit: int) -> tuple[npt.NDArray[Any], Integers] | None:
    """Distinct values and their counts, or None if more than `limit`."""
    if values.dtype.itemsize <= 2:
        return _distinct_counts_of_patterns(values, limit)
    known = np.empty(0, values.dtype)
    counts = np.empty(0, np.int64)
    for block in blocks(values):
        found, found_counts = np.unique(block + values.dtype.type(0), return_counts=True)
        merged = np.union1d(known, found)
        if merged.size > limit:
            return None
        total = np.zeros(merged.size, np.int64)
        total[np.searchsorted(merged, known)] += counts
        total[np.searchsorted(merged, found)] += found_counts
        known, counts = merged, total
    return known, counts


def _distinct_counts_of_patterns(
    values: FloatArray, limit: int
) -> tuple[npt.NDArray[Any], Integers] | None:
    """The same for 16-bit and narrower floats: count bit patterns, no sorting of the values."""
    width = values.dtype.itemsize * 8
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    counts = np.zeros(1 << width, np.int64)
    for block in blocks(np.ascontiguousarray(values)):
        counts += np.bincount(block.view(unsigned), minlength=counts.size)
    negative_zero = 1 << (width - 1)
    counts[0] += counts[negative_zero]
    counts[negative_zero] = 0
    patterns = np.flatnonzero(counts)
    if patterns.size > limit:
        return None
    found = patterns.astype(unsigned).view(values.dtype)
    order = np.argsort(found.astype(np.float32), kind="stable")
    return found[order], counts[patterns][order]


def _check_bins(bins: int) -> None:
    if bins < 16:
        raise ValueError(f"bins is {bins}; expected at least 16")


def _histogram(flat: npt.NDArray[Any], bins: int) -> Histogram:
    counted = _distinct_counts(flat, bins)
    if counted is not None:
        points, counts = counted
        return Histogram(
            points=points.astype(np.float64), weights=counts.astype(np.float64), exact=True
        )
    points, weights = _binned(flat, bins)
    return Histogram(points=points, weights=weights, exact=False)


def _binned(flat: npt.NDArray[Any], bins: int) -> tuple[Floats, Floats]:
    """Means and counts of bins: uniform over the bulk, the tails by recursion."""
    low, high = float(flat.min()), float(flat.max())
    core_low, core_high = _bulk(flat, low, high)
    tails = (core_low > low) + (core_high < high)
    if not tails or bins < 64:
        return _uniform_bins(flat, low, high, bins)[:2]
    tail_bins = bins // 8
    points, weights, below, above = _uniform_bins(
        flat, core_low, core_high, bins - tails * tail_bins
    )
    parts = [
        (_part_histogram(below, tail_bins)),
        (points, weights),
        (_part_histogram(above, tail_bins)),
    ]
    return np.concatenate([p for p, _ in parts]), np.concatenate([w for _, w in parts])


def _part_histogram(flat: npt.NDArray[Any], bins: int) -> tuple[Floats, Floats]:
    if flat.size == 0:
        return np.empty(0), np.empty(0)
    part = _histogram(flat, bins)
    return part.points, part.weights


def _bulk(flat: npt.NDArray[Any], low: float, high: float) -> tuple[float, float]:
    """A range that holds 99% of the values and as much again on both sides, within [low, high]."""
    sample = flat[np.random.default_rng(0).integers(0, flat.size, 1 << 14)].astype(np.float64)
    first, last = (float(q) for q in np.quantile(sample, (0.005, 0.995)))
    width = last - first
    return max(first - width, low), min(last + width, high)


def _uniform_bins(
    flat: npt.NDArray[Any], low: float, high: float, bins: int
) -> tuple[Floats, Floats, npt.NDArray[Any], npt.NDArray[Any]]:
    """Means and counts of the non-empty bins over [low, high]; the values below, and above."""
    # float64 spans beyond its largest number, or too narrow to invert: scale by a power of two.
    exponent = math.frexp(max(abs(low), abs(high)))[1] if flat.dtype == np.float64 else 0
    low, high = math.ldexp(low, -exponent), math.ldexp(high, -exponent)
    width = (high - low) / bins
    per_width = 1 / width if width > 0 else 0.0
    counts, sums = np.zeros(bins), np.zeros(bins)
    below: list[npt.NDArray[Any]] = []
    above: list[npt.NDArray[Any]] = []
    for block in blocks(flat):
        wide = block.astype(np.float64)
        if exponent:
            with np.errstate(over="ignore"):  # of values outside
                wide = np.ldexp(wide, -exponent)
        if (outside := (wide < low) | (wide > high)).any():
            below.append(block[wide < low])
            above.append(block[wide > high])
            wide = wide[~outside]
        # Subtraction, product and truncation are monotonic: bins keep the order of the values.
        numbers = np.minimum((wide - low) * per_width, bins - 1).astype(np.int64)
        counts += np.bincount(numbers, minlength=bins)
        sums += np.bincount(numbers, weights=wide, minlength=bins)
    filled = counts > 0
    means = np.ldexp(sums[filled] / counts[filled], exponent)
    nothing = np.empty(0, flat.dtype)
    return (
        means,
        counts[filled],
        np.concatenate(below) if below else nothing,
        np.concatenate(above) if above else nothing,
    )


# --- rows of points and Lloyd's iteration -------------------------------------------------------


class _Rows:
    """Sorted weighted points of several rows, with prefix sums of their moments.

    Moments are taken about each row's middle point and summed outward from it, so that an outlier
    or a common offset does not cancel the digits of the other sums. All arrays are flat; row r owns
    ``points[starts[r]:starts[r] + sizes[r]]`` and ``sizes[r] + 1`` prefix sums from
    ``starts[r] + r`` on.
    """

    def __init__(self, histograms: list[Histogram]) -> None:
        self.sizes = np.array([h.points.size for h in histograms], np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.middles = np.array([h.points[h.points.size // 2] for h in histograms])
        shifted = [h.points - m for h, m in zip(histograms, self.middles, strict=True)]
        weights = [h.weights for h in histograms]
        self.points = np.concatenate(shifted)
        pairs = list(zip(shifted, weights, strict=True))
        self.weight_sums = np.concatenate([_outward_sums(w) for _, w in pairs])
        self.first_sums = np.concatenate([_outward_sums(w * x) for x, w in pairs])
        self.second_sums = np.concatenate([_outward_sums(w * x * x) for x, w in pairs])

    def edges(self, rows: Integers, centroids: Floats) -> Integers:
        """Where clusters begin and end: (len(rows), K + 1) point numbers within each row.

        Cluster k holds points ``[edges[k], edges[k + 1])``: those nearest to centroid k, the
        smaller centroid on a tie.
        """
        first = np.zeros((len(rows), 1), np.int64)
        borders = (centroids[:, 1:] + centroids[:, :-1]) / 2
        return np.hstack([first, self.below(rows, borders), self.sizes[rows][:, None]])

    def below(self, rows: Integers, borders: Floats) -> Integers:
        """How many points of each row are <= each of its borders; shaped like `borders`."""
        if len(rows) == 1:
            start, size = int(self.starts[rows[0]]), int(self.sizes[rows[0]])
            own = self.points[start : start + size]
            counts: Integers = np.searchsorted(own, borders, side="right")
            return counts
        # Binary search in all rows at once.
        starts = self.starts[rows][:, None]
        low = np.zeros(borders.shape, np.int64)
        high = np.broadcast_to(self.sizes[rows][:, None], borders.shape).copy()
        for _ in range(int(self.sizes[rows].max()).bit_length()):
            middle = (low + high) >> 1
            open_ = low < high
            inside = self.points[np.minimum(starts + middle, self.points.size - 1)] <= borders
            low = np.where(open_ & inside, middle + 1, low)
            high = np.where(open_ & ~inside, middle, high)
        return low

    def moments(self, rows: Integers, edges: Integers) -> tuple[Floats, Floats, Floats]:
        """Sums of weight, weight * x and weight * x^2 of each cluster: (len(rows), K) each."""
        at = edges + (self.starts[rows] + rows)[:, None]
        return (
            np.diff(self.weight_sums[at], axis=1),
            np.diff(self.first_sums[at], axis=1),
            np.diff(self.second_sums[at], axis=1),
        )


def _outward_sums(terms: Floats) -> Floats:
    """Prefix sums S with S[j] - S[i] = sum(terms[i:j]), anchored at 0 in the middle."""
    middle = terms.size // 2
    sums = np.zeros(terms.size + 1)
    np.cumsum(terms[middle:], out=sums[middle + 1 :])
    sums[:middle] = -np.cumsum(terms[:middle][::-1])[::-1]
    return sums


def _row_groups(rows: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Slices of rows of at most `_ROW_BLOCK` elements, one row at least."""
    step = max(1, _ROW_BLOCK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step]


def _cluster_rows(
    rows: npt.NDArray[Any], clusters: int, init: Init, seed: int, keep_zero: bool, bins: int
) -> list[npt.NDArray[Any]]:
    """The centroids of each row: ascending, distinct, in the weight's dtype."""
    results: dict[int, Floats] = {}
    pending: list[tuple[int, int, Histogram, float, Floats]] = []
    for number, row in enumerate(rows):
        histogram = _histogram(row, max(bins, clusters))
        if histogram.exact and histogram.points.size <= clusters:
            results[number] = histogram.points
            continue
        pin = math.nan
        if keep_zero and (row == 0).any():
            pin, histogram = 0.0, _without_zeros(row, histogram, bins)
        histogram, exponent = _normalized(histogram)
        start = _initial(histogram, clusters, init, seed, pin)
        pending.append((number, exponent, histogram, pin, start))
    if pending:
        table = _Rows([histogram for _, _, histogram, _, _ in pending])
        pins = np.array([pin for *_, pin, _ in pending]) - table.middles
        starts = np.stack([start for *_, start in pending]) - table.middles[:, None]
        settled = _lloyd(table, starts, pins)
        for r, (number, exponent, _, _, _) in enumerate(pending):
            # The pinned centroid must come back as exactly 0, which x - m + m need not be.
            row_centroids = np.where(settled[r] == pins[r], 0.0, settled[r] + table.middles[r])
            results[number] = np.ldexp(row_centroids, exponent)
    return [_rounded(results[number], rows.dtype) for number in range(len(rows))]


def _without_zeros(row: npt.NDArray[Any], histogram: Histogram, bins: int) -> Histogram:
    """The histogram of a row that has zeros, without them."""
    if not histogram.exact:
        return _histogram(row[row != 0], bins)
    others = histogram.points != 0
    points, weights = histogram.points[others], histogram.weights[others]
    return Histogram(points=points, weights=weights, exact=True)


def _normalized(histogram: Histogram) -> tuple[Histogram, int]:
    """The histogram divided by a power of two, so that squares fit into float64; the exponent."""
    exponent = math.frexp(float(np.abs(histogram.points[[0, -1]]).max()))[1]
    points = np.ldexp(histogram.points, -exponent)
    return Histogram(points=points, weights=histogram.weights, exact=histogram.exact), exponent


def _rounded(centroids: Floats, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Distinct ascending centroids in `dtype`, without -0.0."""
    rounded = np.unique(centroids.astype(dtype).astype(np.float64))
    return (rounded + 0.0).astype(dtype)


def _initial(histogram: Histogram, clusters: int, init: Init, seed: int, pin: float) -> Floats:
    """K ascending starting centroids, one of them exactly `pin` unless that is NaN.

    Numbers equal to the pin (zeros) are not in the histogram.
    """
    points, weights = histogram.points, histogram.weights
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


def _lloyd(rows: _Rows, centroids: Floats, pins: Floats) -> Floats:
    """Lloyd's iteration with exchanges, on all rows, until each is at rest.

    Args:
        rows: R rows of points.
        centroids: shape (R, K), ascending, in the rows' shifted coordinates.
        pins: shape (R,): the number that one centroid of the row keeps, or NaN.

    Returns:
        Settled centroids, shape (R, K), ascending.
    """
    settled = centroids.copy()
    active = np.arange(len(centroids))
    tolerance = np.full(len(centroids), _COARSE)
    for _ in range(_MAX_STEPS):
        current, pin = settled[active], pins[active][:, None]
        edges = rows.edges(active, current)
        weight, first, second = rows.moments(active, edges)
        means = np.divide(first, weight, out=current.copy(), where=weight > 0)
        following = np.where(current == pin, pin, means)
        gain = np.sum(weight * ((means - current) ** 2 - (means - following) ** 2), axis=1)
        errors = np.maximum(second - 2 * following * first + following**2 * weight, 0)
        # A lone far outlier: the difference of its huge squares is noise above all other errors.
        errors[(np.diff(edges, axis=1) == 1) & (following == means)] = 0
        distortion = errors.sum(axis=1)
        settled[active] = following
        resting = gain <= tolerance[active] * distortion
        coarse = resting & (tolerance[active] == _COARSE)
        if coarse.any():
            group = active[coarse]
            settled[group], gained = _exchange(rows, group, settled[group], pins[group])
            tolerance[group[gained <= _COARSE * distortion[coarse]]] = _FINE
        active = active[~resting | coarse]
        if active.size == 0:
            break
    return settled


def _exchange(
    rows: _Rows, active: Integers, centroids: Floats, pins: Floats
) -> tuple[Floats, Floats]:
    """Merge close neighbours and split wide clusters where the pair lowers the distortion.

    Lloyd's iteration moves centroids over long distances slowly, or never when a cluster is empty;
    this carries them there. A split is at the centroid; an empty cluster merges for nothing.

    Returns:
        New centroids, ascending, and by how much each row's distortion fell at least, shape (R,).
    """
    edges = rows.edges(active, centroids)
    halves = np.empty((len(active), 2 * centroids.shape[1] + 1), np.int64)
    halves[:, ::2] = edges
    # A tie at a border belongs to the smaller centroid: keep halves within their cluster.
    halves[:, 1::2] = np.clip(rows.below(active, centroids), edges[:, :-1], edges[:, 1:])
    weight, first, _ = rows.moments(active, halves)
    means = np.divide(first, weight, out=np.zeros_like(first), where=weight > 0)
    left, right = means[:, ::2], means[:, 1::2]
    gains = _merge_costs(weight[:, ::2], weight[:, 1::2], left, right)
    whole = weight[:, ::2] + weight[:, 1::2]
    total = first[:, ::2] + first[:, 1::2]
    middle = np.divide(total, whole, out=centroids.copy(), where=whole > 0)
    costs = _merge_costs(whole[:, :-1], whole[:, 1:], middle[:, :-1], middle[:, 1:])
    pinned = centroids == pins[:, None]
    gains[pinned] = 0.0
    costs[pinned[:, :-1] | pinned[:, 1:]] = np.inf
    result, gained = np.where(pinned, centroids, middle), np.zeros(len(active))
    for r in range(len(active)):
        for merged, divided in _exchanges(gains[r], costs[r]):
            gained[r] += gains[r, divided] - costs[r, merged]
            pair = slice(merged, merged + 2)
            if whole[r, pair].sum() > 0:
                result[r, merged] = total[r, pair].sum() / whole[r, pair].sum()
            result[r, merged + 1] = right[r, divided]
            result[r, divided] = left[r, divided]
    result.sort(axis=1)
    return result, gained


def _merge_costs(w: Floats, v: Floats, x: Floats, y: Floats) -> Floats:
    """The rise of the squared error when clusters of weights w, v and means x, y become one."""
    return np.divide(w * v, w + v, out=np.zeros_like(w), where=w + v > 0) * (x - y) ** 2


def _exchanges(gains: Floats, costs: Floats) -> list[tuple[int, int]]:
    """Pairs (k, j) of one row: merge clusters k and k + 1, split cluster j; none is used twice.

    The split that gains most has the first choice among the merges.
    """
    cheap = np.argsort(costs, kind="stable").tolist()
    used: set[int] = set()
    pairs: list[tuple[int, int]] = []
    for j in np.argsort(-gains, kind="stable").tolist():
        if j in used:
            continue
        cheap = [k for k in cheap if k not in used and k + 1 not in used]
        k = next((k for k in cheap if k not in (j, j - 1)), None)
        if k is None or gains[j] <= costs[k]:
            break
        used.update((k, k + 1, j))
        pairs.append((k, j))
    return pairs


# --- assignment ---------------------------------------------------------------------------------


def _assign(row: npt.NDArray[Any], centroids: npt.NDArray[Any], codes: npt.NDArray[Any]) -> None:
    """Write the number of each value's nearest centroid into `codes`; the smaller one on a tie."""
    dtype = working_dtype(row.dtype)
    wide = centroids.astype(np.float64)
    borders = _rounded_down(wide[:-1] / 2 + wide[1:] / 2, dtype)
    start = 0
    for block in blocks(row):
        codes[start : start + block.size] = np.searchsorted(borders, block.astype(dtype))
        start += block.size


def _rounded_down(borders: Floats, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The largest numbers of `dtype` not above `borders`.

    A number of that dtype is above the one exactly when it is above the other, so values are
    compared in their own width.
    """
    rounded = borders.astype(dtype)
    above = rounded.astype(np.float64) > borders
    return np.where(above, np.nextafter(rounded, dtype.type(-np.inf)), rounded)


def _padded(rows: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Rows of different lengths as one matrix, the last value of a row repeated."""
    width = max(row.size for row in rows)
    return np.stack([np.append(row, np.full(width - row.size, row[-1])) for row in rows])
