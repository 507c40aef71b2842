"""Prints what storing costs and gives on real models: bytes, loading, running, each beside dense.

    python benchmarks/storage_models.py [NAME ...] [--folder ../shared/models] [--runs 3]

Each model is pruned and clustered (`values`), and also quantized to integers (`integers`), by the
passes shown; then stored at each level. `zstd` is the file after `zstd -19`, `load` the CPU time of
creating a session in a fresh process and `peak` by how much its memory grows meanwhile, `run` the
median time of a run, files in turn; ratios are to the dense file of the same values. `same`: every
output has the same bits as that of the dense file, and ONNX Runtime runs the same operators.
"""

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import zstandard
from int8_models import FOLDER, Case, cases
from loading import measure_loads, measure_runs

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.recipe import parse_pass
from onnxslim_passes.runtime import open_session, optimized_graph

NAMES = (
    "resnet8_cifar10",
    "minilm_l6",
    "silero_vad_16k_op15",
    "sklearn_mlp_digits",
    "ppocr_v4_rec",
)
PIPELINES = {
    "values": ("fuse-batch-norm", "prune-magnitude:sparsity=0.6", "cluster-weights:bits=5"),
    "integers": (
        "fuse-batch-norm",
        "prune-magnitude:sparsity=0.2",
        "cluster-weights:bits=4,scales=channel",
        "quantize-static",
    ),
}
LEVELS = ("portable", "compact", "smallest")


def dense_and_stored(case: Case, texts: tuple[str, ...]) -> dict[str, Model]:
    """The model after lossy passes, and its stored forms."""
    dense = load(case.path)
    samples = Samples.from_feeds(case.split()[0][:16])
    for text in texts:
        parse_pass(text).apply(dense, Context(samples=samples, reference=load(case.path)))
    models = {"dense": dense}
    for level in LEVELS:
        models[level] = dense.copy()
        StoreWeights(level=level).apply(models[level], Context())
    return models


def operators(path: Path) -> Counter[str]:
    """What ONNX Runtime runs."""
    return Counter(node.op_type for node in optimized_graph(path, weights=False).graph.node)


def print_rows(case: Case, pipeline: str, files: Mapping[str, Path], runs: int) -> None:
    """A line for each file."""
    compressor = zstandard.ZstdCompressor(level=19)
    loads = measure_loads(files, runs)
    _, held_out = case.split()
    seconds = measure_runs(files, held_out[0], 10 * runs)
    dense = files["dense"]
    expected = operators(dense)
    for name, path in files.items():
        with open_session(dense) as reference, open_session(path) as candidate:
            fidelity = compare_outputs(reference, candidate, held_out[:4])
        same = fidelity.sqnr_db == math.inf and operators(path) == expected
        size, load_ = path.stat().st_size, loads[name]
        packed = len(compressor.compress(path.read_bytes()))
        print(
            f"{case.name:18} {pipeline:8} {name:9} {size / 1e6:8.3f} {packed / 1e6:8.3f} "
            f"{dense.stat().st_size / size:6.1f}x {load_.cpu_s:6.2f} "
            f"{load_.cpu_s / loads['dense'].cpu_s:5.1f}x {load_.peak_mb:6.0f} "
            f"{load_.peak_mb / loads['dense'].peak_mb:5.1f}x "
            f"{seconds[name] / seconds['dense']:5.2f}x {'yes' if same else 'NO'}",
            flush=True,
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    for pipeline, texts in PIPELINES.items():
        print(f"{pipeline}: {'; '.join(texts)}")
    print(
        f"{'model':18} {'passes':8} {'file':9} {'MB':>8} {'zstd MB':>8} {'ratio':>7} {'load s':>6} "
        f"{'':6} {'peak MB':>6} {'':5} {'run':>6} same"
    )
    for case in (case for case in cases(options.folder) if case.name in options.names):
        for pipeline, texts in PIPELINES.items():
            with tempfile.TemporaryDirectory() as folder:
                files = {}
                for name, model in dense_and_stored(case, texts).items():
                    files[name] = Path(folder) / f"{name}.onnx"
                    model.save(files[name])
                print_rows(case, pipeline, files, options.runs)


if __name__ == "__main__":
    main()
