"""A histogram whose bins are as fine as the numbers are small.

A bin holds the float32 numbers that share sign, exponent and the first 9 bits of the fraction: 512
bins an octave, so that a bin is at most 0.2% of its values wide, whatever their size. No range has
to be known before, one outlier does not spoil the resolution of the rest, and finding the bin is a
shift of the number's bits. The 32 octaves below the largest magnitude seen are told apart; what is
smaller counts as 0. A larger magnitude moves the window up, and bins that fall out of it into 0, so
that the counts depend on the values alone, not on their order or grouping.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.runtime import Array

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_FRACTION_BITS = 9
_SHIFT = 23 - _FRACTION_BITS
_OCTAVE = 1 << _FRACTION_BITS
_OCTAVES = 32
_BINS = _OCTAVES * _OCTAVE  # of one sign; a power of two, so that the sign is one more bit
_CHUNK = 1 << 15  # codes of one step stay in the processor's second cache
_LARGEST = float(np.finfo(np.float32).max)


class Histogram:
    """Counts of finite values, with the exact smallest and largest of them.

    Attributes:
        low: The smallest value, inf before any.
        high: The largest value, -inf before any.
        total: How many values were counted.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.total = 0
        self._base = 0  # the bin, counted from float32's smallest number, that `_counts` starts at
        self._counts: Counts = np.zeros(0, np.int64)  # bins of positive, then of negative values

    def update(self, values: Array) -> None:
        """Counts finite values of any shape and numeric type; those beyond float32 as its largest.

        Raises:
            ValueError: NaN or infinity; nothing is counted then.
        """
        if not values.size:
            return
        low, high = float(np.min(values)), float(np.max(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("values hold NaN or infinity")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.total += values.size
        self._raise_window(max(abs(low), abs(high)))
        bits = _float32(values).view(np.int32)
        signed = low < 0
        if signed and len(self._counts) < 2 * _BINS:
            self._counts = np.concatenate([self._counts, np.zeros(_BINS, np.int64)])
        for start in range(0, bits.size, _CHUNK):
            found = np.bincount(self._codes(bits[start : start + _CHUNK], signed))
            self._counts[: len(found)] += found

    def _codes(self, bits: npt.NDArray[np.int32], signed: bool) -> npt.NDArray[np.int32]:
        """The place of each number in `_counts`."""
        if not signed:
            codes = bits >> _SHIFT
            codes -= np.int32(self._base)
            return np.asarray(np.maximum(codes, 0, out=codes))
        codes = bits & np.int32(0x7FFFFFFF)
        codes >>= _SHIFT
        codes -= np.int32(self._base)
        np.maximum(codes, 0, out=codes)
        codes |= (bits >> 31) & np.int32(_BINS)
        return codes

    def _raise_window(self, magnitude: float) -> None:
        """Makes the window end with the octave of `magnitude`, if that is above it."""
        top = int(np.array(min(magnitude, _LARGEST), np.float32).view(np.int32)) >> 23
        base = max(top + 1 - _OCTAVES, 0) * _OCTAVE
        if not self._counts.size:
            self._base, self._counts = base, np.zeros(_BINS, np.int64)
        shift = min(base - self._base, _BINS - 1)
        if shift <= 0:
            return
        self._base = base
        for side in self._counts.reshape(-1, _BINS):
            fallen = side[: shift + 1].sum()
            side[: _BINS - shift] = side[shift:].copy()
            side[_BINS - shift :] = 0
            side[0] = fallen

    def bins(self) -> tuple[Floats, Floats, Counts]:
        """The bins that are not empty, in ascending order.

        Returns:
            Lower edges, upper edges, both float64 of shape (n,) and within [low, high], and counts,
            int64 of shape (n,). The bin of 0 has both edges 0, unless it is the first or the last:
            then it ends at the smallest or largest value.
        """
        if not self.total:
            return np.zeros(0), np.zeros(0), np.zeros(0, np.int64)
        sides = np.zeros((2, _BINS), np.int64)
        sides.reshape(-1)[: self._counts.size] = self._counts
        edges = (np.arange(self._base, self._base + _BINS + 1) << _SHIFT).astype(np.int32)
        # The last edge of the highest octave would be infinite.
        inner = np.minimum(edges.view(np.float32).astype(np.float64), _LARGEST)
        near, far = inner[1:-1], inner[2:]
        lower = np.concatenate([-far[::-1], [0.0], near])
        upper = np.concatenate([-near[::-1], [0.0], far])
        counts = np.concatenate([sides[1, :0:-1], [sides[:, 0].sum()], sides[0, 1:]])
        full = np.flatnonzero(counts)
        lower, upper = (np.clip(edge[full], self.low, self.high) for edge in (lower, upper))
        lower[0], upper[-1] = self.low, self.high
        return lower, upper, counts[full]


def _float32(values: Array) -> npt.NDArray[Any]:
    """The values in one row as float32."""
    if values.dtype == np.float32:
        return np.asarray(values.reshape(-1), order="C")
    if values.dtype == np.float64:
        values = np.clip(values, -_LARGEST, _LARGEST)
    return values.reshape(-1).astype(np.float32)
