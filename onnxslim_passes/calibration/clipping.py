"""Which range to represent, given a histogram: by percentile, by entropy, by least squares.

A narrower range has finer steps but clips what lies outside. All three weigh the two; values within
a bin count as spread evenly over it. Ranges lie within the smallest and largest value seen.
"""

import numpy as np

from onnxslim_passes.calibration.histogram import Counts, Floats, Histogram

_ENTROPY_BINS = 2048
_ENTROPY_STEP = 8  # bins between two candidates
_FAR_SHARE = 0.001
_SINGLE_SHARE = 0.01  # a bin of 0.2% width holds less of any smooth density
_OCTAVES = 24  # how far below the largest value the least-squares search goes
_FINALISTS = 8
_EXACT_LEVELS = 512  # up to here a step is wider than a bin, so that codes can be told from bins


def percentile_range(seen: Histogram, percentile: float) -> tuple[float, float]:
    """The range that at most ``100 - percentile`` percent of the values lie outside of.

    Half of them may lie below it, half above. It ends at edges of bins.
    """
    lower, upper, counts = seen.bins()
    spare = seen.total * (100 - percentile) / 200
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    first = int(np.argmax(below > spare))
    last = len(counts) - 1 - int(np.argmax((above > spare)[::-1]))
    return float(lower[first]), float(upper[last])


# ---------------- entropy


def entropy_range(seen: Histogram, levels: int) -> tuple[float, float]:
    """The range ``[max(low, -T), min(high, T)]`` whose T keeps most of the information.

    Migacz, "8-bit Inference with TensorRT", GTC 2017: among thresholds T, that with the smallest
    Kullback-Leibler divergence from P, the magnitudes up to T in 2048 bins with all outliers in the
    last one, to Q, the same merged into the quantizer's levels. Two differences. Numbers that hold
    over 1% of the values each (the 0 of ReLU, moved by a bias perhaps) are no density that merging
    could spoil: within T they are left out. Up to 0.1% of outliers, so far away that most of the
    rest would fall into one level, are outside from the start.
    """
    lower, upper, counts = seen.bins()
    negative = upper <= 0
    near = np.where(negative, -upper, lower)
    far = np.where(negative, -lower, upper)
    single = counts > seen.total * _SINGLE_SHARE
    peak = _start(near, far, counts, levels)
    rows = _spread(near[~single], far[~single], counts[~single], peak)
    if not rows.any():
        return seen.low, seen.high
    ends = peak * np.arange(_ENTROPY_BINS + 1) / _ENTROPY_BINS
    spread_inside = np.concatenate([[0.0], np.cumsum(rows)])
    order = np.argsort(far[single])
    single_inside = np.concatenate([[0], np.cumsum(counts[single][order])])
    reached = np.searchsorted(far[single][order], ends, side="right")
    outliers = seen.total - spread_inside - single_inside[reached]
    threshold = _best_threshold(rows, ends, outliers, seen, levels)
    return max(seen.low, -threshold), min(seen.high, threshold)


def _start(near: Floats, far: Floats, counts: Counts, levels: int) -> float:
    """The largest threshold to be tried."""
    peak = float(far.max())
    total = counts.sum()
    while (
        counts[far <= peak / levels].sum() > total / 2
        and counts[near >= peak / 2].sum() <= total * _FAR_SHARE
    ):
        peak /= 2
    return peak


def _spread(near: Floats, far: Floats, counts: Counts, peak: float) -> Floats:
    """The magnitudes up to `peak` in `_ENTROPY_BINS` even bins; shape (_ENTROPY_BINS,)."""
    width = peak / _ENTROPY_BINS
    rows = np.zeros(_ENTROPY_BINS)
    inside = near < peak
    near, far, counts = near[inside], far[inside], counts[inside]
    first = np.minimum((near / width).astype(np.int64), _ENTROPY_BINS - 1)
    last = np.clip(np.ceil(far / width).astype(np.int64) - 1, first, _ENTROPY_BINS - 1)
    narrow = first == last
    rows += np.bincount(first[narrow], counts[narrow], _ENTROPY_BINS)
    for a, b, count in zip(first[~narrow], last[~narrow], counts[~narrow], strict=True):
        rows[a : b + 1] += count / (b + 1 - a)
    return rows


def _best_threshold(
    rows: Floats, ends: Floats, outliers: Floats, seen: Histogram, levels: int
) -> float:
    """The threshold of least divergence.

    Args:
        rows: The density; shape (n,).
        ends: The edges of its bins, the candidates; shape (n + 1,).
        outliers: How many values lie beyond each edge; shape (n + 1,).
        seen: All values.
        levels: Codes of the grid.
    """
    best, chosen = np.inf, float(ends[-1])
    for count in range(len(rows), 0, -_ENTROPY_STEP):
        threshold = float(ends[count])
        # The levels that fall on one side of 0, of a grid over both.
        width = min(seen.high, threshold) - max(seen.low, -threshold)
        merged = levels if seen.low >= 0 or seen.high <= 0 else round(levels * threshold / width)
        if count < merged:
            break
        divergence = _divergence(rows[:count], max(float(outliers[count]), 0.0), merged)
        if divergence < best:
            best, chosen = divergence, threshold
    return chosen


def _divergence(rows: Floats, outliers: float, levels: int) -> float:
    """The divergence of `rows` with outliers in the last bin from the merged `rows`, in nats."""
    starts = -(-np.arange(levels) * len(rows) // levels)
    full = rows > 0
    sums = np.add.reduceat(rows, starts)
    shares = sums / np.maximum(np.add.reduceat(full.astype(np.int64), starts), 1)
    merged = np.repeat(shares, np.diff(np.append(starts, len(rows)))) * full
    reference = rows.copy()
    reference[-1] += outliers
    if not merged.any():
        return float("inf")
    told = reference > 0
    p = reference[told] / reference.sum()
    # An empty last bin that only outliers fill has no share of its own: make the ratio finite.
    q = np.maximum(merged[told] / merged.sum(), 1e-12)
    return float(np.sum(p * np.log(p / q)))


# ---------------- least squares


def least_squares_range(seen: Histogram, levels: int) -> tuple[float, float]:
    """The range of least squared error of the quantized values, both ends searched.

    The error is that of clipping, from the moments of what lies outside, and of rounding, a twelfth
    of the squared step a value (Banner et al., "Post training 4-bit quantization of convolutional
    networks for rapid-deployment", NeurIPS 2019, section 3); exact zeros stay exact. The best few
    ranges and the full one are then compared by quantizing the histogram itself, so that values
    which the full range represents exactly keep it.
    """
    lower, upper, counts = seen.bins()
    unit = max(-seen.low, seen.high)  # squares of values beyond 1e154 would overflow
    values = (lower / unit + upper / unit) / 2
    lowest, highest = min(seen.low / unit, 0.0), max(seen.high / unit, 0.0)
    moments = _Moments(values, counts)
    lows, highs = _candidates(lowest), _candidates(highest)
    for finer in (0, 1, 2):
        errors = moments.errors(lows[:, None], highs[None, :], levels)
        i, j = np.unravel_index(int(np.argmin(errors)), errors.shape)
        if finer < 2:
            lows = _around(lows, int(i), lowest)
            highs = _around(highs, int(j), highest)
    order = np.argsort(errors, axis=None)[:_FINALISTS]
    finalists = [(float(lows[k // len(highs)]), float(highs[k % len(highs)])) for k in order]
    if levels <= _EXACT_LEVELS:
        finalists.append((lowest, highest))
        finalists.sort(key=lambda ends: _quantized_error(values, counts, ends, levels))
    low, high = finalists[0]
    # An end on the far side of 0 is one that no value demands: say what was seen.
    return max(low * unit, seen.low), min(high * unit, seen.high)


def _candidates(end: float) -> Floats:
    """Ends from `end` towards 0, a quarter octave apart."""
    if end == 0:
        return np.zeros(1)
    return np.asarray(end * 2.0 ** (-np.arange(4 * _OCTAVES + 1) / 4))


def _around(ends: Floats, best: int, limit: float) -> Floats:
    """Ends between the neighbours of the best one, not beyond `limit`."""
    if limit == 0:
        return ends
    first, last = ends[max(best - 1, 0)], ends[min(best + 1, len(ends) - 1)]
    return np.geomspace(first, last, 17)


class _Moments:
    """Sums over the values below any place, and over those above."""

    def __init__(self, values: Floats, counts: Counts) -> None:
        self._values = values
        self._sums = np.zeros((4, len(values) + 1))
        nonzero = counts * (values != 0)
        rows = (counts, counts * values, counts * values**2, nonzero)
        np.cumsum(np.stack(rows).astype(np.float64), axis=1, out=self._sums[:, 1:])

    def errors(self, low: Floats, high: Floats, levels: int) -> Floats:
        """The sum of squared errors with each range; shape of ``low`` and ``high`` broadcast."""
        total = self._sums[:, -1]
        first = np.searchsorted(self._values, low)
        last = np.searchsorted(self._values, high, side="right")
        below = self._sums[:, first]
        above = total.reshape(4, 1, 1) - self._sums[:, last]
        clipped = _squares(below, low) + _squares(above, high)
        inside = self._sums[3][last] - self._sums[3][first]
        step = (high - low) / (levels - 1)
        return np.asarray(clipped + inside * step**2 / 12)


def _squares(sums: Floats, end: Floats) -> Floats:
    """The sum of (value - end)^2, from count, sum and sum of squares."""
    return np.asarray(np.maximum(sums[2] - 2 * end * sums[1] + end**2 * sums[0], 0.0))


def _quantized_error(
    values: Floats, counts: Counts, ends: tuple[float, float], levels: int
) -> float:
    """The sum of squared errors on an asymmetric grid of `levels` codes over [low, high]."""
    low, high = ends
    step = (high - low) / (levels - 1)
    if step == 0:
        return float(np.sum(counts * values**2))
    zero = np.rint(-low / step)
    codes = np.clip(np.rint(values / step), -zero, levels - 1 - zero)
    return float(np.sum(counts * (codes * step - values) ** 2))
