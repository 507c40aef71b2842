"""From a file, bytes or a message to a model; external data is left where it is until read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message

from onnxslim_passes.errors import InvalidModelError, UnsupportedModelError
from onnxslim_passes.model.importing import DEFAULT_DOMAINS
from onnxslim_passes.model.model import Model
from onnxslim_passes.model.wire import lift

# Fields that hold tensors and are copied from file to file as they are.
_KEPT_VERBATIM = frozenset(
    {"training_info", "sparse_initializer", "sparse_tensor", "sparse_tensors", "tensors"}
)


def load(source: str | Path | bytes | onnx.ModelProto) -> Model:
    """Loads any ONNX model; external data is not read before it is needed.

    Args:
        source: a path, the bytes of a file, or a message (which is copied).

    Raises:
        InvalidModelError: not an ONNX model, or truncated.
        ExternalDataError: external data is missing, too short or outside of the model's folder.
        UnsupportedModelError: external data in a place that saving would not take along.
    """
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        return Model.from_proto(_checked(proto, "the given message"))
    if isinstance(source, bytes):
        return Model.from_proto(_parse(source, "the given bytes"))
    path = Path(source)
    try:
        lifted = lift(path)
        if lifted is not None:
            proto = _checked(lifted.proto, str(path))
            return Model.from_proto(proto, path.parent.absolute(), path, lifted.payload)
        data = path.read_bytes()
    except DecodeError as error:
        raise _not_a_model(str(path), error) from error
    except OSError as error:
        raise InvalidModelError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:  # a null character
        raise InvalidModelError(f"{str(path)!r}: cannot be read: {error}.") from error
    # Absolute: external data is read later, when the process may work in another folder.
    return Model.from_proto(_parse(data, str(path)), path.parent.absolute(), path)


def _parse(data: bytes, label: str) -> onnx.ModelProto:
    if not data:
        raise InvalidModelError(f"{label}: the file is empty; expected an ONNX model.")
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise _not_a_model(label, error) from error
    return _checked(proto, label)


def _not_a_model(label: str, error: DecodeError) -> InvalidModelError:
    return InvalidModelError(f"{label}: not an ONNX model, or a truncated one (protobuf: {error}).")


def _checked(proto: onnx.ModelProto, label: str) -> onnx.ModelProto:
    """Refuses what parses by chance but is no model."""
    if not proto.HasField("graph") or not (proto.ir_version or proto.opset_import):
        raise InvalidModelError(f"{label}: not an ONNX model: no graph or no versions in it.")
    if not proto.graph.output:
        raise InvalidModelError(
            f"{label}: its graph has no outputs; the file is truncated or not a model."
        )
    if not proto.opset_import:
        raise InvalidModelError(
            f"{label}: it does not say which operator set it uses (opset_import is empty)."
        )
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not 1 <= entry.version <= newest:
            raise InvalidModelError(
                f"{label}: opset {entry.version} is not one the installed onnx "
                f"{onnx.__version__} knows (1 to {newest}); export with a known one or update onnx."
            )
    _check_messages(proto, label)
    _check_domains(proto, label)
    return proto


def _check_messages(proto: onnx.ModelProto, label: str) -> None:
    """Refuses damaged text, and external data where nothing would take it along on saving."""
    pending: list[tuple[Any, bool]] = [(proto, False)]
    while pending:
        message, verbatim = pending.pop()
        if isinstance(message, onnx.TensorProto):  # its other fields may be huge
            _refuse_bytes((message.name, message.doc_string), label)
            if verbatim and message.data_location == onnx.TensorProto.EXTERNAL:
                raise UnsupportedModelError(
                    f"{label}: tensor {message.name!r} has external data inside of training "
                    "information, a sparse tensor or a list of tensors, which is not supported; "
                    "save the model with all data in one file first (onnx.load, onnx.save)."
                )
            continue
        for field, value in message.ListFields():
            if field.type == field.TYPE_STRING:
                _refuse_bytes((value,) if isinstance(value, str | bytes) else value, label)
            elif field.type == field.TYPE_MESSAGE:
                inside = verbatim or field.name in _KEPT_VERBATIM
                inner = (value,) if isinstance(value, Message) else value
                pending.extend((item, inside) for item in inner)


def _refuse_bytes(texts: Iterable[str | bytes], label: str) -> None:
    for text in texts:
        if isinstance(text, bytes):
            raise InvalidModelError(f"{label}: {text!r} is not UTF-8 text; the file is damaged.")


def _check_domains(proto: onnx.ModelProto, label: str) -> None:
    """Refuses operators of a domain whose version the model does not say."""
    known = {entry.domain for entry in proto.opset_import}
    if not known.isdisjoint(DEFAULT_DOMAINS):
        known.update(DEFAULT_DOMAINS)
    pending = list(proto.graph.node)
    while pending:
        node = pending.pop()
        if node.domain not in known:
            domain = node.domain or "ai.onnx"
            raise InvalidModelError(
                f"{label}: node {node.name or node.op_type!r} is of the domain {domain!r}, but the "
                "model does not say which version of it (opset_import); export it anew."
            )
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                pending.extend(body.node)
