"""State on disk: `.safetensors` files, which any language reads in a few lines.

A file is replaced whole: written beside its place, flushed to the disk, renamed. Whenever the
process ends, the old or the new one is there.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from onnxslim_passes.errors import InvalidModelError, OutputError
from onnxslim_passes.training.parameters import Array

__all__ = ["read_tensors", "write_atomically", "write_tensors"]


def write_tensors(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors, and texts beside them, in one step.

    Raises:
        OutputError: it cannot be written; what was there before still is.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    write_atomically(path, safetensors.numpy.save(arrays, metadata=dict(metadata or {})))


def write_atomically(path: Path, payload: bytes) -> None:
    """Writes a file in one step; see the module."""
    waiting = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with waiting.open("wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        waiting.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        waiting.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors and texts of a file.

    Raises:
        InvalidModelError: there is no such file, or it is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            return tensors, dict(opened.metadata() or {})
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise InvalidModelError(f"{path} cannot be read as safetensors: {error}") from error
