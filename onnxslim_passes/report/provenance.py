"""Where a result comes from: the file it was made of, and the versions that made it."""

import hashlib
import importlib.metadata
from pathlib import Path

from onnxslim_passes.model import Model

__all__ = ["source_file", "source_sha256", "versions"]


def versions() -> dict[str, str]:
    """Versions of what shapes a result."""
    names = ("onnxslim-passes", "onnx", "onnxruntime", "numpy", "scikit-learn")
    return {name: importlib.metadata.version(name) for name in names}


def source_file(model: Model) -> Path | None:
    """The file that a model came from, if it is still there."""
    return model.path if model.path is not None and model.path.is_file() else None


def source_sha256(model: Model) -> str:
    """Hash of the file a model came from, or of its message if there is none."""
    digest = hashlib.sha256()
    path = source_file(model)
    if path is not None:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    else:
        digest.update(model.to_proto().SerializeToString(deterministic=True))
    return digest.hexdigest()
