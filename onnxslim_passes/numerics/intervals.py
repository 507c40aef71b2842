"""Lloyd's iteration on sorted weighted points, for many rows of them at once.

On a line clusters are intervals: one step is K - 1 binary searches and differences of prefix sums.
At rest, clusters are exchanged: where splitting one lowers the error by more than merging two
neighbours raises it, both are done, and the iteration goes on.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.histograms import Histogram

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_MAX_STEPS = 2000
# A row is at rest when a step lowers its distortion by less than this fraction: first coarsely, to
# try exchanges of clusters, then finely. Near rest Lloyd's gains shrink geometrically, so what is
# left on the table is a small multiple of the last gain.
_COARSE, _FINE = 1e-3, 1e-7


class Rows:
    """Sorted weighted points of several rows, with prefix sums of their moments.

    Moments are taken about each row's middle point and summed outward from it, so that an outlier
    or a common offset does not cancel the digits of the other sums. All arrays are flat; row r owns
    ``points[starts[r]:starts[r] + sizes[r]]`` and ``sizes[r] + 1`` prefix sums from
    ``starts[r] + r`` on.

    Args:
        histograms: one a row, with a point at least each.
    """

    def __init__(self, histograms: list[Histogram]) -> None:
        self.sizes = np.array([h.points.size for h in histograms], np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.middles = np.array([h.points[h.points.size // 2] for h in histograms])
        shifted = [h.points - m for h, m in zip(histograms, self.middles, strict=True)]
        weights = [h.weights for h in histograms]
        self.points = np.concatenate(shifted)
        pairs = list(zip(shifted, weights, strict=True))
        self.weight_sums = np.concatenate([outward_sums(w) for _, w in pairs])
        self.first_sums = np.concatenate([outward_sums(w * x) for x, w in pairs])
        self.second_sums = np.concatenate([outward_sums(w * x * x) for x, w in pairs])

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

    def ends(self, rows: Integers, edges: Integers) -> tuple[Floats, Floats]:
        """The smallest and the largest point of each cluster; anything where it is empty."""
        last = self.starts[rows] + self.sizes[rows] - 1
        at = edges + self.starts[rows][:, None]
        lowest = np.minimum(at[:, :-1], last[:, None])
        return self.points[lowest], self.points[np.maximum(at[:, 1:] - 1, 0)]


def outward_sums(terms: Floats) -> Floats:
    """Prefix sums S with S[j] - S[i] = sum(terms[i:j]), anchored at 0 in the middle."""
    middle = terms.size // 2
    sums = np.zeros(terms.size + 1)
    np.cumsum(terms[middle:], out=sums[middle + 1 :])
    sums[:middle] = -np.cumsum(terms[:middle][::-1])[::-1]
    return sums


def settle(
    rows: Rows,
    centroids: Floats,
    pins: Floats,
    reach: Floats | None = None,
    *,
    exchange: bool = True,
) -> Floats:
    """Lloyd's iteration with exchanges, on all rows, until each is at rest.

    Args:
        rows: R rows of points.
        centroids: shape (R, K), ascending, in the rows' shifted coordinates.
        pins: shape (R,): the number that one centroid of the row keeps, or NaN.
        reach: shape (R,): how far points may lie from their centroid. The start must keep to it;
            then every step does, as centroids are moved no farther than their points allow. There
            are no exchanges then.
        exchange: False for Lloyd's iteration alone, which ends at a local optimum near the start.

    Returns:
        Settled centroids, shape (R, K), ascending.
    """
    settled = centroids.copy()
    active = np.arange(len(centroids))
    tolerance = np.full(len(centroids), _COARSE if exchange and reach is None else _FINE)
    for _ in range(_MAX_STEPS):
        current, pin = settled[active], pins[active][:, None]
        edges = rows.edges(active, current)
        weight, first, second = rows.moments(active, edges)
        means = np.divide(first, weight, out=current.copy(), where=weight > 0)
        moved = means
        if reach is not None:
            moved = _within_reach(rows, active, edges, means, reach[active][:, None])
        following = np.where(current == pin, pin, moved)
        # (current - mean)^2 - (following - mean)^2
        falls = (current - following) * (current + following - 2 * means)
        gain = np.sum(weight * falls, axis=1)
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


def _within_reach(
    rows: Rows, active: Integers, edges: Integers, means: Floats, reach: Floats
) -> Floats:
    lowest, highest = rows.ends(active, edges)
    filled = np.diff(edges, axis=1) > 0
    moved = np.clip(means, highest - reach, np.maximum(lowest + reach, highest - reach))
    return np.where(filled, moved, means)


def _exchange(
    rows: Rows, active: Integers, centroids: Floats, pins: Floats
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
        k: Any = next((k for k in cheap if k not in (j, j - 1)), None)
        if k is None or gains[j] <= costs[k]:
            break
        used.update((k, k + 1, j))
        pairs.append((k, j))
    return pairs
