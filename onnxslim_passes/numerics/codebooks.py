"""Codebooks: K shared values, and which of them each weight takes.

A codebook is made in three steps, of which only the second differs between methods: rows of values
(a tensor, or its channels) become points, the points of each row become centroids, and every value
takes the nearest centroid once those are rounded to the weight's dtype, or the one between whose
borders it lies.

Zeros: where they are kept, a row that has exact zeros gets a centroid that is exactly 0.0 (one of
the K); zeros stay zeros, values nearer to 0 than to any other centroid join them. A row without
zeros spends no code on it. -0.0 counts as zero and comes back as +0.0.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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
from onnxslim_passes.numerics.histograms import Histogram, check_bins, check_weights, histogram_of

Floats = npt.NDArray[np.float64]

MAX_CLUSTERS = 1 << 16

_ROW_BLOCK = 1 << 22  # elements of the channels whose centroids are found together


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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows of values become rows of points.

    Attributes:
        clusters: K, 2 to 65536.
        bins: points of a histogram, 16 or more; K of them at least are used.
        keep_zero: see the module's text.
        weights: how much each value counts, > 0, shaped like the values; None: all the same.
    """

    clusters: int
    bins: int
    keep_zero: bool = True
    weights: FloatArray | None = None

    def check(self, values: FloatArray) -> None:
        """Raise `ValueError` for values that are not finite, or arguments out of range."""
        if not 2 <= self.clusters <= MAX_CLUSTERS:
            raise ValueError(f"clusters is {self.clusters}; expected 2 to {MAX_CLUSTERS}")
        check_bins(self.bins)
        check_finite(values)
        if self.weights is not None:
            check_weights(self.weights, values.shape)


@dataclass(frozen=True)
class Row:
    """The points of one row, without zeros where those are kept.

    Attributes:
        number: of the row.
        histogram: divided by ``2^exponent``, so that squares fit into float64.
        exponent: see there.
        pin: 0.0 if a centroid stays there, else NaN.
        zeros: how many values are kept there.
    """

    number: int
    histogram: Histogram
    exponent: int
    pin: float
    zeros: int = 0


@dataclass(frozen=True)
class Cells:
    """Which numbers share a value.

    Attributes:
        centroids: the values, ascending, shape (K,).
        borders: ascending, shape (K - 1,): numbers above border k - 1, up to border k and that one
            included, take centroid k; None: every number takes the nearest centroid.
    """

    centroids: npt.NDArray[Any]
    borders: Floats | None = None


Fit = Callable[[list[Row]], list[Cells]]
"""From rows of points to the cells of each."""


def share(values: FloatArray, axis: int | None, reading: Reading, fit: Fit) -> Codebook:
    """The codebook whose centroids `fit` finds.

    Args:
        values: any shape; left unchanged.
        axis: None for one row of centroids, or the channel axis for a row a channel.
        reading: checked against `values`.
        fit: is given rows that have more than K distinct values.

    Raises:
        ValueError: `axis` does not exist.
    """
    if axis is not None:
        axis = normalized_axis(axis, values.ndim)
    rows = _as_rows(values, axis)
    index_dtype = np.dtype(np.uint8 if reading.clusters <= 256 else np.uint16)
    if values.size == 0:
        shape = (0,) if axis is None else (rows.shape[0], 0)
        empty = np.empty(values.shape, index_dtype)
        return Codebook(centroids=np.empty(shape, values.dtype), indices=empty, axis=axis)
    counted = None if reading.weights is None else _as_rows(reading.weights, axis)
    cells = [
        cells
        for group in _row_groups(rows)
        for cells in _fitted(rows, counted, group, reading, fit)
    ]
    centroids = [each.centroids for each in cells]
    indices = np.empty(rows.shape, index_dtype)
    for row, shared, codes in zip(rows, cells, indices, strict=True):
        _assign(row, shared, codes)
    if axis is None:
        return Codebook(centroids=centroids[0], indices=indices.reshape(values.shape))
    moved = indices.reshape(np.moveaxis(values, axis, 0).shape)
    return Codebook(
        centroids=_padded(centroids),
        indices=np.ascontiguousarray(np.moveaxis(moved, 0, axis)),
        axis=axis,
    )


def _as_rows(values: npt.NDArray[Any], axis: int | None) -> npt.NDArray[Any]:
    return values.reshape(1, -1) if axis is None else by_channel(values, axis)


def _row_groups(rows: npt.NDArray[Any]) -> Iterator[range]:
    """Numbers of rows of at most `_ROW_BLOCK` elements, one row at least."""
    step = max(1, _ROW_BLOCK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield range(start, min(start + step, rows.shape[0]))


def _fitted(
    rows: npt.NDArray[Any],
    weights: npt.NDArray[Any] | None,
    group: range,
    reading: Reading,
    fit: Fit,
) -> list[Cells]:
    """The cells of each row of a group; centroids ascending, distinct, in the weight's dtype."""
    results: dict[int, Cells] = {}
    pending: list[Row] = []
    for number in group:
        counted = None if weights is None else weights[number]
        found = _read(rows[number], counted, number, reading)
        if isinstance(found, Row):
            pending.append(found)
        else:
            results[number] = Cells(found)
    if pending:
        for row, cells in zip(pending, fit(pending), strict=True):
            results[row.number] = _scaled(cells, row.exponent)
    return [_rounded(results[number], rows.dtype) for number in group]


def _read(
    values: npt.NDArray[Any], weights: npt.NDArray[Any] | None, number: int, reading: Reading
) -> Row | Floats:
    """A row's points, or its values themselves where they are few enough."""
    bins = max(reading.bins, reading.clusters)
    histogram = histogram_of(values, bins, weights)
    if histogram.exact and histogram.points.size <= reading.clusters:
        return histogram.points
    pin = math.nan
    zeros = 0
    if reading.keep_zero and (used := values != 0).sum() < values.size:
        pin, zeros = 0.0, values.size - int(used.sum())
        if histogram.exact:
            histogram = histogram.only(histogram.points != 0)
        else:
            counted = None if weights is None else weights[used]
            histogram = histogram_of(values[used], bins, counted)
    exponent = math.frexp(float(np.abs(histogram.points[[0, -1]]).max()))[1]
    points = np.ldexp(histogram.points, -exponent)
    small = Histogram(points=points, weights=histogram.weights, exact=histogram.exact)
    return Row(number, small, exponent, pin, zeros)


def _scaled(cells: Cells, exponent: int) -> Cells:
    borders = None if cells.borders is None else np.ldexp(cells.borders, exponent)
    return Cells(np.ldexp(cells.centroids, exponent), borders)


def _rounded(cells: Cells, dtype: np.dtype[Any]) -> Cells:
    """Distinct ascending centroids in `dtype`, without -0.0; cells that become one are merged."""
    centroids = cells.centroids.astype(dtype).astype(np.float64)
    rounded, first = np.unique(centroids, return_index=True)
    borders = None if cells.borders is None else cells.borders[first[1:] - 1]
    return Cells((rounded + 0.0).astype(dtype), borders)


def _assign(row: npt.NDArray[Any], cells: Cells, codes: npt.NDArray[Any]) -> None:
    """Write the number of each value's centroid into `codes`; the smaller one on a tie."""
    dtype = working_dtype(row.dtype)
    borders = cells.borders
    if borders is None:
        wide = cells.centroids.astype(np.float64)
        borders = wide[:-1] / 2 + wide[1:] / 2
    borders = _rounded_down(borders, dtype)
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
