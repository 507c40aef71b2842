"""A network of ResNet-50's size, pruned to 20% and clustered: files, loading, outputs.

    python benchmarks/storage_resnet.py [--runs 5] [--image 64] [--zstd]

The network is made here: the layers of ResNet-50 (He et al. 2016, table 1) with batch
normalization folded away and random weights, which are pruned and clustered by our own passes.
Beside the stored files stands int8 QDQ by `quantize-static`. Load is CPU time of creating a session
on one thread and by how much memory grows meanwhile, in fresh processes, the best of `--runs`;
`load again` in a process that has loaded such files before and has its memory, median. `run` is the
median time of a run. All files in turn; ratios are to the dense float32 file.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import zstandard
from loading import measure_loads, measure_runs
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, Pass
from onnxslim_passes.passes.cluster_weights import ClusterWeights
from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]

STAGES = ((3, 64, 256), (4, 128, 512), (6, 256, 1024), (3, 512, 2048))


class Builder:
    """Nodes and random weights of a network."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def add(self, op: str, *inputs: str, **attrs: Any) -> str:
        """A node; the name of its output."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attrs))
        return name

    def weight(self, shape: tuple[int, ...], scale: float) -> str:
        """A Laplacian weight."""
        name = f"w{len(self.weights)}"
        values = self._rng.laplace(0, scale, shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, x: str, shape: tuple[int, int, int], stride: int = 1) -> str:
        """A convolution: output channels, input channels, kernel."""
        outputs, inputs, kernel = shape
        weight = self.weight((outputs, inputs, kernel, kernel), 0.7 / (inputs * kernel**2) ** 0.5)
        bias = self.weight((outputs,), 0.01)
        pads = [kernel // 2] * 4
        strides = [stride, stride]
        return self.add("Conv", x, weight, bias, pads=pads, strides=strides)

    def block(self, x: str, inputs: int, inner: int, outputs: int, stride: int) -> str:
        """A bottleneck with its shortcut."""
        y = self.add("Relu", self.conv(x, (inner, inputs, 1)))
        y = self.add("Relu", self.conv(y, (inner, inner, 3), stride))
        y = self.conv(y, (outputs, inner, 1))
        if inputs != outputs:
            x = self.conv(x, (outputs, inputs, 1), stride)
        return self.add("Relu", self.add("Add", x, y))


def resnet(image: int) -> Model:
    """The network, 25.5 million weights."""
    net = Builder()
    x = net.add("Relu", net.conv("image", (64, 3, 7), 2))
    x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for number, (blocks, inner, outputs) in enumerate(STAGES):
        for block in range(blocks):
            stride = 2 if number and not block else 1
            x = net.block(x, channels, inner, outputs, stride)
            channels = outputs
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    net.add("Gemm", x, net.weight((1000, 2048), 0.02), net.weight((1000,), 0.01), transB=1)
    graph = helper.make_graph(
        net.nodes,
        "resnet",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, image, image])],
        [helper.make_tensor_value_info(net.nodes[-1].output[0], TensorProto.FLOAT, ["N", 1000])],
        net.weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    return Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def applied(model: Model, passes: list[Pass], samples: Samples) -> Model:
    """A copy after some passes."""
    copy = model.copy()
    for pass_ in passes:
        pass_.apply(copy, Context(samples=samples, reference=model))
    return copy


def warm_load_s(files: dict[str, Path], runs: int) -> dict[str, float]:
    """Median CPU seconds of creating a session of each file, in turn in one process."""
    times: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(runs):
        for name, path in files.items():
            start = time.process_time()
            with open_session(path):
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--image", type=int, default=64, help="height and width of the input")
    parser.add_argument("--zstd", action="store_true", help="sizes after zstd -19, too: minutes")
    options = parser.parse_args()
    original = resnet(options.image)
    feed = {"image": np.random.default_rng(1).normal(size=(2, 3, options.image, options.image))}
    feed = {"image": feed["image"].astype(np.float32)}
    samples = Samples.from_feeds([feed])
    lossy: list[Pass] = [
        PruneMagnitude(sparsity=0.8, include=("w*",)),
        ClusterWeights(clusters=17),
    ]
    dense = applied(original, lossy, samples)
    models = {"float32": dense, "int8 QDQ": applied(original, [QuantizeStatic()], samples)}
    for level in ("portable", "compact", "smallest"):
        models[f"stored, {level}"] = applied(dense, [StoreWeights(level=level)], samples)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{at}.onnx" for at, name in enumerate(models)}
        for name, model in models.items():
            files[name].write_bytes(model.to_proto().SerializeToString())
        _print(files, feed, options.runs, zstd=options.zstd)


def _print(files: dict[str, Path], feed: dict[str, Array], runs: int, *, zstd: bool) -> None:
    compressor = zstandard.ZstdCompressor(level=19)
    loads, warm = measure_loads(files, runs), warm_load_s(files, runs)
    seconds = measure_runs(files, feed, 3 * runs)
    dense = "float32"
    expected = open_session(files[dense]).run(feed)
    table = Table(title="ResNet-50's layers, density 20%, 16 values beside zero in each")
    headings = ("MB", "zstd, MB", "ratio", "load CPU s", "peak MB", "load again", "run", "outputs")
    for heading in ("file", *headings):
        table.add_column(heading)
    for name, path in files.items():
        given = open_session(path).run(feed)
        same = all(given[key].tobytes() == expected[key].tobytes() for key in expected)
        size, load = path.stat().st_size, loads[name]
        table.add_row(
            name,
            f"{size / 1e6:.2f}",
            f"{len(compressor.compress(path.read_bytes())) / 1e6:.2f}" if zstd else "",
            f"{files[dense].stat().st_size / size:.1f}x",
            f"{load.cpu_s:.2f}, {load.cpu_s / loads[dense].cpu_s:.1f}x",
            f"{load.peak_mb:.0f}",
            f"{warm[name]:.2f}, {warm[name] / warm[dense]:.1f}x",
            f"{seconds[name] / seconds[dense]:.2f}x",
            "same bits" if same else "differ",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
