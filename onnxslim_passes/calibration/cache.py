"""A folder that remembers ranges, so that the same calibration is not run twice.

An entry is a JSON file named by a hash of all that its ranges depend on: the model, the data, the
tensors, the observer and its options, and the versions of this package and of ONNX Runtime. What
cannot be read, or does not hold the tensors asked for, counts as absent.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from onnxslim_passes.calibration.observers import ObserverOptions
from onnxslim_passes.calibration.ranges import TensorRange
from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import OutputError
from onnxslim_passes.model import Constant, Model

_FORMAT = 1


class RangeCache:
    """Ranges in a folder, which is made when the first entry is stored.

    Attributes:
        folder: Where the entries are.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def key(
        self,
        model: Model,
        tensors: Iterable[str],
        samples: Samples,
        observer: str,
        options: ObserverOptions,
    ) -> str:
        """What an entry is found by: 64 hexadecimal digits. Reads the samples once."""
        about = {
            "format": _FORMAT,
            "onnxruntime": version("onnxruntime"),
            "model": _model_digest(model),
            "samples": samples.fingerprint(),
            "tensors": list(tensors),
            "observer": observer,
            "options": asdict(options),
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def load(self, key: str) -> dict[str, TensorRange] | None:
        """The ranges stored under a key, or None."""
        try:
            entry = json.loads(self._file(key).read_text(encoding="utf8"))
            return {name: _restored(fields) for name, fields in entry["ranges"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # absent or damaged: both mean that the model has to be run

    def store(self, key: str, ranges: Mapping[str, TensorRange]) -> None:
        """Writes an entry; no reader ever sees half of it.

        Raises:
            OutputError: The folder cannot be written to.
        """
        entry = {"ranges": {name: _fields(found) for name, found in ranges.items()}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf8", dir=self.folder, suffix=".part", delete=False
            ) as stream:
                json.dump(entry, stream)
            Path(stream.name).replace(self._file(key))
        except OSError as error:
            raise OutputError(f"Calibration cache {str(self.folder)!r}: {error}") from error

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def _fields(found: TensorRange) -> dict[str, Any]:
    """The range for JSON, which has no NaN."""
    ends = {n: None if math.isnan(v) else v for n, v in (("lo", found.lo), ("hi", found.hi))}
    return {**asdict(found), **ends}


def _restored(fields: Mapping[str, Any]) -> TensorRange:
    """The range; raises TypeError, KeyError or ValueError for anything else."""
    low, high = (math.nan if fields[n] is None else float(fields[n]) for n in ("lo", "hi"))
    if low > high:
        raise ValueError("the ends of a range are swapped")
    return TensorRange(low, high, int(fields["seen"]), int(fields["rank"]), bool(fields["finite"]))


def _model_digest(model: Model) -> str:
    """The hash of the model's message, large values taken by themselves and not held."""
    total = hashlib.sha256()

    def write(constant: Constant) -> onnx.TensorProto:
        values = constant.values
        total.update(f"{constant.name}\0{values.dtype}\0{values.shape}\0".encode())
        total.update(values.tobytes())
        return onnx.TensorProto(
            name=constant.name, dims=constant.shape, data_type=constant.elem_type
        )

    total.update(model.export(write).SerializeToString(deterministic=True))
    return total.hexdigest()
