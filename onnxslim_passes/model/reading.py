"""From a file, bytes or a message to a model; external data is left where it is until read."""

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxslim_passes.errors import InvalidModelError
from onnxslim_passes.model.model import Model


def load(source: str | Path | bytes | onnx.ModelProto) -> Model:
    """Loads any ONNX model; external data is not read before it is needed.

    Args:
        source: a path, the bytes of a file, or a message (which is copied).

    Raises:
        InvalidModelError: not an ONNX model, or truncated.
        ExternalDataError: external data is missing, too short or outside of the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        return Model.from_proto(_checked(proto, "the given message"))
    if isinstance(source, bytes):
        return Model.from_proto(_parse(source, "the given bytes"))
    path = Path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidModelError(f"{path}: cannot be read: {error.strerror}.") from error
    return Model.from_proto(_parse(data, str(path)), path.parent, path)


def _parse(data: bytes, label: str) -> onnx.ModelProto:
    if not data:
        raise InvalidModelError(f"{label}: the file is empty; expected an ONNX model.")
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise InvalidModelError(
            f"{label}: not an ONNX model, or a truncated one (protobuf: {error})."
        ) from error
    return _checked(proto, label)


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
    return proto
