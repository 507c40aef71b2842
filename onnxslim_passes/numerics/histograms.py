"""Weighted histograms of many numbers, and their distinct values.

A weight tensor becomes at most 2^16 points: its distinct values with their counts when they are so
few (always for 16-bit floats), else the mean and count of each bin. What is computed on the points
then costs the same for 10^5 and for 10^8 values. A number may count for more than one: with
`weights` (its sensitivity, say) these are summed instead of counts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray, blocks, check_finite

Floats = npt.NDArray[np.float64]

HISTOGRAM_BINS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """A set of numbers as distinct points with weights.

    Attributes:
        points: float64, shape (P,), strictly ascending, finite.
        weights: float64, shape (P,), > 0: how many numbers each point stands for, or the sum of
            their weights.
        exact: True if the points are the numbers themselves, False if they are means of bins.
    """

    points: Floats
    weights: Floats
    exact: bool

    def only(self, kept: npt.NDArray[np.bool_]) -> "Histogram":
        """The points where `kept`, shape (P,), is True."""
        return Histogram(points=self.points[kept], weights=self.weights[kept], exact=self.exact)


def distinct_values(values: FloatArray, limit: int) -> npt.NDArray[Any] | None:
    """The distinct values, ascending, in their dtype; None if there are more than `limit`.

    -0.0 and 0.0 are one value, 0.0. Ordinary weights are answered after a small part of them.
    """
    counted = _distinct_counts(_Numbers(values.reshape(-1)), limit)
    return None if counted is None else counted[0]


def weighted_histogram(
    values: FloatArray, bins: int = HISTOGRAM_BINS, weights: FloatArray | None = None
) -> Histogram:
    """At most `bins` points that stand for all of `values`.

    Up to `bins` distinct values are counted exactly. Else bins of one width cover the bulk of the
    values, and the tails outside it get a share of the bins by the same rule, so one huge outlier
    does not coarsen the rest. Counts add up to ``values.size``, and so do the bins' sums to the sum
    of the values within rounding.

    Args:
        values: any shape.
        bins: 16 or more.
        weights: how much each value counts, > 0, shaped like `values`; 1 each by default.

    Raises:
        ValueError: NaN or infinity with its position, `bins` < 16, or weights that are not positive
            and finite.
    """
    check_bins(bins)
    check_finite(values)
    if weights is not None:
        check_weights(weights, values.shape)
        weights = weights.reshape(-1)
    return histogram_of(values.reshape(-1), bins, weights)


def histogram_of(
    flat: npt.NDArray[Any], bins: int, weights: npt.NDArray[Any] | None = None
) -> Histogram:
    """`weighted_histogram` of a vector, without its checks."""
    return _histogram(_Numbers(flat, weights), bins)


def check_bins(bins: int) -> None:
    """Raise `ValueError` for fewer bins than a histogram with tails needs."""
    if bins < 16:
        raise ValueError(f"bins is {bins}; expected at least 16")


def check_weights(weights: FloatArray, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless there is a positive finite weight for each element of `shape`."""
    if weights.shape != shape:
        raise ValueError(
            f"weights have shape {weights.shape}; expected {shape}, one for each value"
        )
    check_finite(weights, "weights")
    if weights.size and not weights.min() > 0:
        raise ValueError(f"the smallest weight is {weights.min()}; expected weights above 0")


# --- counting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Numbers:
    """A vector with or without weights."""

    values: npt.NDArray[Any]
    weights: npt.NDArray[Any] | None = None

    def blocks(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any] | None]]:
        if self.weights is None:
            for block in blocks(self.values):
                yield block, None
        else:
            yield from zip(blocks(self.values), blocks(self.weights), strict=True)


def _joined(parts: list[_Numbers], dtype: np.dtype[Any]) -> _Numbers:
    if not parts:
        return _Numbers(np.empty(0, dtype))
    values = np.concatenate([part.values for part in parts])
    weights = [part.weights for part in parts if part.weights is not None]
    return _Numbers(values, np.concatenate(weights) if weights else None)


def _histogram(numbers: _Numbers, bins: int) -> Histogram:
    counted = _distinct_counts(numbers, bins)
    if counted is not None:
        points, weights = counted
        return Histogram(points=points.astype(np.float64), weights=weights, exact=True)
    points, weights = _binned(numbers, bins)
    return Histogram(points=points, weights=weights, exact=False)


def _distinct_counts(numbers: _Numbers, limit: int) -> tuple[npt.NDArray[Any], Floats] | None:
    """Distinct values with counts or sums of weights, or None if more than `limit`."""
    if numbers.values.dtype.itemsize <= 2:
        return _distinct_counts_of_patterns(numbers, limit)
    known = np.empty(0, numbers.values.dtype)
    totals = np.empty(0)
    for block, weights in numbers.blocks():
        block = block + block.dtype.type(0)  # no -0.0
        found, inverse = np.unique(block, return_inverse=True)
        merged = np.union1d(known, found)
        if merged.size > limit:
            return None
        following = np.zeros(merged.size)
        following[np.searchsorted(merged, known)] += totals
        following[np.searchsorted(merged, found)] += np.bincount(inverse, weights)
        known, totals = merged, following
    return known, totals


def _distinct_counts_of_patterns(
    numbers: _Numbers, limit: int
) -> tuple[npt.NDArray[Any], Floats] | None:
    """The same for 16-bit and narrower floats: count bit patterns, no sorting of the values."""
    dtype = numbers.values.dtype
    width = dtype.itemsize * 8
    unsigned = np.dtype(f"u{dtype.itemsize}")
    totals, present = np.zeros(1 << width), np.zeros(1 << width, np.bool_)
    for block, weights in numbers.blocks():
        patterns = np.ascontiguousarray(block).view(unsigned)
        totals += np.bincount(patterns, weights, minlength=totals.size)
        present[patterns] = True
    negative_zero = 1 << (width - 1)
    totals[0] += totals[negative_zero]
    present[0] |= present[negative_zero]
    present[negative_zero] = False
    patterns = np.flatnonzero(present)
    if patterns.size > limit:
        return None
    found = patterns.astype(unsigned).view(dtype)
    order = np.argsort(found.astype(np.float32), kind="stable")
    return found[order], totals[patterns][order]


# --- bins ---------------------------------------------------------------------------------------


def _binned(numbers: _Numbers, bins: int) -> tuple[Floats, Floats]:
    """Means and weights of bins: uniform over the bulk, the tails by recursion."""
    flat = numbers.values
    low, high = float(flat.min()), float(flat.max())
    core_low, core_high = _bulk(flat, low, high)
    tails = (core_low > low) + (core_high < high)
    if not tails or bins < 64:
        return _uniform_bins(numbers, low, high, bins)[:2]
    tail_bins = bins // 8
    core_bins = bins - tails * tail_bins
    points, weights, below, above = _uniform_bins(numbers, core_low, core_high, core_bins)
    parts = [
        _part_histogram(below, tail_bins),
        (points, weights),
        _part_histogram(above, tail_bins),
    ]
    return np.concatenate([p for p, _ in parts]), np.concatenate([w for _, w in parts])


def _part_histogram(numbers: _Numbers, bins: int) -> tuple[Floats, Floats]:
    if numbers.values.size == 0:
        return np.empty(0), np.empty(0)
    part = _histogram(numbers, bins)
    return part.points, part.weights


def _bulk(flat: npt.NDArray[Any], low: float, high: float) -> tuple[float, float]:
    """A range that holds 99% of the values and as much again on both sides, within [low, high]."""
    sample = flat[np.random.default_rng(0).integers(0, flat.size, 1 << 14)].astype(np.float64)
    first, last = (float(q) for q in np.quantile(sample, (0.005, 0.995)))
    width = last - first
    return max(first - width, low), min(last + width, high)


def _uniform_bins(
    numbers: _Numbers, low: float, high: float, bins: int
) -> tuple[Floats, Floats, _Numbers, _Numbers]:
    """Means and weights of the non-empty bins over [low, high]; the numbers below, and above."""
    dtype = numbers.values.dtype
    # float64 spans beyond its largest number, or too narrow to invert: scale by a power of two.
    exponent = math.frexp(max(abs(low), abs(high)))[1] if dtype == np.float64 else 0
    low, high = math.ldexp(low, -exponent), math.ldexp(high, -exponent)
    width = (high - low) / bins
    per_width = 1 / width if width > 0 else 0.0
    totals, sums = np.zeros(bins), np.zeros(bins)
    below: list[_Numbers] = []
    above: list[_Numbers] = []
    for block, weights in numbers.blocks():
        wide = block.astype(np.float64)
        if exponent:
            with np.errstate(over="ignore"):  # of values outside
                wide = np.ldexp(wide, -exponent)
        if (outside := (wide < low) | (wide > high)).any():
            for part, side in ((below, wide < low), (above, wide > high)):
                part.append(_Numbers(block[side], None if weights is None else weights[side]))
            wide = wide[~outside]
            weights = None if weights is None else weights[~outside]
        # Subtraction, product and truncation are monotonic: bins keep the order of the values.
        places = np.minimum((wide - low) * per_width, bins - 1).astype(np.int64)
        totals += np.bincount(places, weights, minlength=bins)
        sums += np.bincount(places, wide if weights is None else wide * weights, minlength=bins)
    filled = totals > 0
    means = np.ldexp(sums[filled] / totals[filled], exponent)
    return means, totals[filled], _joined(below, dtype), _joined(above, dtype)
