"""LeNet-300-100 at the densities of Deep Compression, whole file by level, beside the bound.

    python benchmarks/storage_lenet.py [--folder ../shared/models]

Han, Mao and Dally 2016, table 2: densities of 8%, 9% and 26%, and 32 shared values a layer (5
bits). Values, not accuracy, are what this measures: pruned and clustered without fine-tuning. The
bound is what ideal codes of order 0 need for masks and indices, plus tables and biases as float32.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.cluster_weights import ClusterWeights
from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.storage.contents import Contents

DENSITIES = {784 * 300: 0.08, 300 * 100: 0.09, 100 * 10: 0.26}


def deep_compressed(path: Path) -> Model:
    """The network pruned layer by layer and clustered."""
    model = load(path)
    for weight in model.weights():
        if weight.size in DENSITIES:
            sparsity = 1 - DENSITIES[weight.size]
            PruneMagnitude(sparsity=sparsity, include=(weight.name,)).apply(model, Context())
            ClusterWeights(clusters=32, include=(weight.name,)).apply(model, Context())
    return model


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


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("../shared/models"))
    folder = parser.parse_args().folder
    model = deep_compressed(folder / "models" / "lenet300.onnx")
    dense = len(model.to_proto().SerializeToString())
    table = Table(title="LeNet-300-100, densities 8/9/26%, 32 values a layer")
    for heading in ("file", "bytes", "ratio"):
        table.add_column(heading)
    table.add_row("dense", f"{dense:,}", "1.0x")
    for level in ("portable", "compact", "smallest"):
        stored = model.copy()
        StoreWeights(level=level).apply(stored, Context())
        size = len(stored.to_proto().SerializeToString())
        table.add_row(f"level={level}", f"{size:,}", f"{dense / size:.1f}x")
    bound = bound_bytes(model)
    table.add_row("entropy bound, no graph", f"{bound:,.0f}", f"{dense / bound:.1f}x")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
