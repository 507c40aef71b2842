"""Large values stay in the file they are in: found in its bytes without parsing them.

A message in the wire format of Protocol Buffers is a list of fields, each with its number and, for
those that hold others, its length in bytes (https://protobuf.dev/programming-guides/encoding/). So
the raw data of tensors can be found by skipping from field to field, and the message be parsed
without them: in their place stands where they are.
"""

import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto

from onnxslim_passes.errors import InvalidModelError
from onnxslim_passes.model.payload import CHUNK_BYTES, FilePayload, Payload

__all__ = ["Lifted", "filled", "lift"]

# Smaller values stay in the message: shape arithmetic is made of such.
SMALLEST_BYTES = 8192

_KEY = "onnxslim_passes:raw_data"

_CHILDREN = {
    "ModelProto": {7: "GraphProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto"},
    "FunctionProto": {7: "NodeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {5: "TensorProto", 6: "GraphProto", 11: "GraphProto"},
    "TensorProto": {},
}
"""Which fields of a message hold others in which tensors may stand that passes read."""

_RAW_DATA = 9
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_MOST_VARINT_BYTES = 10


class OpenFile:
    """A file that values are read from for as long as something refers to them.

    It may be replaced or removed meanwhile, but not written into.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = self._now()

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._descriptor)
        return state.st_size, state.st_mtime_ns

    def mapped(self) -> mmap.mmap:
        """Its bytes, read as they are looked at."""
        return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Some of its bytes in pieces of at most `CHUNK_BYTES`.

        Raises:
            InvalidModelError: it was written into since it was opened.
        """
        for start in range(offset, offset + length, CHUNK_BYTES):
            piece = os.pread(self._descriptor, min(CHUNK_BYTES, offset + length - start), start)
            if self._now() != self._state:
                raise InvalidModelError(
                    f"{self.path} was written into while it was in use; load it again."
                )
            yield piece


@dataclass
class Lifted:
    """A model file without its large values.

    Attributes:
        proto: the message; a tensor whose values stayed behind has a mark among its external data.
        file: holds the values.
        places: offset and length of each.
    """

    proto: onnx.ModelProto
    file: OpenFile
    places: list[tuple[int, int]] = field(default_factory=list)

    def payload(self, tensor: TensorProto) -> Payload | None:
        """The values of a tensor that stayed behind; None for others. Takes the mark off."""
        marks = [entry for entry in tensor.external_data if entry.key == _KEY]
        if not marks:
            return None
        number = marks[-1].value
        if not number.isdecimal() or int(number) >= len(self.places):
            raise InvalidModelError(f"Tensor {tensor.name!r} has external data of no file.")
        offset, length = self.places[int(number)]
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        return FilePayload(tensor, self.file, offset, length)


def lift(path: Path) -> Lifted | None:
    """Parses a file whose large values stay in it; None if that does not help or is not possible.

    Raises:
        OSError: it cannot be read.
        DecodeError: what is left is no message.
    """
    if not hasattr(os, "pread") or path.stat().st_size <= SMALLEST_BYTES:
        return None  # Windows, where an open file could not be replaced either
    file = OpenFile(path)
    places: list[tuple[int, int]] = []
    with file.mapped() as data, memoryview(data) as view:
        try:
            pieces = list(_kept(view, 0, len(view), "ModelProto", places))
        except (IndexError, ValueError):
            return None  # truncated, or no message at all: parsing says which
    if not places:
        return None
    return Lifted(onnx.ModelProto.FromString(b"".join(pieces)), file, places)


def _kept(
    view: memoryview, start: int, stop: int, kind: str, places: list[tuple[int, int]]
) -> Iterator[bytes]:
    """The bytes of a message without its large values, whose places are noted."""
    children, copied, at = _CHILDREN[kind], start, start
    while at < stop:
        begin = at
        tag, at = _varint(view, at)
        number, wire = tag >> 3, tag & 7
        if wire != _LENGTH:
            at = _behind(view, at, wire)
            continue
        length, body = _varint(view, at)
        at = body + length
        if at > stop:
            raise ValueError("a field is longer than its message")
        values = kind == "TensorProto" and number == _RAW_DATA
        if length < SMALLEST_BYTES or not (values or number in children):
            continue
        yield bytes(view[copied:begin])
        copied = at
        if values:
            yield _mark(len(places))
            places.append((body, length))
        else:
            inner = b"".join(_kept(view, body, at, children[number], places))
            yield _encoded(tag) + _encoded(len(inner)) + inner
    if at != stop:
        raise ValueError("a field ends behind its message")
    yield bytes(view[copied:stop])


def filled(message: bytes, mark: bytes, lengths: Sequence[int]) -> list[bytes | int] | None:
    """The bytes of a model in which some tensors have a mark for raw data, as if they had values.

    Args:
        message: the model; the raw data of a tensor may be `mark` and four bytes, a number.
        mark: bytes that are nowhere else in the message.
        lengths: bytes of the values that belong to each number.

    Returns:
        Bytes in order, and numbers of the values that stand between them; None if there are marks
        where values cannot be put.
    """
    pieces, _ = _filled(message, (0, len(message)), "ModelProto", mark, lengths)
    found = sum(isinstance(piece, int) for piece in pieces)
    return pieces if found == message.count(mark) else None


def _filled(
    message: bytes, span: tuple[int, int], kind: str, mark: bytes, lengths: Sequence[int]
) -> tuple[list[bytes | int], int]:
    """The pieces of one message within the model, and their bytes in all."""
    children, (copied, stop) = _CHILDREN[kind], span
    pieces: list[bytes | int] = []
    size, at = stop - copied, copied
    while (at := _next_field(message, at, stop, mark)) < stop:
        begin, (tag, at) = at, _varint(message, at)
        length, body = _varint(message, at)
        at, number = body + length, tag >> 3
        if kind == "TensorProto" and number == _RAW_DATA:
            index = int.from_bytes(message[body + len(mark) : at])
            inner: list[bytes | int] = [index]
            inner_size = lengths[index]
        elif number in children:
            inner, inner_size = _filled(message, (body, at), children[number], mark, lengths)
        else:
            continue
        head = _encoded(tag) + _encoded(inner_size)
        pieces += [message[copied:begin] + head, *inner]
        size += len(head) + inner_size - (at - begin)
        copied = at
    return [*pieces, message[copied:stop]], size


def _next_field(message: bytes, at: int, stop: int, mark: bytes) -> int:
    """Where the next field with a mark in it begins; `stop` if there is none."""
    place = message.find(mark, at, stop)
    while place >= 0:
        begin = at
        tag, at = _varint(message, at)
        if tag & 7 == _LENGTH:
            length, at = _varint(message, at)
            at += length
        else:
            at = _behind(message, at, tag & 7)
        if at > place:
            return begin
    return stop


def _mark(number: int) -> bytes:
    """The fields that a tensor has instead of its raw data."""
    tensor = TensorProto(data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key=_KEY, value=str(number))
    message: bytes = tensor.SerializeToString()
    return message


def _behind(view: memoryview | bytes, at: int, wire: int) -> int:
    """The place behind a value that has no length."""
    if wire == _VARINT:
        return _varint(view, at)[1]
    if wire in (_EIGHT_BYTES, _FOUR_BYTES):
        return at + (8 if wire == _EIGHT_BYTES else 4)
    raise ValueError("a wire type that no message of ONNX has")


def _varint(view: memoryview | bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place behind it."""
    value = 0
    for index in range(_MOST_VARINT_BYTES):
        byte = view[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("a number of more than ten bytes")


def _encoded(value: int) -> bytes:
    """A number of seven bits a byte."""
    pieces = bytearray()
    while value > 0x7F:
        pieces.append(value & 0x7F | 0x80)
        value >>= 7
    pieces.append(value)
    return bytes(pieces)
