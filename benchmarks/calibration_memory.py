"""Prints the peak memory of each observer on 16 and on 256 samples of one model.

    python benchmarks/calibration_memory.py [NAME...] [--folder ../shared/models] [--samples 16 256]

Every run is a process of its own. What goes into and comes out of convolutions and matrix products
is measured; the samples are the model's calibration feeds, the largest first, again and again.
Without the folder of real models, or by the name stand-in, a small convolution network with random
weights and images of 16 widths stands in.

Large blocks are allocated apart (MALLOC_MMAP_THRESHOLD_, glibc): otherwise the peak varies by a
fifth between runs on the same samples, as holes in the heap happen to fall. It slows the runs down.
"""

import argparse
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from int8_models import FOLDER, Feed, cases
from onnx import TensorProto, helper, numpy_helper

from onnxslim_passes.calibration import OBSERVERS, Samples, collect_ranges
from onnxslim_passes.calibration.segments import main_tensors
from onnxslim_passes.model import Model, load

NAMES = ("ppocr_v4_rec",)
STAND_IN = "stand-in"
ALLOCATION = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}


def stand_in() -> tuple[Model, list[Feed]]:
    """Eight convolutions of 32 channels, and images of 64 x 136 down to 64 x 16."""
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer in range(8):
        shape = (32, 3 if layer == 0 else 32, 3, 3)
        values = (random.normal(size=shape) * 0.08).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last = f"r{layer}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 64, "W"])
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "stand_in", [x], [y], weights)
    opsets = [helper.make_opsetid("", 17)]
    model = load(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    widths = range(136, 8, -8)
    feeds = [{"x": random.normal(size=(1, 3, 64, w)).astype(np.float32)} for w in widths]
    return model, feeds


def opened(name: str, folder: Path) -> tuple[Model, list[Feed]]:
    """A model and its feeds."""
    if name == STAND_IN:
        return stand_in()
    case = next(case for case in cases(folder) if case.name == name)
    # Memory grows with the size of a feed: both counts must see the largest.
    return load(case.path), sorted(case.feeds, key=lambda feed: -sum(a.size for a in feed.values()))


def measure(name: str, observer: str, count: int, folder: Path) -> str:
    """Peak memory in MB of one run, and how many tensors it measured."""
    model, feeds = opened(name, folder)
    names = main_tensors(model.graph)
    around = [
        tensor.name
        for node in model.graph.nodes
        if node.op in ("Conv", "MatMul", "Gemm")
        for tensor in (*node.inputs, *node.outputs)
    ]
    tensors = [names[name] for name in dict.fromkeys(around) if name in names]
    batch = max(len(next(iter(feed.values()))) for feed in feeds)

    def repeated() -> Iterator[Feed]:
        yield from itertools.islice(itertools.cycle(feeds), -(-count // batch))

    collect_ranges(model, tensors, Samples.from_feeds(repeated), observer=observer, strict=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"{peak:.0f} {len(tensors)}"


def compare(name: str, counts: tuple[int, int], folder: Path) -> None:
    """A line for each observer."""
    for observer in OBSERVERS:
        figures = []
        for count in counts:
            command = [sys.executable, __file__, "--measure", name, observer, str(count)]
            command += ["--folder", str(folder)]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env=ALLOCATION
            )
            figures.append(done.stdout.split())
        (few, tensors), (many, _) = figures
        print(
            f"{name:20} {observer:15} {tensors:>7} {few:>8} {many:>8} {int(many) / int(few):>6.2f}",
            flush=True,
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; default: the text recogniser")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--samples", type=int, nargs=2, default=(16, 256))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, observer, count = options.measure
        print(measure(name, observer, int(count), options.folder))
        return
    few, many = options.samples
    print(
        f"{'model':20} {'observer':15} {'tensors':>7} {f'MB, {few}':>8} {f'MB, {many}':>8} "
        f"{'ratio':>6}"
    )
    available = (options.folder / "tasks.py").is_file()
    for name in options.names or (NAMES if available else (STAND_IN,)):
        compare(name, (few, many), options.folder)


if __name__ == "__main__":
    main()
