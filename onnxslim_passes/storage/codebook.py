"""Codebooks: a small table of values, and a code for each element.

    w[i] = table[code[i]]             Gather(table, Cast(codes))
    w[c, i] = table[c, code[c, i]]    GatherElements(table, Cast(codes)), a table per channel

ONNX's Gather takes int32 or int64 indices only, so codes pass through a Cast; ONNX Runtime folds
both when it loads the model. The encodings differ in how they write the codes:

- ``codebook-uint8``: a byte each, or
- ``codebook-uint4``: a UINT4 tensor, from opset 21, or
- ``codebook-packed``: 1 to 8 bits each. A byte b holds 8/p codes of p bits, p one of 1, 2, 4;
  ``Gather(T, b)`` unpacks it with the table ``T[b, j] = (b >> p j) mod 2^p`` of shape (256, 8/p).
  Other widths are sums of such planes (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1). With a
  single plane and one table per tensor, ``Gather(Gather(table, T), b)`` skips the codes: the most
  compact is then also the fastest to load. T is computed in the graph, once for all weights.
- ``codebook-sparse``: bytes in a sparse initializer; the most frequent value has code 0, which is
  not stored.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from onnxslim_passes.numerics.bits import pack_bits, packed_bytes
from onnxslim_passes.storage.base import (
    Encoding,
    Expression,
    Literal,
    Payload,
    Plan,
    Site,
    Step,
    step,
)
from onnxslim_passes.storage.contents import Contents, SharedValues, varints_bytes

Codes = npt.NDArray[np.uint8]

_UINT4 = np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.UINT4))
_INT32 = int(TensorProto.INT32)
# Widths of the planes of a code, the lowest bits first.
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


@dataclass(frozen=True, eq=False)
class _Layout:
    """Codes in the order in which a decoder wants them.

    Attributes:
        shared: the codes and tables.
        codes: in the decoder's shape.
        rebuild: int32 codes of that shape to the weight.
    """

    shared: SharedValues
    codes: Codes
    rebuild: Callable[[Expression], Step]

    @property
    def figures(self) -> dict[str, int | float | str]:
        """What the report shows."""
        per = "tensor" if self.shared.axis is None else "channel"
        return {"clusters": self.shared.clusters, "per": per}


def _layouts(contents: Contents, site: Site) -> Iterator[_Layout]:
    """One for each way to share values, if the decoder folds."""
    if not contents.folds:
        return
    if contents.shared is not None:
        shared = contents.shared
        table = _table(shared.table)
        yield _Layout(
            shared, shared.codes.reshape(contents.shape), lambda codes: step("Gather", table, codes)
        )
    # GatherElements came with opset 11.
    if site.opset >= 11:
        for shared in contents.shared_by_channel:
            yield _channel_layout(shared, contents.shape)


def _channel_layout(shared: SharedValues, shape: tuple[int, ...]) -> _Layout:
    """Channels as rows (axis 0), as columns (last axis), or as rows that are moved afterwards."""
    axis = shared.axis
    assert axis is not None
    if axis == len(shape) - 1:
        table, codes, along = shared.table.T, shared.codes.T, 0
    else:
        table, codes, along = shared.table, shared.codes, 1
    values = _table(np.ascontiguousarray(table))

    def rebuild(code_numbers: Expression) -> Step:
        weight = step("GatherElements", values, code_numbers, axis=along)
        if axis in (0, len(shape) - 1):
            return weight if len(shape) == 2 else _reshape(weight, shape)
        moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
        order = (*range(1, axis + 1), 0, *range(axis + 1, len(shape)))
        return step("Transpose", _reshape(weight, moved), perm=order)

    return _Layout(shared, codes, rebuild)


class CodebookUint8(Encoding):
    """A byte a code."""

    name: ClassVar[str] = "codebook-uint8"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """For types wider than a byte."""
        if contents.dtype.itemsize == 1:
            return
        for layout in _layouts(contents, site):
            codes = layout.codes
            payload = Payload(codes.shape, codes.dtype, codes.size, partial(_same, codes))
            root = layout.rebuild(step("Cast", payload, to=_INT32))
            yield Plan(self.name, root, {"bits": 8, **layout.figures})


class CodebookUint4(Encoding):
    """A UINT4 tensor of codes."""

    name: ClassVar[str] = "codebook-uint4"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """For at most 16 values; UINT4 tensors came with opset 21."""
        if site.opset < 21:
            return
        for layout in _layouts(contents, site):
            if layout.shared.bits > 4:
                continue
            codes = layout.codes
            nbytes = packed_bytes(codes.size, 4)
            payload = Payload(codes.shape, _UINT4, nbytes, partial(_converted, codes, _UINT4))
            root = layout.rebuild(step("Cast", payload, to=_INT32))
            yield Plan(self.name, root, {"bits": 4, **layout.figures})


class CodebookSparse(Encoding):
    """A sparse initializer of bytes."""

    name: ClassVar[str] = "codebook-sparse"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """Where at least half of the elements have the most frequent value."""
        if not site.sparse or contents.dtype.itemsize == 1 or not contents.shape:
            return
        for layout in _layouts(contents, site):
            codes = layout.codes
            entries = codes.size - int(layout.shared.counts[0])
            if 2 * entries >= codes.size:
                continue
            nbytes = entries + varints_bytes(np.ascontiguousarray(codes).reshape(-1))
            payload = Payload(
                codes.shape,
                codes.dtype,
                nbytes,
                partial(_same, codes),
                sparse=True,
                entries=entries,
            )
            root = layout.rebuild(step("Cast", payload, to=_INT32))
            density = entries / codes.size
            yield Plan(self.name, root, {"bits": 8, "density": density, **layout.figures})


class CodebookPacked(Encoding):
    """Codes of 1 to 7 bits without gaps; eight bits are `CodebookUint8`."""

    name: ClassVar[str] = "codebook-packed"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """One for each way to share values in fewer bits than a byte."""
        for layout in _layouts(contents, site):
            bits = max(1, layout.shared.bits)
            if bits >= min(8, 8 * contents.dtype.itemsize):
                continue
            if len(_PLANES[bits]) == 1 and layout.shared.axis is None:
                root = _unpack_values(layout, bits, contents.shape, site)
            else:
                root = layout.rebuild(_unpack_codes(layout.codes, bits, site))
            yield Plan(self.name, root, {"bits": bits, **layout.figures})


def _unpack_values(layout: _Layout, bits: int, shape: tuple[int, ...], site: Site) -> Step:
    """Bytes straight to values, through a table of 8/bits values for each byte."""
    table = layout.shared.table
    # Every number of `bits` bits indexes the table, also those that no code uses.
    padded = np.zeros(1 << bits, table.dtype)
    padded[: table.size] = table
    rows = step("Gather", _table(padded), _unpacking_table(bits, 0, site))
    values = step("Gather", rows, _plane(layout.codes, bits, 0))
    return _cut(values, layout.codes.size, bits, shape, site)


def _unpack_codes(codes: Codes, bits: int, site: Site) -> Step:
    """Planes of bytes to int32 codes of the shape of `codes`."""
    total: Step | None = None
    shift = 0
    for width in _PLANES[bits]:
        rows = step("Gather", _unpacking_table(width, shift, site), _plane(codes, width, shift))
        plane = _cut(rows, codes.size, width, codes.shape, site)
        total = plane if total is None else step("Add", total, plane)
        shift += width
    assert total is not None
    return total


def _plane(codes: Codes, width: int, shift: int) -> Step:
    """Bits [shift, shift + width) of the codes, packed; int32, shape (bytes,)."""

    def make() -> Codes:
        return pack_bits((codes >> shift) & ((1 << width) - 1), width)

    nbytes = packed_bytes(codes.size, width)
    payload = Payload((nbytes,), np.dtype(np.uint8), nbytes, make)
    return step("Cast", payload, to=_INT32)


def _unpacking_table(width: int, shift: int, site: Site) -> Expression:
    """T[b, j] = ((b >> width j) mod 2^width) << shift: int32, shape (256, 8 / width)."""
    places = np.arange(0, 8, width)
    if site.opset < 11:  # no Range before: written out, a byte an element
        numbers = (np.arange(256)[:, None] >> places) & ((1 << width) - 1)
        return step("Cast", Literal.of(numbers << shift, np.uint8), to=_INT32)
    number = partial(Literal.of, dtype=np.int32)
    rows = _reshape(step("Range", number(0), number(256), number(1)), (256, 1))
    table = step("Mod", step("Div", rows, number([1 << places])), number(1 << width))
    return table if shift == 0 else step("Mul", table, number(1 << shift))


def _cut(rows: Step, size: int, width: int, shape: tuple[int, ...], site: Site) -> Step:
    """Rows of 8/width elements to a tensor of `shape`, without the padding of the last byte."""
    if size * width % 8 == 0:
        return _reshape(rows, shape)
    flat = _reshape(rows, (-1,))
    if site.opset < 10:
        return _reshape(step("Slice", flat, starts=(0,), ends=(size,)), shape)
    start, stop = Literal.of([0], np.int64), Literal.of([size], np.int64)
    return _reshape(step("Slice", flat, start, stop), shape)


def _reshape(tensor: Expression, shape: Iterable[int]) -> Step:
    return step("Reshape", tensor, Literal.of(tuple(shape), np.int64))


def _table(values: npt.NDArray[Any]) -> Payload:
    return Payload(values.shape, values.dtype, values.nbytes, partial(_same, values))


def _same(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values


def _converted(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return values.astype(dtype)
