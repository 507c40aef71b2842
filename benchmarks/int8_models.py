"""Prints size, fidelity, task score and speed of 8-bit models: the ready int8 recipes.

    python benchmarks/int8_models.py [NAME...] [--folder ../shared/models] [--recipe int8] ...

The folder holds `tasks.py` (a dictionary TASKS: model file, calibration feeds, metric) and the
models. Speed is float time / int8 time of one feed, CPU time on one thread, the two in turns.
SQNR is that of the worst float output, on calibration feeds that were left out of calibration.
"""

import argparse
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import OnnxSlimError
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.evaluation.latency import compare_latency
from onnxslim_passes.model import load
from onnxslim_passes.passes.base import Context, Stage
from onnxslim_passes.recipe import Recipe
from onnxslim_passes.runtime import open_session

Feed = dict[str, Any]

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "models"
RECIPES = ("int8", "int8-dynamic", "int8-accurate")
HELD_OUT = 4  # every fourth feed is for measuring


@dataclass
class Case:
    """A model with its data."""

    name: str
    path: Path
    feeds: list[Feed]
    metric: Any = None

    def split(self) -> tuple[list[Feed], list[Feed]]:
        """Feeds to calibrate with, and others to measure on."""
        held_out = self.feeds[HELD_OUT - 1 :: HELD_OUT]
        kept = [feed for i, feed in enumerate(self.feeds) if i % HELD_OUT != HELD_OUT - 1]
        return kept, held_out or kept


def load_tasks(folder: Path) -> ModuleType:
    """The folder's tasks.py."""
    spec = importlib.util.spec_from_file_location("tasks", folder / "tasks.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder} has no tasks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tasks"] = module
    spec.loader.exec_module(module)
    return module


def cases(folder: Path) -> Iterator[Case]:
    """Every model of the tasks, the text detector, and the speech detector inside of an If."""
    tasks = load_tasks(folder)
    for name, task in tasks.TASKS.items():
        feeds = list(itertools.islice(task.calibration(), 64))
        yield Case(name, folder / task.model, feeds, task.metric)
    pages = np.load(folder / "data" / "det_pages.npz")
    pages = pages[pages.files[0]].astype(np.float32) / 255
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
    deviation = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
    feeds = [{"x": page[None]} for page in (pages - mean) / deviation]
    yield Case("ppocr_v4_det", folder / "robust" / "ppocr_v4_det.onnx", feeds)
    speech = tasks.TASKS["silero_vad_16k_op15"]
    feeds = list(itertools.islice(speech.calibration(), 64))
    branches = folder / "robust" / "silero_vad_op18_ifless.onnx"
    yield Case("silero_vad_op18", branches, feeds, speech.metric)


def measure(case: Case, recipe: str, out: Path) -> str:
    """One line of the table."""
    calibration, held_out = case.split()
    model = load(case.path)
    context = Context(samples=Samples.from_feeds(calibration))
    start = time.process_time()
    taken = 0
    for pass_ in Recipe.open(recipe).passes:
        if pass_.stage == Stage.QUANTIZE and context.floating is None:
            context = replace(context, floating=model.copy())
        if pass_.name.startswith("quantize"):
            decisions = pass_.apply(model, context).decisions
            taken += sum(decision.taken and "weights" in decision.figures for decision in decisions)
        else:
            pass_.apply(model, context)
    seconds = time.process_time() - start
    model.save(out)
    with open_session(case.path) as reference, open_session(out) as candidate:
        sqnr = compare_outputs(reference, candidate, held_out).sqnr_db
        speed = compare_latency(reference, candidate, held_out[0], seconds=2.0).speedup
        scores = ("", "")
        if case.metric is not None:
            scores = tuple(f"{case.metric(s.raw):.2f}" for s in (reference, candidate))
    before, after = case.path.stat().st_size / 1e6, out.stat().st_size / 1e6
    return (
        f"{case.name:20} {recipe:13} {seconds:6.1f} {before:7.2f} {after:7.2f} {taken:6} "
        f"{sqnr:7.2f} {scores[0]:>7} {scores[1]:>7} {speed:6.2f}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    options = parser.parse_args()
    print(
        f"{'model':20} {'recipe':13} {'CPU s':>6} {'MB':>7} {'MB out':>7} {'taken':>6} "
        f"{'SQNR dB':>7} {'score':>7} {'after':>7} {'speed':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(options.folder):
            if options.names and case.name not in options.names:
                continue
            for recipe in options.recipe or RECIPES:
                try:
                    print(measure(case, recipe, Path(folder) / "out.onnx"), flush=True)
                except OnnxSlimError as error:
                    print(f"{case.name:20} {recipe:13} {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
