"""Codebooks: a small table of values, and a code for each element.

    w[i] = table[code[i]]             Gather(table, Cast(codes))
    w[c, i] = table[c, code[c, i]]    GatherElements(table, Cast(codes)), a table per channel

ONNX's Gather takes int32 or int64 indices only, so codes pass through a Cast; ONNX Runtime folds
both when it loads the model. The encodings differ in how they write the codes:

- ``codebook-uint8``: a byte each, or
- ``codebook-uint4``: a UINT4 tensor, from opset 21, or
- ``codebook-uint2``: a UINT2 tensor, from opset 25, or
- ``codebook-packed``: 1 to 7 bits each (`streams`). With a single plane and one table per tensor,
  ``Gather(Gather(table, T), b)`` skips the codes: the most compact is then also the fastest to
  load.
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

from onnxslim_passes.numerics.bits import packed_bytes
from onnxslim_passes.storage.base import Encoding, Expression, Payload, Plan, Site, Step, step
from onnxslim_passes.storage.contents import Contents, SharedValues, varints_bytes
from onnxslim_passes.storage.streams import (
    INT32,
    cut,
    plane_payload,
    planes,
    raw,
    reshape,
    same,
    unpack_codes,
    unpacking_table,
)

Codes = npt.NDArray[np.uint8]


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
        table = raw(shared.table)
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
    values = raw(np.ascontiguousarray(table))

    def rebuild(code_numbers: Expression) -> Step:
        weight = step("GatherElements", values, code_numbers, axis=along)
        if axis in (0, len(shape) - 1):
            return weight if len(shape) == 2 else reshape(weight, shape)
        moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
        order = (*range(1, axis + 1), 0, *range(axis + 1, len(shape)))
        return step("Transpose", reshape(weight, moved), perm=order)

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
            payload = Payload(codes.shape, codes.dtype, codes.size, partial(same, codes))
            root = layout.rebuild(step("Cast", payload, to=INT32))
            yield Plan(self.name, root, {"bits": 8, **layout.figures})


class _CodebookShort(Encoding):
    """A tensor of codes in one of ONNX's types below a byte.

    Attributes:
        elem_type: the type.
        bits: of a code.
        since: the first opset that has the type.
    """

    elem_type: ClassVar[int]
    bits: ClassVar[int]
    since: ClassVar[int]

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """One for each way to share few enough values."""
        if site.opset < self.since:
            return
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(self.elem_type))
        for layout in _layouts(contents, site):
            if layout.shared.bits > self.bits:
                continue
            codes = layout.codes
            nbytes = packed_bytes(codes.size, self.bits)
            payload = Payload(codes.shape, dtype, nbytes, partial(_converted, codes, dtype))
            root = layout.rebuild(step("Cast", payload, to=INT32))
            yield Plan(self.name, root, {"bits": self.bits, **layout.figures})


class CodebookUint4(_CodebookShort):
    """A UINT4 tensor of codes, for at most 16 values."""

    name: ClassVar[str] = "codebook-uint4"
    elem_type: ClassVar[int] = TensorProto.UINT4
    bits: ClassVar[int] = 4
    since: ClassVar[int] = 21


class CodebookUint2(_CodebookShort):
    """A UINT2 tensor of codes, for at most 4 values."""

    name: ClassVar[str] = "codebook-uint2"
    elem_type: ClassVar[int] = TensorProto.UINT2
    bits: ClassVar[int] = 2
    since: ClassVar[int] = 25


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
                partial(same, codes),
                sparse=True,
                entries=entries,
            )
            root = layout.rebuild(step("Cast", payload, to=INT32))
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
            if len(planes(bits)) == 1 and layout.shared.axis is None:
                root = _unpack_values(layout, bits, contents.shape, site)
            else:
                root = layout.rebuild(_unpacked(layout.codes, bits, site))
            yield Plan(self.name, root, {"bits": bits, **layout.figures})


def _unpack_values(layout: _Layout, bits: int, shape: tuple[int, ...], site: Site) -> Step:
    """Bytes straight to values, through a table of 8/bits values for each byte."""
    table = layout.shared.table
    # Every number of `bits` bits indexes the table, also those that no code uses.
    padded = np.zeros(1 << bits, table.dtype)
    padded[: table.size] = table
    rows = step("Gather", raw(padded), unpacking_table(bits, site))
    packed = plane_payload(partial(same, layout.codes), layout.codes.size, bits, 0)
    values = step("Gather", rows, step("Cast", packed, to=INT32))
    return cut(values, layout.codes.size, bits, shape, site)


def _unpacked(codes: Codes, bits: int, site: Site) -> Step:
    """Int32 codes of the shape of `codes`."""
    flat = unpack_codes(partial(same, codes), codes.size, bits, site)
    return flat if codes.ndim == 1 else reshape(flat, codes.shape)


def _converted(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return values.astype(dtype)
