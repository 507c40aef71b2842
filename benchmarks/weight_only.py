"""Prints size, fidelity, task score and speed of weight-only recipes.

    python benchmarks/weight_only.py [NAME...] [--folder ../shared/models] [--recipe NAME] ...

The folder holds `tasks.py` (a dictionary TASKS: model file, calibration feeds, metric) and the
models. SQNR is that of the worst float output on feeds that calibration has not seen
(`int8_models.py`). Speed is float time / time of the result, CPU time on one thread, the two in
turns; `load` is the CPU seconds of opening a session, of the original and of the result, whose
weights are unpacked then.
"""

import argparse
import tempfile
import time
from pathlib import Path

from int8_models import FOLDER, Case, cases

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import OnnxSlimError
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.evaluation.latency import compare_latency
from onnxslim_passes.model import load
from onnxslim_passes.passes.base import Context
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.recipe import Recipe
from onnxslim_passes.runtime import open_session

RECIPES = ("float16", "int8-weights", "int4-weights", "int4-rounded", "entropy-weights")


def load_seconds(path: Path) -> float:
    """CPU seconds of opening a session."""
    start = time.process_time()
    with open_session(path):
        return time.process_time() - start


def measure(case: Case, recipe: str, out: Path) -> str:
    """One line of the table."""
    calibration, held_out = case.split()
    model = load(case.path)
    context = Context(samples=Samples.from_feeds(calibration))
    start = time.process_time()
    for pass_ in Pipeline(Recipe.open(recipe).passes).passes:
        pass_.apply(model, context)
    seconds = time.process_time() - start
    model.save(out)
    with open_session(case.path) as reference, open_session(out) as candidate:
        sqnr = compare_outputs(reference, candidate, held_out).sqnr_db
        speed = compare_latency(reference, candidate, held_out[0], seconds=2.0).speedup
        scores = case.score(reference), case.score(candidate)
    before, after = case.path.stat().st_size / 1e6, out.stat().st_size / 1e6
    return (
        f"{case.name:20} {recipe:15} {seconds:6.1f} {before:7.2f} {after:7.2f} {sqnr:7.2f} "
        f"{scores[0]:>7} {scores[1]:>7} {speed:6.2f} "
        f"{load_seconds(case.path):6.2f} {load_seconds(out):6.2f}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--recipe", action="append", help=f"default: {', '.join(RECIPES)}")
    options = parser.parse_args()
    print(
        f"{'model':20} {'recipe':15} {'CPU s':>6} {'MB':>7} {'MB out':>7} {'SQNR dB':>7} "
        f"{'score':>7} {'after':>7} {'speed':>6} {'load':>6} {'after':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(options.folder):
            if options.names and case.name not in options.names:
                continue
            for recipe in options.recipe or RECIPES:
                try:
                    print(measure(case, recipe, Path(folder) / "out.onnx"), flush=True)
                except OnnxSlimError as error:
                    print(f"{case.name:20} {recipe:15} {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
