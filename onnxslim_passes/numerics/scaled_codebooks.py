"""One table of int8 codes for a whole weight, and a scale for each of its rows.

    w[r, j] = scale[r] * table[code[r, j]]

Rows (channels, or blocks of them) differ in size more than in shape, so that a table for all of
them costs nothing, and 16 or 32 bits a row buy what a table a row would cost 16 values for. The
table's values are integers in [-127, 127]: a later quantization to int8 keeps them, and table and
scales are found again in the values alone (`weight_formats.find_grid`), since the scales have so
few significant bits that all products are exact.

Fitted by turns: rows divided by their scales are points of one k-means, whose errors count with the
square of the scale; each scale is then the one of least squares for its codes. The k-means is
`clustering`'s, or, for vectors of weights, that of `vector_codebooks`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray, check_finite
from onnxslim_passes.numerics.clustering import Init, kmeans_1d
from onnxslim_passes.numerics.vector_codebooks import kmeans_vectors, nearest_vectors
from onnxslim_passes.numerics.weight_formats import WeightFormat

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

LARGEST_CODE = 127
LARGEST_SAFE_CODE = 64
"""Two codes of this size times 255 fit into 16 bits."""

_ROUNDS = 3  # of table and scales by turns, on the sample
_REFITS = 3  # of a row's scale and codes by turns, with the final table
_SAMPLE = 1 << 21  # elements that the table is fitted to
_CHUNK = 1 << 18  # elements that are worked on at a time


@dataclass(frozen=True, kw_only=True)
class ScaledCodebook:
    """A table, codes and scales.

    Attributes:
        table: int8, shape (K, g), distinct rows; g = 1 for single weights.
        codes: uint8, shape (R, n / g), < K.
        scale: float64, shape (R, 1), > 0, with few significant bits.
    """

    table: npt.NDArray[np.int8]
    codes: npt.NDArray[np.uint8]
    scale: Floats

    @property
    def clusters(self) -> int:
        """K."""
        return int(self.table.shape[0])

    def values(self, dtype: npt.DTypeLike) -> Array:
        """The weight's rows in its type, shape (R, n); exact products, no -0.0 among them."""
        rows = self.codes.shape[0]
        made = np.empty((rows, self.codes.shape[1] * self.table.shape[1]), dtype)
        for part in _chunks(made.shape):
            integers = self.table[self.codes[part]].reshape(-1, made.shape[1])
            made[part] = (integers * self.scale[part] + 0.0).astype(dtype)
        return made


def scaled_codebook(
    rows: FloatArray,
    clusters: int,
    *,
    group: int = 1,
    significant_bits: int = 11,
    init: Init = "optimal",
    seed: int = 0,
    importance: FloatArray | None = None,
) -> ScaledCodebook:
    """Share a table of `clusters` codes among all rows so that the squared error is small.

    Exact zeros of single weights stay exact zeros, of longer groups where a whole group is zero.

    Args:
        rows: float16, float32 or float64, shape (R, n).
        clusters: K, 2 to 256.
        group: g, neighbouring weights of a row that share a code; divides n.
        significant_bits: of a scale, at most; fewer where products would not be exact otherwise.
        init: of the k-means of single weights.
        seed: of whatever is drawn.
        importance: how much the squared error of each element counts, > 0, shape (R, n) or (1, n).

    Raises:
        ValueError: NaN or infinity with its position, or an argument out of range.
    """
    check_finite(rows, "weights")
    if group < 1 or rows.shape[1] % group:
        raise ValueError(f"group {group} does not divide the {rows.shape[1]} elements of a row")
    if importance is None:
        importance = np.ones((1, 1), np.float32)
    fit = _Fit(rows, clusters, group, significant_bits)
    table, unit = fit.table(importance, init, seed)
    codes = np.empty((rows.shape[0], rows.shape[1] // group), np.uint8)
    scale = np.empty((rows.shape[0], 1))
    for part in _chunks(rows.shape):
        counted = importance[part] if importance.shape[0] > 1 else importance
        scale[part], codes[part] = fit.rows(part, table, unit, counted)
    return ScaledCodebook(table=table.astype(np.int8), codes=codes, scale=scale)


class _Fit:
    """Finds table, scales and codes of rows, which are divided by a power of two first.

    `importance` broadcasts against the rows in question everywhere.
    """

    def __init__(self, rows: FloatArray, clusters: int, group: int, significant_bits: int) -> None:
        self._rows = rows
        self._clusters = clusters
        self._group = group
        # At 4 bits the coarser integers add 3% to the error.
        self._most = LARGEST_SAFE_CODE if clusters <= 16**group else LARGEST_CODE
        self._bits = WeightFormat(8, significant_bits=significant_bits).scale_bits(rows.dtype)
        info = ml_dtypes.finfo(rows.dtype)
        largest = float(np.abs(rows).max(initial=0))
        self._exponent = math.frexp(largest)[1]
        # Products with a scale below would not be exact, with one above infinite.
        self._smallest = float(info.smallest_subnormal) * 2.0**self._bits
        self._largest = float(info.max) / LARGEST_CODE * (1 - 2.0**-self._bits)

    def table(self, importance: Array, init: Init, seed: int) -> tuple[Floats, float]:
        """The table (K, g), whole numbers, and the usual scale of a row of mean square 1."""
        stride = max(1, -(-self._rows.size // _SAMPLE))
        rows = self._read(slice(None, None, stride))
        counted = importance[::stride] if importance.shape[0] > 1 else importance
        size = _root_mean_square(rows, counted)
        alive = size[:, 0] > 0
        if not alive.any():
            return np.zeros((1, self._group)), 1.0
        rows, size = rows[alive], size[alive]
        if counted.shape[0] > 1:
            counted = counted[alive]
        scale = size
        for _ in range(_ROUNDS):
            centroids = self._centroids(rows / scale, np.square(scale) * counted, init, seed)
            step = np.abs(centroids).max() / self._most
            table = self._with_zero(np.unique(np.rint(centroids / step), axis=0) + 0.0)
            scale = self._refitted(rows, table, scale * step, counted)
        return table, float(np.median(scale / size))

    def rows(
        self, part: slice, table: Floats, unit: float, importance: Array
    ) -> tuple[Floats, npt.NDArray[np.uint8]]:
        """Scales, as they may be, and codes of some rows."""
        rows = self._read(part)
        start = _root_mean_square(rows, importance) * unit
        scale = self._refitted(rows, table, np.where(start > 0, start, 1.0), importance)
        usable = self._usable(np.ldexp(scale, self._exponent))
        return usable, self._codes(rows / np.ldexp(usable, -self._exponent), table, importance)

    def _read(self, part: slice) -> Floats:
        return np.ldexp(self._rows[part].astype(np.float64), -self._exponent)

    def _centroids(self, points: Floats, weights: Floats, init: Init, seed: int) -> Floats:
        weights = np.broadcast_to(weights, points.shape)
        # Relative sizes count; in float32 none of them vanishes.
        weights = np.maximum(weights / weights.mean(), 1e-12).astype(np.float32)
        small = points.astype(np.float32)
        if self._group == 1:
            book = kmeans_1d(
                small.reshape(-1), self._clusters, init=init, seed=seed, weights=weights.reshape(-1)
            )
            return book.centroids.astype(np.float64)[:, None]
        shape = (-1, self._group)
        return kmeans_vectors(
            small.reshape(shape), self._clusters, weights=weights.reshape(shape), seed=seed
        ).centroids

    def _with_zero(self, table: Floats) -> Floats:
        """With 0 in the place of the smallest entry, if rows beyond the sample may need it."""
        groups = self._rows.reshape(-1, self._group)
        if (table == 0).all(axis=1).any() or not (groups == 0).all(axis=1).any():
            return table
        table[np.square(table).sum(axis=1).argmin()] = 0.0
        return table

    def _refitted(self, rows: Floats, table: Floats, scale: Floats, importance: Array) -> Floats:
        """Scales of least squares, by turns with codes."""
        for _ in range(_REFITS):
            integers = table[self._codes(rows / scale, table, importance)].reshape(rows.shape)
            power = np.sum(importance * np.square(integers), axis=1, keepdims=True)
            fitted = np.sum(importance * integers * rows, axis=1, keepdims=True)
            fits = (power > 0) & (fitted > 0)
            scale = np.divide(fitted, power, out=scale.copy(), where=fits)
        return scale

    def _codes(self, points: Floats, table: Floats, importance: Array) -> npt.NDArray[np.uint8]:
        if self._group == 1:
            borders = (table[1:, 0] + table[:-1, 0]) / 2
            return np.searchsorted(borders, points).astype(np.uint8)
        shape = (-1, self._group)
        weights = None
        if importance.size > 1:
            weights = np.broadcast_to(importance, points.shape).astype(np.float32).reshape(shape)
        small = np.clip(points, -2 * LARGEST_CODE, 2 * LARGEST_CODE).astype(np.float32)
        return nearest_vectors(small.reshape(shape), weights, table)[0].reshape(points.shape[0], -1)

    def _usable(self, scale: Floats) -> Floats:
        """The nearest scales of few bits."""
        mantissa, exponent = np.frexp(scale)
        short = np.ldexp(np.rint(np.ldexp(mantissa, self._bits)), exponent - self._bits)
        return np.asarray(np.clip(short, self._smallest, self._largest))


def _root_mean_square(rows: Floats, importance: Array) -> Floats:
    weights = np.broadcast_to(importance, rows.shape)
    total = weights.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(np.sqrt(np.sum(weights * np.square(rows), axis=1, keepdims=True) / total))


def _chunks(shape: tuple[int, int]) -> Iterator[slice]:
    rows = max(1, _CHUNK // max(1, shape[1]))
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)
