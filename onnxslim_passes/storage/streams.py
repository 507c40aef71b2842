"""Expressions that unpack streams of bits and of small codes.

A byte b holds 8/p codes of p bits, p one of 1, 2, 4; ``Gather(T, b)`` unpacks it with the table
``T[b, j] = (b >> p j) mod 2^p`` of shape (256, 8/p). Other widths are sums of such planes (3 = 2 +
1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1), wider ones have planes of whole bytes. T is computed in
the graph, once for all weights.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from onnxslim_passes.model.payload import values_bytes
from onnxslim_passes.numerics.bits import pack_bits, packed_bytes
from onnxslim_passes.storage.base import Expression, Literal, Payload, Site, Step, step

Codes = npt.NDArray[np.integer[Any]]

INT32 = int(TensorProto.INT32)
_PLANE_WIDTHS = (8, 4, 2, 1)


def planes(bits: int) -> list[int]:
    """Widths of the planes of a code, the lowest bits first: 7 is 4 + 2 + 1."""
    widths = []
    for width in _PLANE_WIDTHS:
        widths += [width] * (bits // width)
        bits %= width
    return widths


def planes_bytes(count: int, bits: int) -> int:
    """Bytes that the planes of `count` codes take together."""
    return sum(packed_bytes(count, width) for width in planes(bits))


def unpack_codes(
    make: Callable[[], Codes], count: int, bits: int, site: Site, *, offset: int = 0
) -> Step:
    """Planes of bytes to ``code + offset``: int32, shape (count,).

    Args:
        make: the codes, any integer type and shape, `count` in all, below ``2**bits``.
        count: how many.
        bits: of each, 1 to 16.
        site: where.
        offset: added to each code.
    """
    total: Step | None = None
    shift = 0
    for width in planes(bits):
        plane = _plane(make, count, width, shift, site, 0 if shift else offset)
        total = plane if total is None else step("Add", total, plane)
        shift += width
    assert total is not None
    return total


def _plane(
    make: Callable[[], Codes], count: int, width: int, shift: int, site: Site, offset: int
) -> Step:
    """Bits [shift, shift + width) of the codes, at their place."""
    packed = plane_payload(make, count, width, shift)
    if width == 8:
        numbers = _shifted(step("Cast", packed, to=INT32), shift)
        return _plus(numbers, offset)
    table = _plus(_shifted(unpacking_table(width, site), shift), offset)
    rows = step("Gather", table, step("Cast", packed, to=INT32))
    return cut(rows, count, width, (-1,), site)


def plane_payload(make: Callable[[], Codes], count: int, width: int, shift: int) -> Payload:
    """Bits [shift, shift + width) of the codes, packed: uint8, shape (bytes,)."""

    def packed() -> npt.NDArray[np.uint8]:
        return pack_bits((make() >> shift) & ((1 << width) - 1), width)

    nbytes = packed_bytes(count, width)
    return Payload((nbytes,), np.dtype(np.uint8), nbytes, packed)


def unpack_flags(packed: Payload, site: Site) -> Step:
    """The bits of a stream, those of its last byte included: bool, shape (8 bytes,)."""
    table = step("Cast", unpacking_table(1, site), to=int(TensorProto.BOOL))
    return reshape(step("Gather", table, step("Cast", packed, to=INT32)), (-1,))


def unpacking_table(width: int, site: Site) -> Step:
    """T[b, j] = (b >> width j) mod 2^width: int32, shape (256, 8 / width)."""
    places = np.arange(0, 8, width)
    if site.opset < 11:  # no Range before: written out, a byte an element
        numbers = (np.arange(256)[:, None] >> places) & ((1 << width) - 1)
        return step("Cast", Literal.of(numbers, np.uint8), to=INT32)
    number = partial(Literal.of, dtype=np.int32)
    rows = reshape(step("Range", number(0), number(256), number(1)), (256, 1))
    return step("Mod", step("Div", rows, number([1 << places])), number(1 << width))


def _shifted(numbers: Step, shift: int) -> Step:
    return step("Mul", numbers, Literal.of(1 << shift, np.int32)) if shift else numbers


def _plus(numbers: Step, offset: int) -> Step:
    return step("Add", numbers, Literal.of(offset, np.int32)) if offset else numbers


def cut(rows: Step, size: int, width: int, shape: Iterable[int], site: Site) -> Step:
    """Rows of 8/width elements to a tensor of `shape`, without the padding of the last byte."""
    shape = tuple(shape)
    if size * width % 8 == 0:
        return reshape(rows, shape)
    flat = head(reshape(rows, (-1,)), size, site)
    return flat if shape == (-1,) else reshape(flat, shape)


def head(vector: Step, size: int, site: Site) -> Step:
    """The first elements of a vector."""
    if site.opset < 10:
        return step("Slice", vector, starts=(0,), ends=(size,))
    return step("Slice", vector, Literal.of([0], np.int64), Literal.of([size], np.int64))


def running_sum(vector: Step) -> Step:
    """The sums of the elements up to each one."""
    return step("CumSum", vector, Literal.of(0, np.int32))


def reshape(tensor: Expression, shape: Iterable[int]) -> Step:
    """`tensor` with other dimensions."""
    return step("Reshape", tensor, Literal.of(tuple(shape), np.int64))


def filled(value: npt.NDArray[Any], shape: Iterable[int]) -> Step:
    """A tensor of one value: a scalar array, which becomes a literal."""
    dimensions = Literal.of(tuple(shape), np.int64)
    elem_type = int(helper.np_dtype_to_tensor_dtype(value.dtype))
    if elem_type != TensorProto.BFLOAT16:
        return step("Expand", Literal.of(value, value.dtype), dimensions)
    # ONNX Runtime has no kernel to expand bfloat16.
    wide = step("Expand", Literal.of(value.astype(np.float32), np.float32), dimensions)
    return step("Cast", wide, to=elem_type)


def raw(values: npt.NDArray[Any]) -> Payload:
    """Values as they are."""
    return Payload(values.shape, values.dtype, values_bytes(values), partial(same, values))


def same(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What a payload makes whose values are there already."""
    return values
