"""Prints where the time of a float model and of its 8-bit results goes, by operator.

    python benchmarks/operator_times.py [NAME...] [--folder ../shared/models] [--recipe int8] ...

ONNX Runtime's profiler, one thread, the models in turn: of each node the least time of 20 runs, in
microseconds of one run, the mean over three held-out feeds (small, middle, large). Layers are
convolutions and products; dynamic ones also find scales, round and add biases.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from int8_models import FOLDER, RECIPES, Case, cases

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.model import load
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.recipe import Recipe
from onnxslim_passes.runtime import ProfiledGraph, profile_in_turn

LISTED = 12  # operators a model
ROUNDS = 20
FLOAT_LAYERS = ("Conv", "FusedConv", "MatMul", "Gemm", "FusedGemm", "FusedMatMul")
INTEGER_LAYERS = (
    *("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    *("MatMulInteger", "ConvInteger"),
)


def by_operator(profiled: ProfiledGraph) -> Counter[str]:
    """Microseconds of each operator."""
    times: Counter[str] = Counter()
    for node in profiled.graph.node:
        times[node.op_type] += profiled.seconds.get(node.name, 0.0) * 1e6
    return times


def timed_feeds(feeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A small, a middle and a large one."""
    by_size = sorted(feeds, key=lambda feed: sum(array.nbytes for array in feed.values()))
    return [by_size[len(by_size) * part // 6] for part in (1, 3, 5)]


def measure(case: Case, recipes: list[str], folder: Path) -> None:
    """Prints a line for the float model and for each recipe."""
    calibration, held_out = case.split()
    paths = [case.path]
    for name in recipes:
        samples = Samples.from_feeds(calibration)
        done = Pipeline(Recipe.open(name).passes).run(
            load(case.path), samples=samples, measure=False
        )
        paths.append(folder / f"{name}.onnx")
        done.model.save(paths[-1])
    profiles = profile_in_turn(paths, timed_feeds(held_out), rounds=ROUNDS)
    floating = by_operator(profiles[0])
    for name, profiled in zip(["float", *recipes], profiles, strict=True):
        times = by_operator(profiled)
        layers = sum(times[op] for op in (*FLOAT_LAYERS, *INTEGER_LAYERS))
        shown = ", ".join(f"{op} {time:.0f}" for op, time in times.most_common(LISTED))
        total = times.total()
        print(
            f"{case.name} {name}: {total:.0f} us, {floating.total() / total:.2f}x; "
            f"layers {layers:.0f}, others {total - layers:.0f}"
        )
        print(f"  {shown}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(options.folder):
            if not options.names or case.name in options.names:
                measure(case, options.recipe or list(RECIPES), Path(folder))


if __name__ == "__main__":
    main()
