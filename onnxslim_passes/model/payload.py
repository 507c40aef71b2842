"""Where the values of a constant are: in the file's message, beside the file, sparse, or new.

A payload is immutable. Whatever a pass leaves alone is written back from the payload it was read
into, byte for byte; external data is read only when asked for and copied in pieces.
"""

import math
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.errors import ExternalDataError, InvalidModelError

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK_BYTES = 1 << 20

# Whole numbers of these types may be written as varints instead of raw data.
_VARINT_FIELDS = {np.dtype(np.int32): "int32_data", np.dtype(np.int64): "int64_data"}
# Beyond this many elements raw data is kept: it is read faster.
MOST_VARINTS = 1 << 10

# Bits of one stored element where that is not the size of its NumPy type.
_PACKED_BITS = {
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.UINT2: 2,
    TensorProto.INT2: 2,
}


def numpy_dtype(elem_type: int) -> np.dtype[Any]:
    """The NumPy (or ml_dtypes) type of an ONNX element type; object for strings."""
    if elem_type == TensorProto.STRING:
        return np.dtype(object)
    try:
        dtype: np.dtype[Any] = np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))
    except KeyError:
        raise InvalidModelError(f"Element type {elem_type} is not one ONNX knows.") from None
    return dtype


def onnx_elem_type(dtype: np.dtype[Any]) -> int:
    """The ONNX element type of a NumPy (or ml_dtypes) type."""
    if dtype.kind in "OUS":
        return int(TensorProto.STRING)
    return int(helper.np_dtype_to_tensor_dtype(dtype))


def stored_bytes(elem_type: int, size: int) -> int:
    """Bytes that `size` elements take as raw data; packed types share bytes."""
    bits = _PACKED_BITS.get(elem_type) or 8 * numpy_dtype(elem_type).itemsize
    return (size * bits + 7) // 8


def values_bytes(values: Array) -> int:
    """Bytes that the values of a new message take: raw, or as varints where these are shorter.

    A varint has seven bits a byte, and ten bytes for a negative number.
    """
    if values.dtype not in _VARINT_FIELDS or values.size > MOST_VARINTS:
        return int(values.nbytes)
    bits = (int(number).bit_length() if number >= 0 else 64 for number in values.reshape(-1))
    return min(int(values.nbytes), sum(max(1, -(-width // 7)) for width in bits))


def new_tensor(values: Array, name: str = "") -> TensorProto:
    """A message with these values, in the fewest bytes (see `values_bytes`)."""
    nbytes = values_bytes(values)
    if nbytes == values.nbytes:
        message = numpy_helper.from_array(values, name)
    else:
        message = TensorProto(dims=values.shape, data_type=onnx_elem_type(values.dtype), name=name)
        getattr(message, _VARINT_FIELDS[values.dtype]).extend(values.reshape(-1).tolist())
    if not name:
        message.ClearField("name")  # present, an empty one takes two bytes
    return message


class Payload(Protocol):
    """Values with a type and a shape, wherever they are."""

    @property
    def elem_type(self) -> int:
        """ONNX element type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions of the dense array."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the values take in a file, in the form they are held in."""
        ...

    def array(self) -> Array:
        """The values, dense; the caller must not write into them."""
        ...

    def tensor(self, name: str) -> TensorProto:
        """The values as a dense message that holds them."""
        ...


def _decoded(proto: TensorProto) -> Array:
    """The values of a message that holds them; object for strings.

    Raises:
        InvalidModelError: if values, element type and dimensions do not fit together.
    """
    shape = tuple(proto.dims)
    try:
        if proto.data_type == TensorProto.STRING:
            return np.array([*proto.string_data, None], dtype=object)[:-1].reshape(shape)
        return np.asarray(numpy_helper.to_array(proto)).reshape(shape)
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidModelError(
            f"Tensor {proto.name!r} holds fewer or other values than its dimensions "
            f"{list(shape)} need: {error}"
        ) from error


@dataclass(frozen=True, eq=False)
class _Message:
    """Values that a message of the source file describes, whether it holds them or not."""

    proto: TensorProto

    @property
    def elem_type(self) -> int:
        """ONNX element type."""
        return int(self.proto.data_type)

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return tuple(self.proto.dims)


@dataclass(frozen=True, eq=False)
class TensorPayload(_Message):
    """Values held by a message of the source file."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the file; counting them takes as long as writing them."""
        return int(self.proto.ByteSize())

    def array(self) -> Array:
        """The values."""
        return _decoded(self.proto)

    def tensor(self, name: str) -> TensorProto:
        """The same message, renamed only if the name differs."""
        if self.proto.name == name:
            return self.proto
        renamed = TensorProto()
        renamed.CopyFrom(self.proto)
        renamed.name = name
        return renamed


@dataclass(frozen=True, eq=False)
class SparsePayload:
    """Values held by a sparse message; everything absent is zero."""

    proto: onnx.SparseTensorProto

    @property
    def elem_type(self) -> int:
        """ONNX element type."""
        return int(self.proto.values.data_type)

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions of the dense array."""
        return tuple(self.proto.dims)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(self.proto.ByteSize())

    def array(self) -> Array:
        """The values, dense."""
        values, indices = _decoded(self.proto.values), _decoded(self.proto.indices)
        try:
            dense = np.zeros(self.shape, values.dtype)
            if indices.ndim == 2:
                dense[tuple(indices.T)] = values
            else:
                dense.reshape(-1)[indices] = values
        except (IndexError, ValueError, TypeError, MemoryError) as error:
            raise InvalidModelError(
                f"Sparse tensor {self.proto.values.name!r}: values, indices and dimensions "
                f"{list(self.shape)} do not fit together: {error}"
            ) from error
        return dense

    def tensor(self, name: str) -> TensorProto:
        """A dense message."""
        return ArrayPayload(self.array()).tensor(name)


@dataclass(frozen=True, eq=False)
class ArrayPayload:
    """New values, from a pass."""

    values: Array

    @property
    def elem_type(self) -> int:
        """ONNX element type."""
        return onnx_elem_type(self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        if self.values.dtype == object:
            return sum(len(item) + 2 for item in self.values.reshape(-1))
        if self.elem_type in _PACKED_BITS:
            return stored_bytes(self.elem_type, self.values.size)
        return values_bytes(self.values)

    def array(self) -> Array:
        """The values."""
        return self.values

    def tensor(self, name: str) -> TensorProto:
        """A message with the values in the fewest bytes."""
        if self.values.dtype == object:
            return helper.make_tensor(
                name, TensorProto.STRING, self.shape, list(self.values.reshape(-1))
            )
        return new_tensor(self.values, name)

    def described(self, name: str) -> TensorProto:
        """The message of `tensor` without its raw data, for values that are no varints or texts."""
        message = TensorProto(dims=self.shape, data_type=self.elem_type)
        if name:
            message.name = name
        return message

    @property
    def is_raw(self) -> bool:
        """Whether the values in memory are the raw data of a message."""
        plain = self.values.dtype != object and self.elem_type not in _PACKED_BITS
        return plain and sys.byteorder == "little"


class Source(Protocol):
    """An open file."""

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Some of its bytes in pieces of at most `CHUNK_BYTES`."""
        ...


@dataclass(frozen=True, eq=False)
class FilePayload(_Message):
    """Values that stayed in the model's own file, read when asked for.

    Attributes:
        proto: the message of the file without them.
        source: the file.
        offset: first byte of the raw data.
        length: bytes.
    """

    source: Source
    offset: int
    length: int

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the file."""
        tag_and_length = 1 + -(-self.length.bit_length() // 7)
        return int(self.proto.ByteSize()) + tag_and_length + self.length

    def chunks(self) -> Iterator[bytes]:
        """The raw data in pieces of at most `CHUNK_BYTES`."""
        return self.source.chunks(self.offset, self.length)

    def array(self) -> Array:
        """The values, read now."""
        if self.elem_type in _PACKED_BITS or self.elem_type == TensorProto.STRING:
            return _decoded(self.tensor(self.proto.name))
        # Joined pieces would be held twice.
        data, filled = bytearray(self.length), 0
        for piece in self.chunks():
            data[filled : filled + len(piece)] = piece
            filled += len(piece)
        try:
            return np.frombuffer(data, numpy_dtype(self.elem_type)).reshape(self.shape)
        except ValueError as error:
            raise InvalidModelError(
                f"Tensor {self.proto.name!r} holds fewer or other values than its dimensions "
                f"{list(self.shape)} need: {error}"
            ) from error

    def tensor(self, name: str) -> TensorProto:
        """A message that holds the values, read now."""
        whole = self.described(name)
        whole.raw_data = b"".join(self.chunks())
        return whole

    def described(self, name: str) -> TensorProto:
        """The message of `tensor` without its raw data."""
        message = TensorProto()
        message.CopyFrom(self.proto)
        if message.name != name:  # an empty name that is present takes bytes
            message.name = name
        return message


@dataclass(frozen=True, eq=False)
class ExternalPayload(_Message):
    """Values in a file beside the model, read when asked for.

    Attributes:
        proto: the message that points there.
        path: the file.
        offset: first byte.
        length: bytes.
    """

    path: Path
    offset: int
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file beside the model."""
        return self.length

    def chunks(self) -> Iterator[bytes]:
        """The stored bytes in pieces of at most `CHUNK_BYTES`."""
        left = self.length
        with self._open() as stream:
            stream.seek(self.offset)
            while left:
                piece = stream.read(min(left, CHUNK_BYTES))
                if not piece:
                    raise self._too_short()
                left -= len(piece)
                yield piece

    def array(self) -> Array:
        """The values, read now."""
        with self._open() as stream:
            stream.seek(self.offset)
            data = stream.read(self.length)
        if len(data) != self.length:
            raise self._too_short()
        if self.elem_type in _PACKED_BITS:
            return TensorPayload(self._held(data, self.proto.name)).array()
        return np.frombuffer(data, numpy_dtype(self.elem_type)).reshape(self.shape)

    def tensor(self, name: str) -> TensorProto:
        """A message that holds the values, read now."""
        return self._held(b"".join(self.chunks()), name)

    def _held(self, data: bytes, name: str) -> TensorProto:
        held = TensorProto()
        held.CopyFrom(self.proto)
        held.ClearField("external_data")
        held.ClearField("data_location")
        held.name, held.raw_data = name, data
        return held

    def _open(self) -> Any:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except OSError as error:
            raise ExternalDataError(
                f"Tensor {self.proto.name!r}: its external data {self.path} cannot be read: "
                f"{error.strerror}."
            ) from error
        return os.fdopen(descriptor, "rb")

    def _too_short(self) -> ExternalDataError:
        return ExternalDataError(
            f"Tensor {self.proto.name!r}: {self.path} ends before byte "
            f"{self.offset + self.length}; the file is truncated or belongs to another model."
        )


def external_payload(proto: TensorProto, folder: Path | None) -> ExternalPayload:
    """Resolves a message that points to external data, relative to the model's folder.

    Raises:
        ExternalDataError: if the place is absolute, climbs with ``..``, goes through a link, is
            not a regular file, or is too short.
    """
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    path = _resolve_location(proto.name, location, folder)
    size = path.stat().st_size
    if any(dimension < 0 for dimension in proto.dims):
        raise ExternalDataError(f"Tensor {proto.name!r} has negative dimensions: {proto.dims}.")
    needed = stored_bytes(proto.data_type, math.prod(proto.dims))
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", needed))
    except ValueError:
        raise ExternalDataError(
            f"Tensor {proto.name!r}: offset and length of its external data must be whole "
            f"numbers, got {entries}."
        ) from None
    if offset < 0 or length < needed or offset + length > size:
        raise ExternalDataError(
            f"Tensor {proto.name!r} needs {needed} bytes at offset {offset} (length {length}) of "
            f"{location!r}, which has {size}; the file is truncated or belongs to another model."
        )
    return ExternalPayload(proto, path, offset, needed)


def _resolve_location(name: str, location: str, folder: Path | None) -> Path:
    def refuse(reason: str) -> ExternalDataError:
        return ExternalDataError(
            f"Tensor {name!r}: external data {location!r} {reason}. It must be a plain file in or "
            "below the model's folder."
        )

    if folder is None:
        raise refuse("has no folder to be relative to; load the model by its path")
    parts = PurePosixPath(location.replace("\\", "/")).parts
    if not parts or "\0" in location:
        raise refuse("is not a path")
    if location.startswith(("/", "\\")) or ":" in parts[0]:
        raise refuse("is an absolute path")
    if ".." in parts:
        raise refuse("climbs out with '..'")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise refuse(f"goes through the link {path}")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise refuse("is not a regular file")
    return path


def sparse_payload(values: Array) -> SparsePayload:
    """A sparse form of a dense array: linear INT64 indices of every element that is not +0.0.

    Negative zeros count as values, so that the dense array comes back bit for bit.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    bits = flat.view(np.dtype(f"u{flat.dtype.itemsize}"))
    indices = np.flatnonzero(bits)
    proto = onnx.SparseTensorProto(dims=values.shape)
    proto.values.CopyFrom(numpy_helper.from_array(flat[indices]))
    # int64_data is written as varints of 1 to 5 bytes where raw data takes 8 for each index.
    proto.indices.data_type = TensorProto.INT64
    proto.indices.dims.append(len(indices))
    proto.indices.int64_data.extend(indices.tolist())
    return SparsePayload(proto)


def flat_pieces(payload: Payload) -> Iterator[Array]:
    """The values one after the other, in pieces of at most `CHUNK_BYTES` if they are in a file.

    Raises:
        InvalidModelError, ExternalDataError: they are incomplete.
    """
    dtype = numpy_dtype(payload.elem_type)
    whole = payload.elem_type not in (*_PACKED_BITS, TensorProto.STRING)
    if (
        whole
        and isinstance(payload, FilePayload | ExternalPayload)
        and payload.length == math.prod(payload.shape) * dtype.itemsize
    ):
        for piece in payload.chunks():
            yield np.frombuffer(piece, dtype)
        return
    yield payload.array().reshape(-1)


__all__ = [
    "CHUNK_BYTES",
    "MOST_VARINTS",
    "Array",
    "ArrayPayload",
    "ExternalPayload",
    "FilePayload",
    "Payload",
    "SparsePayload",
    "TensorPayload",
    "external_payload",
    "flat_pieces",
    "new_tensor",
    "numpy_dtype",
    "onnx_elem_type",
    "sparse_payload",
    "stored_bytes",
    "values_bytes",
]
