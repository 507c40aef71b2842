"""Bits a weight and load time, by encoding, for a pruned weight of 16 shared values.

    python benchmarks/storage_bits.py [--size 2048] [--runs 3] [--spread 0]

The weight is a square matrix of Laplacian values, of which the largest are kept and given 16
values by k-means; all others are zero. With `--spread` columns have scales whose logarithms have
that standard deviation, so that zeros stand in clumps as they do in trained networks; then codes of
gaps may be shorter than the bound. Bits count the whole model file. The entropy bound is
what an ideal code of order 0 needs for mask and values together. Load time is CPU time of
creating an ONNX Runtime session on one thread, for 100 million weights; the peak is by how much
the memory of a fresh process grows at most meanwhile.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from loading import Load, measure_loads
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from onnxslim_passes.model import Model
from onnxslim_passes.runtime import optimized_graph
from onnxslim_passes.storage import ENCODINGS
from onnxslim_passes.storage.base import Plan, Site
from onnxslim_passes.storage.choice import Offer
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.writer import Replacement, Writer, short_names

Array = npt.NDArray[Any]

DENSITIES = (0.08, 0.2, 0.5)
SITES = {
    17: Site(17, ir_version=8, functions=True),
    21: Site(21, ir_version=10, functions=True),
}


def pruned_and_shared(size: int, density: float, spread: float, clusters: int = 16) -> Array:
    """A matrix with this fraction of non-zeros and `clusters` values among them."""
    weight = np.random.default_rng(0).laplace(0, 0.02, (size, size)).astype(np.float32)
    weight *= np.random.default_rng(1).lognormal(0, spread, size).astype(np.float32)
    magnitude = np.abs(weight)
    threshold = np.quantile(magnitude, 1 - density)
    kept = weight[magnitude > threshold]
    centers = np.linspace(kept.min(), kept.max(), clusters)
    for _ in range(30):
        edges = (centers[1:] + centers[:-1]) / 2
        codes = np.searchsorted(edges, kept)
        counts = np.bincount(codes, minlength=clusters)
        sums = np.bincount(codes, kept, minlength=clusters)
        centers = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), centers))
    shared = np.zeros_like(weight)
    codes = np.searchsorted((centers[1:] + centers[:-1]) / 2, kept)
    shared[magnitude > threshold] = centers.astype(np.float32)[codes]
    return shared


def matmul_model(weight: Array, opset: int) -> Model:
    """One MatMul of an input and the weight."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", weight.shape[0]])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", weight.shape[1]])]
    nodes = [helper.make_node("MatMul", ["x", "W"], ["y"])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(weight, "W")])
    opsets = [helper.make_opsetid("", opset)]
    ir_version = SITES[opset].ir_version
    return Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version))


def stored_models(weight: Array) -> Iterator[tuple[str, int, bytes]]:
    """Encoding, opset and file of each way to store the weight; masks with and without Huffman."""
    contents = Contents(weight)
    for name, encoding in ENCODINGS.items():
        opset = 21 if name == "codebook-uint4" else 17
        best: dict[str, Offer] = {}
        for plan in encoding.plans(contents, SITES[opset]):
            coded = plan.figures.get("values") == "codebook-huffman"
            label = f"{name}, Huffman codes" if coded else name
            offer = Offer(plan, SITES[opset])
            if label not in best or offer.own_bytes < best[label].own_bytes:
                best[label] = offer
        for label, offer in best.items():
            yield label, opset, stored(weight, offer.plan, opset)


def stored(weight: Array, plan: Plan, opset: int) -> bytes:
    """The file with the weight stored by a plan, after proof that it folds to the same bits."""
    model = matmul_model(weight, opset)
    (constant,) = model.constants()
    Replacement(constant, plan.root, Writer(model, model.graph, short_names())).apply()
    proto = model.to_proto()
    folded = optimized_graph(proto, level="basic").graph
    if [node.op_type for node in folded.node] != ["MatMul"]:
        raise SystemExit(f"{plan.encoding} does not fold")
    if folded.initializer:  # a sparse one is written back as sparse
        rebuilt = numpy_helper.to_array(folded.initializer[0])
        if rebuilt.tobytes() != weight.tobytes():
            raise SystemExit(f"{plan.encoding} changes the weight")
    return bytes(proto.SerializeToString())


def measure_load(file: bytes, runs: int) -> Load:
    """Creating a session of a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(file)
        return measure_loads({"": path}, runs)[""]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the weight")
    parser.add_argument("--runs", type=int, default=3, help="sessions timed for each file")
    parser.add_argument("--spread", type=float, default=0.0, help="of the columns' scales")
    options = parser.parse_args()
    count = options.size**2
    rows: dict[tuple[str, int], list[str]] = {}
    bound, packed = [], []
    for density in DENSITIES:
        weight = pruned_and_shared(options.size, density, options.spread)
        shared = Contents(weight).shared
        assert shared is not None
        bound.append(f"{shared.entropy_bits:.3f}")
        for name, opset, file in stored_models(weight):
            bits = 8 * len(file) / count
            load = measure_load(file, options.runs)
            # Seconds for 100 M weights, bytes for one.
            cell = f"{bits:.3f} {load.cpu_s / count * 1e8:.1f}s {load.peak_mb / count * 1e6:.0f}B"
            rows.setdefault((name, opset), []).append(cell)
            if name == "dense":
                small = zstandard.ZstdCompressor(level=19).compress(file)
                packed.append(f"{8 * len(small) / count:.3f}")
    table = Table(
        title=f"Bits a weight; load: CPU s for 100 M, peak bytes for one; {count:,} weights"
    )
    for heading in ("encoding", "opset", *(f"density {d:.0%}" for d in DENSITIES)):
        table.add_column(heading)
    table.add_row("entropy bound", "", *bound)
    for (name, opset), cells in rows.items():
        cells += ["-"] * (len(DENSITIES) - len(cells))
        table.add_row(name, str(opset), *cells)
    table.add_row("zstd -19 of dense (not ONNX)", "", *packed)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
