"""Weights of 1 to 8 bits: small integers times a scale for each block, ``w = scale * code``.

A weight is seen as rows, one an output channel, and each row is cut into blocks of equal length
(`BlockLayout`); a channel, or the whole tensor, can be a block, too. The codes of a block are
``unsigned code - zero point``, so that 0 is always among them:

- symmetric, b bits: -(2^(b-1) - 1) to 2^(b-1) - 1; with 2 bits these are the ternary weights -1, 0,
  1, and with 1 bit the binary ones -1 and 1, without 0 (Rastegari et al., XNOR-Net, ECCV 2016);
- asymmetric, b bits: 2^b numbers in a row, 0 among them, from a zero point of the block's own.

Scales have few significant bits, like those of 8-bit floats. First, many blocks then share a scale,
which takes 6 or 7 bits in a table instead of 16 or 32; with 5 significant bits the square error
grows by less than 0.1 dB, a small part of what shorter blocks for the same bytes gain. Second,
every product of a scale and a code is exact in the weight's own type, so that `find_grid` recovers
scales and codes from the values alone, as greatest common divisors: a weight needs no mark to say
that it is quantized, and quantizing again changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray, check_finite, normalized_axis

Scheme = Literal["symmetric", "asymmetric"]
ScaleSearch = Literal["max", "mse"]
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

MAX_CODE = 255
"""No grid of 8 bits has a code of larger magnitude."""

BLOCK_SCALE_BITS = 5
"""Significant bits of the scales of blocks, where every bit counts."""

_SHORTEST_BLOCK = 8  # shorter ones spend more on scales than they gain
_CHUNK = 1 << 17  # elements worked on at a time
# Bits of a mantissa as find_grid reads it; with the exponents of one block below 2^16 apart, all
# numbers of a block are integers of 61 bits.
_MANTISSA = 45
_SPREAD = 16
# Scales tried, as multiples of the one that clips nothing: the fewer levels, the more it pays to
# clip. Measured on normal and Laplacian blocks of 16 to 1,024 weights.
_SMALLEST_FACTOR = {1: 0.1, 2: 0.25, 3: 0.4, 4: 0.55, 5: 0.65, 6: 0.75, 7: 0.8, 8: 0.85}
_TRIED = 20


@dataclass(frozen=True)
class BlockLayout:
    """How a tensor is cut into blocks.

    Attributes:
        shape: of the tensor.
        axis: the channel axis, counted from 0; None if the tensor is one row.
        block: elements of a block; divides the row.
    """

    shape: tuple[int, ...]
    axis: int | None
    block: int

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return int(np.prod(self.shape, dtype=np.int64)) // self.block

    @property
    def moved_shape(self) -> tuple[int, ...]:
        """The tensor's shape with the channel axis in front."""
        axis = self.axis or 0
        return (self.shape[axis], *self.shape[:axis], *self.shape[axis + 1 :])

    def cut(self, values: Array) -> Array:
        """The blocks as rows: shape (blocks, block)."""
        moved = values if self.axis is None else np.moveaxis(values, self.axis, 0)
        return np.ascontiguousarray(moved).reshape(-1, self.block)

    def join(self, rows: Array) -> Array:
        """The tensor of these blocks, C-contiguous."""
        if self.axis is None:
            return rows.reshape(self.shape)
        moved = rows.reshape(self.moved_shape)
        return np.ascontiguousarray(np.moveaxis(moved, 0, self.axis))


def block_layout(shape: tuple[int, ...], axis: int | None, block: int | None = None) -> BlockLayout:
    """The layout of a tensor that has elements.

    Args:
        shape: of the tensor.
        axis: the channel axis; None: the whole tensor is one row.
        block: the longest block wanted; None: a row each. Rows that it does not divide are cut into
            the largest shorter power of two that does, or, if that is below 8, not cut.

    Raises:
        ValueError: `axis` does not exist.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if axis is not None:
        axis = normalized_axis(axis, len(shape))
    row = size if axis is None else size // shape[axis]
    if block is None or block >= row:
        return BlockLayout(shape, axis, row)
    if row % block == 0:
        return BlockLayout(shape, axis, block)
    block = min(row & -row, 1 << (block.bit_length() - 1))
    return BlockLayout(shape, axis, block if block >= _SHORTEST_BLOCK else row)


@dataclass(frozen=True)
class WeightFormat:
    """The numbers that one block may hold, but for its scale.

    Attributes:
        bits: of a code, 1 to 8.
        scheme: where the codes lie about 0.
        significant_bits: of a scale, 1 to 11.
    """

    bits: int
    scheme: Scheme = "symmetric"
    significant_bits: int = 11

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; expected 1 to 8")
        if not 1 <= self.significant_bits <= 11:
            raise ValueError(f"significant_bits is {self.significant_bits}; expected 1 to 11")

    @property
    def binary(self) -> bool:
        """Whether the codes are -1 and 1."""
        return self.bits == 1 and self.scheme == "symmetric"

    @property
    def span(self) -> int:
        """The largest code less the smallest one."""
        if self.binary:
            return 2
        return (1 << self.bits) - (1 if self.scheme == "asymmetric" else 2)

    def scale_bits(self, dtype: np.dtype[Any]) -> int:
        """Significant bits of a scale whose products with codes are exact in `dtype`; at least 1.

        float32 has room for all 11; float16 for 4 beside a code of 7 bits.
        """
        largest = self.span if self.scheme == "asymmetric" else self.span // 2
        room = int(ml_dtypes.finfo(dtype).nmant) + 1 - largest.bit_length()
        return max(1, min(self.significant_bits, room))


@dataclass(frozen=True, eq=False)
class BlockCodes:
    """Quantized blocks: ``values = codes * scale``, exact in the weight's type.

    Attributes:
        codes: int16, shape (blocks, block).
        scale: float64 > 0, shape (blocks, 1).
        lowest: int16, shape (blocks, 1): the smallest code that the block's format and zero point
            allow; of a grid that was found in values, the smallest one in use, or 0.
    """

    codes: npt.NDArray[np.int16]
    scale: Floats
    lowest: npt.NDArray[np.int16]

    def values(self, dtype: npt.DTypeLike) -> Array:
        """The blocks in the weight's type; no -0.0 among them."""
        made = np.empty(self.codes.shape, dtype)
        for part in _chunks(made.shape):
            # Adding 0 turns -0.0, which 0 * scale never is, but a cast of a float might be.
            made[part] = (self.codes[part] * self.scale[part] + 0.0).astype(dtype)
        return made


def quantize_weight(
    values: FloatArray,
    layout: BlockLayout,
    kind: WeightFormat,
    *,
    search: ScaleSearch = "mse",
    importance: Floats | None = None,
) -> Array:
    """The nearest weight on a grid, in the type of `values`; see `quantize_blocks`.

    A weight on such a grid already is returned as it is.
    """
    if on_grid(values, layout, kind):
        return values.copy()
    done = quantize_blocks(
        layout.cut(values), kind, search=search, dtype=values.dtype, importance=importance
    )
    return layout.join(done.values(values.dtype))


def quantize_blocks(
    rows: FloatArray,
    kind: WeightFormat,
    *,
    search: ScaleSearch = "mse",
    dtype: npt.DTypeLike | None = None,
    importance: Floats | None = None,
) -> BlockCodes:
    """Scales and codes of blocks.

    Args:
        rows: a block each, shape (blocks, block), finite.
        kind: the format.
        search: "max": the smallest scale that clips nothing; "mse": the one of least squared
            error among multiples of that one and their least-squares refinements.
        dtype: the type in which products must be exact; by default that of `rows`.
        importance: weights of the squared errors, >= 0, broadcast against `rows`; for search="mse".

    Raises:
        ValueError: NaN or infinity, with its position.
    """
    check_finite(rows, "weights")
    kept = np.dtype(dtype if dtype is not None else rows.dtype)
    quantizer = _Quantizer(kind, search, kept)
    codes = np.zeros(rows.shape, np.int16)
    scale, lowest = np.ones((rows.shape[0], 1)), np.zeros((rows.shape[0], 1), np.int16)
    for part in _chunks(rows.shape):
        factor = None
        if importance is not None:
            factor = np.broadcast_to(importance, rows.shape)[part]
        found = quantizer.run(rows[part].astype(np.float64), factor)
        codes[part], scale[part], lowest[part] = found
    return BlockCodes(codes, scale, lowest)


class _Quantizer:
    """Quantizes chunks of blocks.

    Blocks are first divided by powers of two into [-1, 1], so that float32 is enough to compare
    errors in: neither large nor tiny weights overflow. Blocks have shape (n, block), scales and
    zero points (n, 1).
    """

    def __init__(self, kind: WeightFormat, search: ScaleSearch, dtype: np.dtype[Any]) -> None:
        self._kind = kind
        self._search = search
        self._scale_bits = kind.scale_bits(dtype)
        info = ml_dtypes.finfo(dtype)
        # Products of a scale below this would not be exact, of one above it infinite.
        self._smallest = float(info.smallest_subnormal) * 2.0**self._scale_bits
        self._largest = _rounded(float(info.max) / kind.span, self._scale_bits, np.floor)
        self._exponent: Array = np.zeros((0, 1), np.int32)

    def run(self, rows: Floats, importance: Floats | None) -> tuple[Array, Floats, Array]:
        """Codes, scales and lowest codes of float64 blocks."""
        self._exponent = np.frexp(np.abs(rows).max(axis=1, keepdims=True))[1]
        small = np.ldexp(rows, -self._exponent).astype(np.float32)
        if importance is not None:
            importance = importance.astype(np.float32)
        codes, scale, zero_point = self._scaled(small, importance)
        return codes, np.ldexp(scale, self._exponent), -zero_point

    def _scaled(self, rows: Array, importance: Array | None) -> tuple[Array, Floats, Floats]:
        if self._kind.binary:
            return self._binary(rows, importance)
        lowest = np.minimum(rows.min(axis=1, keepdims=True), 0).astype(np.float64)
        highest = np.maximum(rows.max(axis=1, keepdims=True), 0).astype(np.float64)
        if self._kind.scheme == "symmetric":
            full = 2 * np.maximum(-lowest, highest) / self._kind.span
        else:
            full = (highest - lowest) / self._kind.span
        if self._search == "max":
            scale = self._usable(full, np.ceil)
            zero_point = self._zero_point(lowest, highest, scale)
            return self._codes(rows, scale, zero_point), scale, zero_point
        return self._searched(rows, full, (lowest, highest), importance)

    def _searched(
        self, rows: Array, full: Floats, limits: tuple[Floats, Floats], importance: Array | None
    ) -> tuple[Array, Floats, Floats]:
        best = np.full(full.shape, np.inf)
        codes, scales, zero_points = np.zeros_like(rows), np.ones_like(full), np.zeros_like(full)

        def consider(scale: Floats) -> None:
            zero_point = self._zero_point(*limits, scale)
            found = self._codes(rows, scale, zero_point)
            error = _error(rows, found * scale.astype(np.float32), importance)
            better = (error < best)[:, 0]
            codes[better], scales[better] = found[better], scale[better]
            zero_points[better], best[better] = zero_point[better], error[better]

        for factor in np.geomspace(_SMALLEST_FACTOR[self._kind.bits], 1.06, _TRIED):
            consider(self._usable(full * factor, np.rint))
        weighted = codes if importance is None else codes * importance
        power = (weighted * codes).sum(axis=1, keepdims=True)
        fitted = (weighted * rows).sum(axis=1, keepdims=True) / np.where(power > 0, power, 1)
        consider(self._usable(np.where(power > 0, fitted, scales), np.rint))
        return codes, scales, zero_points

    def _zero_point(self, lowest: Floats, highest: Floats, scale: Floats) -> Floats:
        """How many codes lie below 0; what does not fit is cut off equally on both sides."""
        span = self._kind.span
        if self._kind.scheme == "symmetric":
            return np.full_like(scale, span // 2)
        middle: Floats = np.rint((span - (lowest + highest) / scale) / 2)
        return np.clip(middle, 0, span)

    def _codes(self, rows: Array, scale: Floats, zero_point: Floats) -> Array:
        below = zero_point.astype(np.float32)
        codes: Array = np.rint(rows / scale.astype(np.float32))
        return np.clip(codes, -below, np.float32(self._kind.span) - below, out=codes)

    def _binary(self, rows: Array, importance: Array | None) -> tuple[Array, Floats, Floats]:
        """Signs and mean magnitudes (XNOR-Net, equation 6); with "max" the largest one."""
        size = np.abs(rows).astype(np.float64)
        if self._search == "max":
            wanted = size.max(axis=1, keepdims=True)
        else:
            shares = np.ones_like(rows) if importance is None else importance
            total = shares.sum(axis=1, keepdims=True, dtype=np.float64)
            weighted = (size * shares).sum(axis=1, keepdims=True)
            wanted = weighted / np.where(total > 0, total, 1)
        # A dead channel stays dead.
        signs = np.where(rows < 0, -1.0, 1.0) * (wanted > 0)
        return signs, self._usable(wanted, np.rint), np.ones_like(wanted)

    def _usable(self, scale: Floats, direction: Any) -> Floats:
        """Scales of few significant bits, positive; 1 for blocks of zeros."""
        rounded = _rounded(scale, self._scale_bits, direction)
        real = np.clip(np.ldexp(rounded, self._exponent), self._smallest, self._largest)
        return np.where(scale > 0, np.ldexp(real, -self._exponent), 1.0)


def _error(rows: Array, changed: Array, importance: Array | None) -> Array:
    square = np.square(rows - changed)
    if importance is not None:
        square = square * importance
    total: Array = square.sum(axis=1, keepdims=True)
    return total


def _rounded(values: Any, bits: int, direction: Any) -> Any:
    """Numbers rounded to so many significant bits."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(direction(mantissa * (1 << bits)), exponent - bits)


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, _CHUNK // max(1, shape[1]))
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)


# ---------------- grids found in values


def on_grid(values: FloatArray, layout: BlockLayout, kind: WeightFormat) -> bool:
    """Whether every block holds numbers of the format only, whatever their scale's precision."""
    found = find_grid(values, layout)
    if found is None:
        return False
    low = np.minimum(found.codes.min(axis=1), 0).astype(np.int64)
    high = np.maximum(found.codes.max(axis=1), 0).astype(np.int64)
    if kind.binary:
        dead = (low == 0) & (high == 0)
        return bool(((np.abs(found.codes) == 1).all(axis=1) | dead).all())
    if kind.scheme == "symmetric":
        return int(np.maximum(-low, high).max()) <= kind.span // 2
    return int((high - low).max()) <= kind.span


def usual_blocks(row: int) -> list[int]:
    """Block lengths worth looking for in rows of this length, shortest first; the row is last."""
    lengths = sorted(factor << power for factor in (1, 3) for power in range(3, 10))
    return [*(length for length in lengths if row % length == 0 and length < row), row]


def grid_block(values: FloatArray, layout: BlockLayout, kind: WeightFormat) -> int | None:
    """Elements of the blocks in which a weight is on a grid of the format already, or None.

    Those of `layout` come first, then others along its axis.
    """
    row = block_layout(layout.shape, layout.axis).block
    for block in (layout.block, *usual_blocks(row)):
        if on_grid(values, BlockLayout(layout.shape, layout.axis, block), kind):
            return block
    return None


def find_grid(values: FloatArray, layout: BlockLayout) -> BlockCodes | None:
    """Scales and codes that give `values` bit for bit, or None if a block needs larger codes.

    The scale of a block is the greatest common divisor of its numbers; a multiple of the one it was
    quantized with, if its codes happen to have a common divisor. Such scales are divided again
    where that gives one that other blocks have. Blocks of zeros get the most frequent scale.
    """
    rows = layout.cut(values)
    codes = np.empty(rows.shape, np.int16)
    scale = np.empty((rows.shape[0], 1))
    for part in _growing_chunks(rows.shape):
        found = _common_divisors(rows[part])
        if found is None:
            return None
        codes[part], scale[part] = found
    if not codes.size:
        return None
    _share_scales(codes, scale)
    return BlockCodes(codes, scale, np.minimum(codes.min(axis=1, keepdims=True), np.int16(0)))


def _growing_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """A few rows first: most weights are on no grid, and the first block tells."""
    first = min(shape[0], 4)
    yield slice(0, first)
    for part in _chunks(shape):
        if part.stop > first:
            yield slice(max(part.start, first), part.stop)


def _common_divisors(rows: FloatArray) -> tuple[Array, Floats] | None:
    """Codes and scales of a chunk of blocks; scale 0 for blocks of zeros."""
    with np.errstate(invalid="ignore"):  # signalling NaNs are refused below
        wide = rows.astype(np.float64)
    if not np.isfinite(wide).all() or (np.signbit(wide) & (wide == 0)).any():
        return None
    mantissa, exponent = np.frexp(wide)
    integers = mantissa * 2.0**_MANTISSA
    if (integers != np.rint(integers)).any():
        return None
    used = wide != 0
    lowest = np.where(used, exponent, 1 << 20).min(axis=1, keepdims=True)
    shift = np.where(used, exponent - lowest, 0)
    if shift.max(initial=0) > _SPREAD:
        return None
    whole = integers.astype(np.int64) << shift
    divisor = np.gcd.reduce(whole, axis=1, keepdims=True)
    codes = whole // np.maximum(divisor, 1)
    if np.abs(codes).max(initial=0) > MAX_CODE:
        return None
    lowest = np.where(divisor > 0, lowest, 0)
    return codes, np.ldexp(divisor.astype(np.float64), lowest - _MANTISSA)


def _share_scales(codes: npt.NDArray[np.int16], scale: Floats) -> None:
    """Divides rare scales so that they become frequent ones, in place."""
    flat = scale[:, 0]
    low = np.minimum(codes.min(axis=1), 0).astype(np.int64)
    high = np.maximum(codes.max(axis=1), 0).astype(np.int64)
    distinct, counts = np.unique(flat[flat > 0], return_counts=True)
    if not distinct.size:
        scale[:] = 1.0
        return
    common = distinct[counts * distinct.size >= 0.1 * counts.sum()]
    below, above = int(low.min()), int(high.max())
    span = int((high - low).max())
    rare = (flat > 0) & ~np.isin(flat, common)
    for factor in range(2, max(-below, above) + 1):
        if not rare.any():
            break
        divided = flat / factor
        fits = rare & (low * factor >= below) & (high * factor <= above)
        fits &= ((high - low) * factor <= span) & (divided * factor == flat)
        fits &= np.isin(divided, common)
        flat[fits] = divided[fits]
        codes[fits] *= np.int16(factor)
        low[fits] *= factor
        high[fits] *= factor
        rare &= ~fits
    flat[flat == 0] = distinct[int(np.argmax(counts))]
