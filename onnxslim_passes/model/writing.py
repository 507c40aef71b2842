"""From a model to a file, written whole or not at all; large models are streamed."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from onnx import TensorProto, numpy_helper

from onnxslim_passes.errors import OutputError
from onnxslim_passes.model.exporting import held
from onnxslim_passes.model.ir import Constant
from onnxslim_passes.model.payload import CHUNK_BYTES, ArrayPayload, ExternalPayload, FilePayload
from onnxslim_passes.model.wire import filled

if TYPE_CHECKING:
    from onnxslim_passes.model.model import Model

# A message of 2 GiB cannot be serialized; well below it, one file is easier to handle than two.
LARGEST_SINGLE_FILE_BYTES = 1 << 30

# What protobuf can serialize, less some room for what `Model.nbytes` only estimates.
LARGEST_MESSAGE_BYTES = (1 << 31) - (1 << 20)

# Tensors smaller than this stay in the model file: readers need their values for shapes.
SMALLEST_EXTERNAL_BYTES = 1024

# Values from here on are never varints (see `payload.MOST_VARINTS`), and worth a place of their
# own.
SMALLEST_MARKED_BYTES = 1 << 14

# Pages, so that readers can map the file into memory.
ALIGNMENT_BYTES = 4096


Piece = bytes | memoryview


def save(model: "Model", path: str | Path, *, external: bool | None = None) -> None:
    """Writes a model; nothing appears at `path` before all of it is written.

    Args:
        model: stays as it is.
        path: the model file; external data goes into one file beside it, ``<path>.data``.
        external: whether values go into the second file; by default only above 1 GiB.

    Raises:
        OutputError: if it cannot be written; whatever was there before is still there.
    """
    path = Path(path)
    nbytes = model.nbytes()
    if external is None:
        external = nbytes > LARGEST_SINGLE_FILE_BYTES
    if not external and nbytes > LARGEST_MESSAGE_BYTES:
        raise OutputError(
            f"{path}: {nbytes} bytes are more than one ONNX file can hold (2 GiB); save it with "
            "external data."
        )
    data_path = path.with_name(path.name + ".data")
    _refuse_own_data(model, path, data_path)
    with _errors_named(path), _replacing(path) as stream:
        if not external:
            stream.writelines(_message(model))
            return
        if data_path.is_symlink():
            raise OutputError(f"{data_path} is a link; external data is never written through one.")
        with _replacing(data_path) as data_stream:
            proto = model.export(_DataWriter(data_stream, data_path.name))
            stream.write(proto.SerializeToString(deterministic=True))
            # All bytes of both files are on the disk before either takes the place of an old one.
            _flush(stream)


def _message(model: "Model") -> Iterator[Piece]:
    """The bytes of a model that holds all its values, large ones a piece at a time."""
    writer = _MarkWriter()
    marked = model.export(writer).SerializeToString(deterministic=True)
    pieces = filled(marked, writer.mark, writer.lengths)
    if pieces is None:
        yield model.to_proto().SerializeToString(deterministic=True)
        return
    for piece in pieces:
        if isinstance(piece, int):
            yield from _pieces(writer.marked[piece])
        else:
            yield piece


class _MarkWriter:
    """Leaves large values out of the message, with a mark in their place."""

    def __init__(self) -> None:
        self.mark = secrets.token_bytes(16)
        self.marked: list[Constant] = []
        self.lengths: list[int] = []

    def __call__(self, constant: Constant) -> TensorProto:
        payload = constant.payload
        if isinstance(payload, FilePayload):
            message, length = payload.described(constant.name), payload.length
        elif (
            isinstance(payload, ArrayPayload)
            and payload.elem_type != TensorProto.STRING
            and payload.nbytes >= SMALLEST_MARKED_BYTES
        ):
            message, length = payload.described(constant.name), payload.nbytes
        else:
            return held(constant)
        message.raw_data = self.mark + len(self.marked).to_bytes(4)
        self.marked.append(constant)
        self.lengths.append(length)
        return message


class _DataWriter:
    """Moves tensors of some size into one file, in pieces."""

    def __init__(self, stream: BinaryIO, location: str) -> None:
        self._stream = stream
        self._location = location

    def __call__(self, constant: Constant) -> TensorProto:
        payload = constant.payload
        if payload.elem_type == TensorProto.STRING or payload.nbytes < SMALLEST_EXTERNAL_BYTES:
            return held(constant)
        offset = -(-self._stream.tell() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._stream.seek(offset)
        length = 0
        for piece in _pieces(constant):
            length += self._stream.write(piece)
        proto = TensorProto(name=constant.name, dims=constant.shape, data_type=constant.elem_type)
        proto.data_location = TensorProto.EXTERNAL
        entries = {"location": self._location, "offset": str(offset), "length": str(length)}
        for key, value in entries.items():
            proto.external_data.add(key=key, value=value)
        return proto


def _pieces(constant: Constant) -> Iterator[Piece]:
    payload = constant.payload
    if isinstance(payload, ExternalPayload | FilePayload):
        yield from payload.chunks()
        return
    if isinstance(payload, ArrayPayload) and payload.is_raw:
        yield np.ascontiguousarray(payload.values).reshape(-1).view(np.uint8).data
        return
    message = held(constant)
    if not message.HasField("raw_data"):
        message = numpy_helper.from_array(payload.array(), constant.name)
    data = memoryview(message.raw_data)
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def _refuse_own_data(model: "Model", *targets: Path) -> None:
    """Values not read yet must not be replaced under the model's feet."""
    sources = {c.payload.path for c in model.constants() if isinstance(c.payload, ExternalPayload)}
    for target in targets:
        for source in sources:
            if target.exists() and source.samefile(target):
                raise OutputError(
                    f"{target} holds the external data this model still reads; save it elsewhere."
                )


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when all went well and vanishes otherwise."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("xb") as stream:
            yield stream
            _flush(stream)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
