"""Which releases of ONNX Runtime fold which encodings, and to the same bits.

    python benchmarks/storage_runtimes.py [--versions 1.17.3 1.20.1 newest ...] [--folder DIR]

Makes one small file for each encoding (and for each level a file of three layers), a virtual
environment for each release with `onnxruntime` from the package index, and loads every file there.
"yes": the graph that runs has only the operators of the dense model and the outputs are the same
bits; "runs": same bits, but the decoder stays in the graph; "no": the release refuses the file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from onnxslim_passes.model import Model
from onnxslim_passes.numerics.weight_formats import WeightFormat, block_layout, quantize_weight
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.store_weights import StoreWeights

Array = npt.NDArray[Any]

VERSIONS = ("1.17.3", "1.20.1", "1.23.0", "1.24.4", "newest")
OPSETS = {"codebook-uint4": 21, "codebook-uint2": 25}
# Runs in the environments, which have nothing but onnxruntime and numpy.
_JUDGE = """
import json, sys
import numpy as np
import onnxruntime
def load(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = path + ".optimized"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, open(path + ".optimized", "rb").read()
DECODERS = [b"Gather", b"Cast", b"CumSum", b"ScatterElements", b"Expand", b"Compress", b"Sub"]
feed = {"x": np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)}
found = {"version": onnxruntime.__version__}
for name, (dense, stored) in json.load(open(sys.argv[1])).items():
    try:
        expected = load(dense)[0].run(None, feed)[0].tobytes()
        session, graph = load(stored)
        same = session.run(None, feed)[0].tobytes() == expected
        left = any(op in graph for op in DECODERS)
        found[name] = "other bits" if not same else "runs" if left else "yes"
    except Exception:  # releases have exceptions of their own, and all mean that it does not run
        found[name] = "no"
print(json.dumps(found))
"""


def weights() -> dict[str, Array]:
    """A weight for each encoding, of shape (96, 64), for which it is worth something."""
    rng = np.random.default_rng(0)
    shape = (96, 64)
    table = rng.normal(size=200).astype(np.float32)
    few, many = table[rng.integers(0, 14, shape)], table[rng.integers(0, 200, shape)]
    noise = rng.normal(size=shape).astype(np.float32)
    kept = rng.random(shape)
    skewed = table[np.minimum(rng.geometric(0.6, shape), 14)]
    zero = np.float32(0)
    blocks = block_layout(shape, 0, 32)
    return {
        "dense": noise,
        "sparse": np.where(kept < 0.1, noise, zero),
        "fill": np.full(shape, 0.5, np.float32),
        "narrow": noise.astype(np.float16).astype(np.float32),
        "codebook-uint8": many,
        "codebook-uint4": few,
        "codebook-uint2": table[rng.integers(0, 4, shape)],
        "codebook-packed": few,
        "codebook-sparse": np.where(kept < 0.05, few, zero),
        "codebook-huffman": skewed,
        "codebook-vectors": noise.reshape(-1, 4)[rng.integers(0, 60, 96 * 16)].reshape(shape),
        "bitmask": np.where(kept < 0.7, noise, zero),
        "rice": np.where(kept < 0.1, noise, zero),
        "gaps-huffman": np.where((kept < 0.5) & (np.arange(64) < 9), few, zero),
        "grid": quantize_weight(noise, blocks, WeightFormat(4, "asymmetric", 4)),
    }


def mlp(first: Array, opset: int) -> Model:
    """Three MatMuls, the first one with this weight."""
    rng = np.random.default_rng(1)
    shapes = [(64, 64), (64, 16)]
    others = [np.where(rng.random(s) < 0.2, rng.integers(-3, 4, s), 0) for s in shapes]
    arrays = {"w0": first, "w1": others[0], "w2": others[1]}
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("MatMul", ["h", "w1"], ["i"]),
        helper.make_node("MatMul", ["i", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    ir_version = 8 if opset < 21 else 10 if opset < 25 else 12
    return Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version))


def cases() -> Iterator[tuple[str, Model, StoreWeights]]:
    """Name, dense model and how it is stored."""
    for name, weight in weights().items():
        alone = StoreWeights(encodings=(name, "codebook-packed"), include=("w0",))
        yield name, mlp(weight, OPSETS.get(name, 17)), alone
    rice = weights()["rice"]
    yield "rice, strip_safe", mlp(rice, 17), StoreWeights(strip_safe=True, include=("w0",))
    for level in ("portable", "compact", "smallest"):
        yield f"level={level}", mlp(rice, 17), StoreWeights(level=level)


def make_files(folder: Path) -> dict[str, tuple[str, str]]:
    """Dense and stored file of each case."""
    files = {}
    for number, (name, model, storing) in enumerate(cases()):
        dense, stored = folder / f"{number}_dense.onnx", folder / f"{number}.onnx"
        onnx.save(model.to_proto(), dense)
        result = storing.apply(model, Context())
        if name in storing.allowed and name != "dense":
            taken = {str(decision.figures.get("encoding")) for decision in result.decisions}
            if name not in taken:
                raise SystemExit(f"the file for {name} has {taken}")
        onnx.save(model.to_proto(), stored)
        files[name] = (str(dense), str(stored))
    return files


def python_with(version: str, folder: Path) -> Path:
    """The interpreter of an environment with this release; made unless it is there."""
    home = folder / f"onnxruntime-{version}"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        package = "onnxruntime" if version == "newest" else f"onnxruntime=={version}"
        # Releases before 1.19 were built for NumPy 1.
        old = version != "newest" and tuple(map(int, version.split(".")[:2])) < (1, 19)
        numpy = "numpy<2" if old else "numpy"
        subprocess.run([python, "-m", "pip", "install", "-q", package, numpy], check=True)
    return python


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--folder", type=Path, help="for the environments; kept, if given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        files = make_files(Path(temporary))
        listing = Path(temporary) / "files.json"
        listing.write_text(json.dumps(files))
        columns = []
        for version in options.versions:
            python = python_with(version, options.folder or Path(temporary))
            command = [python, "-c", _JUDGE, listing]
            columns.append(json.loads(subprocess.check_output(command)))
    table = Table(title="Folded to the dense model, bit for bit")
    table.add_column("encoding")
    for column in columns:
        table.add_column(column["version"])
    for name in files:
        table.add_row(name, *(column[name] for column in columns))
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
