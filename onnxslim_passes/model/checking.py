"""ONNX's own checker on a model of any size."""

import tempfile
from pathlib import Path

import onnx

from onnxslim_passes.errors import InvalidModelError
from onnxslim_passes.model.model import Model

# Above it the checker gets a file with its values beside: a message would be held three times.
_LARGEST_MESSAGE_BYTES = 16_000_000


def check_model(model: Model) -> None:
    """Asks ONNX whether a model is valid.

    Raises:
        InvalidModelError: it is not; the message is the first line of the checker's.
    """
    try:
        if model.nbytes() <= _LARGEST_MESSAGE_BYTES:
            onnx.checker.check_model(model.to_proto())
            return
        with tempfile.TemporaryDirectory(prefix="onnxslim-passes-") as folder:
            path = Path(folder) / "model.onnx"
            model.save(path, external=True)
            onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, TypeError) as error:
        line = str(error).strip().splitlines()[0]
        raise InvalidModelError(f"the ONNX checker refuses the model: {line}") from error
