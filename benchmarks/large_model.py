"""Peak memory and time of load -> change one weight -> save for a model with external data.

    python benchmarks/large_model.py [--gigabytes 3] [--folder DIR]

Writes a chain of MatMuls with float32 weights of 16 MiB each into a temporary folder, and lets a
process of its own load it, scale one weight and save the result with external data. Prints the
peak resident memory of that process, that of the imports alone, and the seconds; then compares a
few weights of both files, and deletes everything. Needs twice the size on disk.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 2048  # each weight is (SIDE, SIDE) float32
WEIGHT_BYTES = 4 * SIDE * SIDE
TARGET_MB = 300
DATA_FILE = "weights.bin"


def write_model(path: Path, weights: int) -> None:
    """Streams a chain of `weights` MatMuls; the values repeat one random block with an offset."""
    block = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)
    with (path.parent / DATA_FILE).open("wb") as stream:
        for index in range(weights):
            np.add(block, np.float32(index), dtype=np.float32).tofile(stream)
    names = [f"W{index}" for index in range(weights)]
    tensors = [_reference(name, index * WEIGHT_BYTES) for index, name in enumerate(names)]
    nodes = [
        helper.make_node("MatMul", [f"t{index}", name], [f"t{index + 1}"])
        for index, name in enumerate(names)
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, SIDE])
        for name in ("t0", f"t{weights}")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def _reference(name: str, offset: int) -> TensorProto:
    """A tensor message that points to its bytes in the data file."""
    tensor = TensorProto(
        name=name,
        dims=(SIDE, SIDE),
        data_type=TensorProto.FLOAT,
        data_location=TensorProto.EXTERNAL,
    )
    place = {"location": DATA_FILE, "offset": offset, "length": WEIGHT_BYTES}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def touch(source: Path, target: Path) -> None:
    """What is measured; runs in a process of its own and prints its figures."""
    from onnxslim_passes.model import load

    imported_mb = _peak_mb()
    start = time.perf_counter()
    model = load(source)
    weight = model.weights()[0]
    weight.values = weight.values * np.float32(2)
    model.save(target, external=True)
    seconds = time.perf_counter() - start
    print(f"{_peak_mb():.0f} {imported_mb:.0f} {seconds:.1f}")


def _peak_mb() -> float:
    """Peak resident memory of this process in MB (ru_maxrss is KiB on Linux, bytes on macOS)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def check(source: Path, target: Path, weights: int) -> None:
    """The first weight doubled, the others (first, middle, last of them) as they were."""
    before, after = (onnx.load(path, load_external_data=False) for path in (source, target))
    for index in sorted({0, 1, weights // 2, weights - 1} & set(range(weights))):
        old = _values(before.graph.initializer[index], source.parent)
        new = _values(after.graph.initializer[index], target.parent)
        if not np.array_equal(old * (2 if index == 0 else 1), new):
            raise SystemExit(f"weight {index} has other values after saving")


def _values(tensor: TensorProto, folder: Path) -> Any:
    return numpy_helper.to_array(tensor, str(folder))


def main() -> int:
    """Makes the model, measures, checks; returns 1 if the target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the weights")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    parser.add_argument("--touch", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.touch:
        touch(*options.touch)
        return 0
    weights = max(2, round(options.gigabytes * 1e9 / WEIGHT_BYTES))
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        source, target = folder / "model.onnx", folder / "out" / "touched.onnx"
        target.parent.mkdir()
        write_model(source, weights)
        command = [sys.executable, __file__, "--touch", str(source), str(target)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peak, imported, seconds = map(float, done.stdout.split())
        check(source, target, weights)
    finally:
        shutil.rmtree(folder)
    print(f"model: {weights} weights, {weights * WEIGHT_BYTES / 1e9:.2f} GB of external data")
    print(f"peak memory: {peak:.0f} MB ({imported:.0f} MB of it after the imports)")
    print(f"load, change one weight, save: {seconds:.1f} s")
    print(f"target: at most {TARGET_MB} MB: {'met' if peak <= TARGET_MB else 'missed'}")
    return 0 if peak <= TARGET_MB else 1


if __name__ == "__main__":
    sys.exit(main())
