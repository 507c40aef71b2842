"""Worker: opset 17 at least, then onnxruntime's `quant_pre_process`.

python -m peers.prepare_worker MODEL OUT symbolic|plain
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import onnx
from onnx import version_converter
from onnxruntime.quantization.shape_inference import quant_pre_process

OPSET = 17  # the opset that the peers' documents recommend at least


def prepare(source: Path, target: Path, *, symbolic: bool) -> None:
    """Writes the model as the peers' documents ask for it.

    `symbolic` asks for symbolic shape inference too, which fails on some models.
    """
    model = onnx.load(source)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < OPSET:
        model = version_converter.convert_version(model, OPSET)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "converted.onnx"
        onnx.save(model, converted)
        # It leaves files in the current folder, one as large as the model.
        with contextlib.chdir(folder):
            quant_pre_process(str(converted), str(target), skip_symbolic_shape=not symbolic)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]).absolute(), symbolic=sys.argv[3] == "symbolic")
