"""LeNet-300-100 at the densities of Deep Compression: what shared values cost, in whole files.

    python benchmarks/storage_lenet.py [--folder ../shared/models] [--parts FILE.onnx]

Han, Mao and Dally 2016, table 2: densities of 8%, 9% and 26%, and 32 shared values a layer (5
bits). The paper starts k-means linearly, so that its 40 times (27 kB) are to be compared with
`init=linear`. Pruned and clustered without fine-tuning; top-1 on MNIST's test set (in the folder's
`tasks.py`) shows what the values alone cost. The bound is what ideal codes of order 0 need for
masks and indices, plus tables and biases as float32; codes of gaps can be shorter, because the
zeros stand in clumps.

`--parts` prints what each part of a stored file takes instead.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from int8_models import FOLDER, load_tasks
from onnx import TensorProto
from rich.console import Console
from rich.table import Table

from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.cluster_weights import ClusterWeights
from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.runtime import open_session
from onnxslim_passes.storage.contents import Contents

DENSITIES = {784 * 300: 0.08, 300 * 100: 0.09, 100 * 10: 0.26}
CLUSTERINGS: dict[str, dict[str, Any]] = {
    "k-means, linear start (as the paper)": {"clusters": 32, "init": "linear"},
    **{f"k-means, {count} values": {"clusters": count} for count in (32, 24, 20, 16, 12, 8)},
    **{
        f"64 values, rate_weight {rate}": {"clusters": 64, "rate_weight": rate}
        for rate in (0.0005, 0.001, 0.002, 0.004, 0.01, 0.02)
    },
}


def pruned(path: Path) -> Model:
    """The network with these densities, layer by layer."""
    model = load(path)
    for weight in model.weights():
        if weight.size in DENSITIES:
            sparsity = 1 - DENSITIES[weight.size]
            PruneMagnitude(sparsity=sparsity, include=(weight.name,)).apply(model, Context())
    return model


def clustered(model: Model, options: dict[str, Any]) -> tuple[Model, list[float]]:
    """A copy with shared values, and the signal-to-noise ratio of each weight in dB."""
    copy = model.copy()
    names = tuple(weight.name for weight in copy.weights() if weight.size in DENSITIES)
    result = ClusterWeights(include=names, **options).apply(copy, Context())
    return copy, [float(each.figures["sqnr_db"]) for each in result.decisions if each.taken]


def stored_bytes(model: Model, level: str, without: str = "") -> int:
    """Of the whole file; without an encoding."""
    stored = model.copy()
    storing = StoreWeights(level=level)
    encodings = tuple(name for name in storing.allowed if name != without)
    StoreWeights(level=level, encodings=encodings).apply(stored, Context())
    return len(stored.to_proto().SerializeToString())


def bound_bytes(model: Model) -> float:
    """Masks and indices at their entropy, tables and everything else as they are."""
    total = 0.0
    for weight in model.weights():
        shared = Contents(weight.values).shared if weight.size in DENSITIES else None
        if shared is None:
            total += weight.nbytes
        else:
            total += shared.entropy_bits * weight.size / 8 + shared.table.nbytes
    return total


def values_in_use(model: Model) -> str:
    """Distinct values of each layer beside zero."""
    shared = (Contents(w.values).shared for w in model.weights() if w.size in DENSITIES)
    return ", ".join(str(each.clusters - 1) for each in shared if each is not None)


def print_clusterings(folder: Path) -> None:
    """One row for each way to share values."""
    task = load_tasks(folder).TASKS["lenet300"]
    model = pruned(folder / task.model)
    dense = model.nbytes()
    table = Table(title=f"LeNet-300-100, densities 8/9/26%, float32 {dense:,} bytes")
    for heading in ("values", "in use", "SQNR dB", "top-1", "smallest", "ratio", "bound"):
        table.add_column(heading)
    top1 = task.metric(open_session(model.to_proto()).raw)
    table.add_row("pruned only", "", "", f"{top1:.2f}", "", "", "")
    for name, options in CLUSTERINGS.items():
        shared, ratios = clustered(model, options)
        size, top1 = (
            stored_bytes(shared, "smallest"),
            task.metric(open_session(shared.to_proto()).raw),
        )
        table.add_row(
            name,
            values_in_use(shared),
            ", ".join(f"{ratio:.1f}" for ratio in ratios),
            f"{top1:.2f}",
            f"{size:,}",
            f"{dense / size:.1f}x",
            f"{bound_bytes(shared):,.0f}",
        )
    Console(width=140).print(table)
    shared, _ = clustered(model, {"clusters": 32, "init": "linear"})
    for level in ("portable", "compact", "smallest"):
        size = stored_bytes(shared, level)
        print(f"linear start, level={level}: {size:,} bytes, {dense / size:.1f}x")
    size = stored_bytes(shared, "smallest", without="gaps-huffman")
    print(f"linear start, level=smallest without gaps-huffman: {size:,} bytes")


def print_parts(path: Path) -> None:
    """Bytes of one file by what they are for; tags and lengths of messages included."""
    proto = onnx.load(path)
    graph, parts = proto.graph, Counter[str]()
    kinds = {TensorProto.UINT8: "streams of bits and bytes", TensorProto.FLOAT: "floats"}
    for tensor in graph.initializer:
        bare = TensorProto(dims=tensor.dims, data_type=tensor.data_type, name=tensor.name)
        parts[kinds.get(tensor.data_type, "whole numbers")] += tensor.ByteSize() - bare.ByteSize()
        parts["types, shapes and names of tensors"] += bare.ByteSize() + 3
    for node in graph.node:
        parts["calls of functions" if node.domain else f"nodes: {node.op_type}"] += (
            node.ByteSize() + 2
        )
    for function in proto.functions:
        parts["functions"] += function.ByteSize() + 4
    for field in ("input", "output", "value_info"):
        for info in getattr(graph, field):
            parts[f"declarations: {field}"] += info.ByteSize() + 2
    for entry in proto.metadata_props:
        parts[f"metadata: {entry.key}"] += entry.ByteSize() + 4
    total = proto.ByteSize()
    parts["the rest"] = total - parts.total()
    table = Table(title=f"{path.name}: {total:,} bytes")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for part, size in parts.most_common():
        table.add_row(part, f"{size:,}")
    Console(width=100).print(table)


def main() -> None:
    """Prints the table, or the parts of a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--parts", type=Path, help="a stored file to be broken down")
    options = parser.parse_args()
    if options.parts is not None:
        print_parts(options.parts)
    else:
        print_clusterings(options.folder)


if __name__ == "__main__":
    main()
