"""The best partition of sorted weighted points into K intervals, by dynamic programming.

With D[k][j] the least error of the first j points in at most k clusters,

    D[k][j] = min over i <= j of D[k - 1][i] + cost(i, j),

where cost(i, j) is the squared error of points i..j-1 about their mean, from prefix sums. The best
i does not decrease with j, so a layer takes O(P log P) steps by divide and conquer (Wu 1991,
"Optimal quantization by matrix searching"; Gronlund et al. 2017, arXiv:1701.07204). All rows, and
all j of one depth of the recursion, are computed at once.

One centroid may be held at 0: then the points are cut at 0 into two halves, counted outward. The
first cluster of each half is the one at 0, whose error is the sum of squares, and the two halves
share it and the K - 1 other clusters as they need them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.histograms import Histogram
from onnxslim_passes.numerics.intervals import outward_sums

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Of how many points the optimum is found: with 16 for each cluster, what merging loses is less than
# 0.05% of the error, once Lloyd's iteration has settled the result on all points.
_MOST_POINTS = 256
_POINTS_A_CLUSTER = 16
# Entries of the tables of last borders that are held at a time.
_TABLE = 1 << 22


def optimal_centroids(histograms: list[Histogram], clusters: int, pins: Floats) -> list[Floats]:
    """The K centroids of least squared error for each of several histograms.

    Exact for up to 256 points, or 16 K if that is more; beyond, neighbouring points are merged
    first, more of them where an optimal quantizer has wide clusters.

    Args:
        histograms: with a point at least each, within about [-1, 1].
        clusters: K.
        pins: 0 for rows of which one centroid is 0, else NaN.

    Returns:
        K ascending centroids for each; some are equal where fewer are enough.
    """
    limit = max(_MOST_POINTS, _POINTS_A_CLUSTER * clusters)
    centroids: list[Floats] = []
    for first, last in _batches([min(h.points.size, limit) for h in histograms], clusters):
        group = [_merged(histogram, limit) for histogram in histograms[first:last]]
        halves: list[_Half] = []
        for histogram, pin in zip(group, pins[first:last], strict=True):
            halves += _halves(histogram, pinned=bool(pin == 0))
        table = _Table(halves, clusters)
        number = 0
        for pin in pins[first:last]:
            if pin == 0:
                centroids.append(table.pinned_pair(number))
            else:
                centroids.append(table.centroids(number, clusters))
            number += 2 if pin == 0 else 1
    return centroids


def _batches(sizes: list[int], clusters: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose tables of borders are held together."""
    first, held = 0, 0
    for number, size in enumerate(sizes):
        if held and (held + size) * clusters > _TABLE:
            yield first, number
            first, held = number, 0
        held += size
    yield first, len(sizes)


def _merged(histogram: Histogram, limit: int) -> Histogram:
    """At most `limit` points; cells hold equal parts of the cube root of the density.

    That is how densely the clusters of an optimal quantizer lie (Panter and Dite 1951).
    """
    points, weights = histogram.points, histogram.weights
    if points.size <= limit:
        return histogram
    gaps = np.gradient(points)
    share = np.cumsum(np.cbrt(weights * gaps**2))
    cell = np.minimum((share / share[-1] * limit).astype(np.int64), limit - 1)
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    totals = np.add.reduceat(weights, starts)
    means = np.add.reduceat(weights * points, starts) / totals
    return Histogram(points=means, weights=totals, exact=False)


@dataclass(frozen=True)
class _Half:
    """Ascending points; with `pinned`, from 0 on, and `sign` says to which side."""

    points: Floats
    weights: Floats
    pinned: bool
    sign: float = 1.0


def _halves(histogram: Histogram, *, pinned: bool) -> list[_Half]:
    points, weights = histogram.points, histogram.weights
    if not pinned:
        return [_Half(points, weights, pinned=False)]
    negative = int(np.searchsorted(points, 0.0))
    return [
        _Half(-points[:negative][::-1], weights[:negative][::-1], pinned=True, sign=-1.0),
        _Half(points[negative:], weights[negative:], pinned=True),
    ]


class _Table:
    """D of all halves, and where the last cluster of each entry begins.

    Positions 0..P of a half are `base[h]` to `base[h] + size[h]` of the flat arrays.
    """

    def __init__(self, halves: list[_Half], clusters: int) -> None:
        self.halves = halves
        self.clusters = clusters
        self.size = np.array([half.points.size for half in halves], np.int64)
        self.base = np.cumsum(self.size + 1) - (self.size + 1)
        middles = [_middle(half) for half in halves]
        moved = [half.points - middle for half, middle in zip(halves, middles, strict=True)]
        weights = [half.weights for half in halves]
        pairs = list(zip(weights, moved, strict=True))
        self._weight = np.concatenate([outward_sums(w) for w in weights])
        self._first = np.concatenate([outward_sums(w * x) for w, x in pairs])
        self._second = np.concatenate([outward_sums(w * x * x) for w, x in pairs])
        layer = np.concatenate([_first_layer(half) for half in halves])
        ends = self.base + self.size
        self.error = np.empty((clusters + 1, len(halves)))
        self.error[0] = layer[ends]
        self._begins = np.empty((clusters, layer.size), np.int32)
        for number in range(clusters):
            layer = self._next(layer, self._begins[number])
            self.error[number + 1] = layer[ends]

    def centroids(self, half: int, clusters: int) -> Floats:
        """The centroids of the best partition into at most so many clusters, ascending.

        Those at 0 of pinned halves are not among them; clusters that are not needed repeat the
        first one.
        """
        base, end = int(self.base[half]), int(self.size[half])
        found: list[float] = []
        points, weights = self.halves[half].points, self.halves[half].weights
        for number in reversed(range(clusters)):
            begin = int(self._begins[number, base + end])
            if begin < end:
                members = slice(begin, end)
                total = weights[members].sum()
                found.append(float(weights[members] @ points[members] / total))
            end = begin
        missing = clusters - len(found)
        return np.array([found[-1] if found else 0.0] * missing + found[::-1])

    def pinned_pair(self, half: int) -> Floats:
        """Centroids of a half below 0 and of the next one, above 0, with 0 between them."""
        others = self.clusters - 1
        below, above = self.error[: others + 1, half], self.error[: others + 1, half + 1][::-1]
        split = int(np.argmin(below + above))
        negative = -self.centroids(half, split)[::-1]
        positive = self.centroids(half + 1, others - split)
        return np.sort(np.concatenate([negative, [0.0], positive])) + 0.0

    def _next(self, layer: Floats, begins: npt.NDArray[np.int32]) -> Floats:
        """The following layer; writes where its last clusters begin."""
        following = layer.copy()
        begins[self.base] = 0
        step = 1 << int(self.size.max()).bit_length()
        while step:
            half, end = self._odd_multiples(step)
            at = self.base[half]
            low = begins[at + end - step].astype(np.int64)
            right = end + step
            known = right <= self.size[half]
            high = np.where(known, begins[np.where(known, at + right, at)], end)
            best, where = self._least(layer, at, end, low, np.minimum(high, end))
            following[at + end] = best
            begins[at + end] = where
            step >>= 1
        return following

    def _odd_multiples(self, step: int) -> tuple[Integers, Integers]:
        """All (half, position) with a position that is an odd multiple of `step`."""
        counts = np.maximum((self.size - step) // (2 * step) + 1, 0)
        half = np.repeat(np.arange(counts.size), counts)
        rank = np.arange(half.size) - np.repeat(np.cumsum(counts) - counts, counts)
        return half, step + 2 * step * rank

    def _least(
        self, layer: Floats, at: Integers, end: Integers, low: Integers, high: Integers
    ) -> tuple[Floats, Integers]:
        """Min and argmin of D[i] + cost(i, end) over i from `low` to `high`, both included."""
        if not end.size:
            return np.empty(0), end
        counts = high - low + 1
        starts = np.cumsum(counts) - counts
        begin = np.arange(int(counts.sum())) + np.repeat(at + low - starts, counts)
        stop = at + end
        weight = np.repeat(self._weight[stop], counts) - self._weight[begin]
        first = np.repeat(self._first[stop], counts) - self._first[begin]
        second = np.repeat(self._second[stop], counts) - self._second[begin]
        cost = second - first * first / np.where(weight > 0, weight, 1.0)
        # Of one point or none: exactly nothing, whatever digits cancelled.
        cost[np.repeat(stop, counts) - begin <= 1] = 0.0
        total = layer[begin] + np.maximum(cost, 0.0)
        best = np.minimum.reduceat(total, starts)
        hits = np.flatnonzero(total == np.repeat(best, counts))
        found = begin[hits[np.searchsorted(hits, starts)]] - at
        return best, found


def _middle(half: _Half) -> float:
    """About which moments are taken, so that a common offset does not cancel their digits."""
    return 0.0 if half.pinned or not half.points.size else half.points[half.points.size // 2]


def _first_layer(half: _Half) -> Floats:
    """D[0]: all of the first j points at 0; or nothing but no points at all."""
    if half.pinned:
        return np.concatenate([[0.0], np.cumsum(half.weights * half.points**2)])
    return np.concatenate([[0.0], np.full(half.points.size, np.inf)])
