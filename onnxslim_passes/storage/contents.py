"""What a weight holds, as encodings ask it: zeros, distinct values, shared values per channel.

Everything is exact to the bit: elements are compared as unsigned integers, so that -0.0, the
payloads of NaNs and denormals are values like any other. Everything is computed when first asked
for, and counting distinct values gives up early: most float weights have millions of them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# ONNX Runtime does not fold a node whose output is larger than this.
FOLD_LIMIT_BYTES = 1 << 30
MAX_CODES = 256
_SAMPLE = 4096
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class SharedValues:
    """A tensor as codes into a table of values, the most frequent value first.

    Attributes:
        codes: uint8. Per tensor: shape (n,), in the tensor's order. Per channel: shape (C, n / C),
            the channel axis moved to the front.
        table: the tensor's type. Per tensor: shape (K,). Per channel: shape (C, K), unused places
            filled with zeros. K <= 256.
        axis: the channel axis, or None for one table per tensor.
        counts: int64, shape (K,): how many elements have each code.
    """

    codes: npt.NDArray[np.uint8]
    table: Array
    axis: int | None
    counts: npt.NDArray[np.int64]

    @property
    def clusters(self) -> int:
        """K: values that one table holds."""
        return int(self.table.shape[-1])

    @property
    def bits(self) -> int:
        """Bits of one code; 0 if there is only one."""
        return (self.clusters - 1).bit_length()

    @property
    def entropy_bits(self) -> float:
        """Mean bits a code takes in an ideal code of order 0."""
        p = self.counts[self.counts > 0] / max(1, self.counts.sum())
        return float(-(p * np.log2(p)).sum()) + 0.0


class Contents:
    """The values of one weight.

    Attributes:
        values: the array, C-contiguous.
        bits: the same elements as unsigned integers, shape (n,).
    """

    def __init__(self, values: Array) -> None:
        self.values = np.ascontiguousarray(values).reshape(values.shape)
        self.bits: Array = self.values.reshape(-1).view(np.dtype(f"u{values.dtype.itemsize}"))

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self.values.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.values.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the values, dense."""
        return int(self.values.nbytes)

    @property
    def pieces(self) -> int | None:
        """`folding_pieces` of this weight."""
        return folding_pieces(self.size, self.dtype.itemsize)

    @property
    def folds(self) -> bool:
        """Whether ONNX Runtime folds decoders of the whole weight."""
        return self.pieces == 1

    @cached_property
    def entries(self) -> int:
        """Elements that are not +0.0."""
        return int(np.count_nonzero(self.bits))

    @cached_property
    def background(self) -> Array:
        """The most frequent value, a scalar; +0.0 where there are more than 256 values."""
        if self.shared is not None:
            return self.shared.table[0]  # type: ignore[no-any-return]  # NumPy scalars are Any
        return np.zeros((), self.dtype)

    @cached_property
    def differing(self) -> int:
        """Elements that differ from the background."""
        return int(np.count_nonzero(self._differs))

    @cached_property
    def positions(self) -> npt.NDArray[np.int64]:
        """Where the elements are that differ from the background; ascending."""
        return np.flatnonzero(self._differs)

    @cached_property
    def foreground(self) -> "Contents":
        """The elements that differ from the background, as a vector."""
        return Contents(self.values.reshape(-1)[self.positions])

    @property
    def _differs(self) -> npt.NDArray[np.bool_]:
        background = self.background.reshape(1).view(self.bits.dtype)
        differs: npt.NDArray[np.bool_] = self.bits != background
        return differs

    @cached_property
    def index_bytes(self) -> int:
        """Bytes of the positions of these elements as varints."""
        return varints_bytes(self.bits)

    @cached_property
    def shared(self) -> SharedValues | None:
        """One table for the whole tensor, or None if it has more than 256 distinct values."""
        if not self.size or len(np.unique(_sample(self.bits))) > MAX_CODES:
            return None
        distinct = _distinct(self.bits)
        return None if distinct is None else _encode_tensor(self.bits, distinct, self.dtype)

    @cached_property
    def shared_by_channel(self) -> tuple[SharedValues, ...]:
        """Tables per channel, for each axis where they need fewer bits than one table does."""
        limit = MAX_CODES if self.shared is None else 1 << max(0, self.shared.bits - 1)
        found = (self._by_channel(axis, limit) for axis in range(self.values.ndim))
        return tuple(shared for shared in found if shared is not None)

    def _by_channel(self, axis: int, limit: int) -> SharedValues | None:
        channels = self.shape[axis]
        # A table must be shorter than what it replaces.
        if channels < 2 or self.size < 4 * channels:
            return None
        rows = np.moveaxis(self.bits.reshape(self.shape), axis, 0)
        for channel in {0, channels // 2, channels - 1}:
            distinct = len(np.unique(_sample(rows[channel].reshape(-1))))
            if distinct > min(limit, self.size // channels // 2):
                return None
        return _encode_channels(rows.reshape(channels, -1), axis, limit, self.dtype)


def folding_pieces(size: int, itemsize: int) -> int | None:
    """Into how many pieces to cut a weight so that the decoder of each folds.

    The largest tensor of a decoder is the weight, int32 codes, or the Range that positions are
    taken of, which has at most 9/8 of the elements.

    Args:
        size: elements.
        itemsize: bytes of each.

    Returns:
        None where the weight itself is too large to be folded.
    """
    if size * itemsize > FOLD_LIMIT_BYTES:
        return None
    largest = max(size * 9 // 8 * 4, size * itemsize)
    return max(1, -(-largest // FOLD_LIMIT_BYTES))


def varints_bytes(elements: Array) -> int:
    """Bytes of the positions of the non-zero elements as protobuf varints."""
    total, seen = 0, 0
    for width in range(1, 10):
        stop = 1 << (7 * width)
        count = int(np.count_nonzero(elements[:stop])) - seen
        total, seen = total + count * width, seen + count
        if stop >= elements.size:
            break
    return total


def _sample(bits: Array) -> Array:
    """At most 4,096 elements, evenly spread; the same ones each time."""
    if bits.size <= _SAMPLE:
        return bits
    return bits[np.linspace(0, bits.size - 1, _SAMPLE).astype(np.int64)]


def _distinct(bits: Array) -> Array | None:
    """The distinct elements, sorted, or None as soon as there are more than 256."""
    if bits.dtype.itemsize == 1:
        return np.flatnonzero(_byte_counts(bits)).astype(bits.dtype)
    known = np.unique(_sample(bits))
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        places = np.searchsorted(known, chunk)
        places[places == known.size] = 0
        missed = chunk[known[places] != chunk]
        if missed.size:
            known = np.union1d(known, missed)
        if known.size > MAX_CODES:
            return None
    return known


def _byte_counts(bits: Array) -> npt.NDArray[np.int64]:
    """How often each byte occurs; in pieces, because eight bytes are made of each to count it."""
    counts = np.zeros(256, np.int64)
    for start in range(0, bits.size, _CHUNK):
        counts += np.bincount(bits[start : start + _CHUNK], minlength=256)
    return counts


def _encode_tensor(bits: Array, distinct: Array, dtype: np.dtype[Any]) -> SharedValues:
    if bits.dtype.itemsize == 1:
        # The byte itself is a place in a table, which saves the search.
        counts = _byte_counts(bits)[distinct]
    else:
        codes = np.empty(bits.size, np.uint8)
        for start in range(0, bits.size, _CHUNK):
            codes[start : start + _CHUNK] = np.searchsorted(distinct, bits[start : start + _CHUNK])
        counts = np.bincount(codes, minlength=distinct.size)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(distinct.size, np.uint8)
    rank[order] = np.arange(distinct.size)
    if bits.dtype.itemsize == 1:
        ranks = np.zeros(256, np.uint8)
        ranks[distinct] = rank
        codes = ranks[bits]
    else:
        codes = rank[codes]
    return SharedValues(codes, distinct[order].view(dtype), None, counts[order])


def _unique(bits: Array) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """The distinct elements, sorted; for each element its place among them; how often each is."""
    if bits.dtype.itemsize > 1:
        return np.unique(bits, return_inverse=True, return_counts=True)
    totals = _byte_counts(bits)
    distinct = np.flatnonzero(totals)
    places = np.zeros(256, np.intp)
    places[distinct] = np.arange(distinct.size)
    return distinct.astype(bits.dtype), places[bits], totals[distinct]


def _encode_channels(
    rows: Array, axis: int, limit: int, dtype: np.dtype[Any]
) -> SharedValues | None:
    """Codes per row; None as soon as a row has more than `limit` distinct elements."""
    codes = np.empty(rows.shape, np.uint8)
    tables: list[Array] = []
    totals = np.zeros(limit, np.int64)
    for channel, row in enumerate(rows):
        distinct, inverse, counts = _unique(row)
        if distinct.size > limit:
            return None
        order = np.argsort(-counts, kind="stable")
        rank = np.empty(distinct.size, np.uint8)
        rank[order] = np.arange(distinct.size)
        codes[channel] = rank[inverse]
        tables.append(distinct[order])
        totals[: distinct.size] += counts[order]
    clusters = max(table.size for table in tables)
    table = np.zeros((len(tables), clusters), rows.dtype)
    for channel, values in enumerate(tables):
        table[channel, : values.size] = values
    return SharedValues(codes, table.view(dtype), axis, totals[:clusters])
