"""Prints size, fidelity, task score and speed of 8-bit models: the ready int8 recipes.

    python benchmarks/int8_models.py [NAME...] [--folder ../shared/models] [--recipe int8] ...
        [--pass quantize-static:placement=profile]

The folder holds `tasks.py` (a dictionary TASKS: model file, calibration feeds, metric) and the
models, as downloaded. Speed is float time / int8 time, CPU time on one thread, the two in turns, on
three held-out feeds (small, middle, large). SQNR is that of the worst float output on held-out
feeds: those of `quantization_peers.py`, without padding, where it has the model; else every fourth
calibration feed, which is left out of calibration.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from peers.cases import all_cases, load_tasks
from peers.measure import speed

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import OnnxSlimError
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.model import load
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.recipe import Recipe, parse_pass
from onnxslim_passes.runtime import Session, open_session

Feed = dict[str, Any]

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "models"
RECIPES = ("int8", "int8-dynamic", "int8-accurate")
CALIBRATION = 64  # feeds at most
HELD_OUT = 4  # every fourth feed is for measuring


@dataclass
class Case:
    """A model with its data.

    Attributes:
        feeds: for calibration.
        others: to measure on; without any, every fourth of `feeds` is left out for it.
        metric: higher is better.
    """

    name: str
    path: Path
    feeds: list[Feed]
    metric: Callable[[Session], float] | None = None
    others: list[Feed] = field(default_factory=list)

    def split(self) -> tuple[list[Feed], list[Feed]]:
        """Feeds to calibrate with, and others to measure on."""
        if self.others:
            return self.feeds, self.others
        held_out = self.feeds[HELD_OUT - 1 :: HELD_OUT]
        kept = [feed for i, feed in enumerate(self.feeds) if i % HELD_OUT != HELD_OUT - 1]
        return kept, held_out or kept

    def score(self, session: Session) -> str:
        """The metric as text, empty without one."""
        return "" if self.metric is None else f"{self.metric(session):.2f}"


def cases(folder: Path) -> Iterator[Case]:
    """Every model of the tasks, the text detector, and the speech detector inside of an If."""
    compared = all_cases(folder)
    tasks = load_tasks(folder).TASKS
    for name, task in tasks.items():
        feeds = list(itertools.islice(task.calibration(), CALIBRATION))
        if name in compared:
            known = compared[name]
            yield Case(name, known.path, feeds, known.score, list(known.held_out()))
        else:
            yield Case(name, folder / task.model, feeds, _on_raw(task.metric))
    pages = compared["ppocr_v4_det"]
    feeds = list(pages.calibration())
    yield Case(pages.name, pages.path, feeds, pages.score, list(pages.held_out()))
    speech = tasks["silero_vad_16k_op15"]
    feeds = list(itertools.islice(speech.calibration(), CALIBRATION))
    branches = folder / "robust" / "silero_vad_op18_ifless.onnx"
    yield Case("silero_vad_op18", branches, feeds, _on_raw(speech.metric))


def _on_raw(metric: Callable[[Any], float]) -> Callable[[Session], float]:
    return lambda session: float(metric(session.raw))


def measure(case: Case, recipe: Recipe, out: Path) -> str:
    """One line of the table."""
    calibration, held_out = case.split()
    pipeline = Pipeline(recipe.passes)
    start = time.process_time()
    result = pipeline.run(load(case.path), samples=Samples.from_feeds(calibration), measure=False)
    seconds = time.process_time() - start
    result.model.save(out)
    taken = sum(
        decision.taken and "weights" in decision.figures
        for record in result.report.passes
        if record.name.startswith("quantize")
        for decision in record.decisions
    )
    with open_session(case.path) as reference, open_session(out) as candidate:
        sqnr = compare_outputs(reference, candidate, held_out).sqnr_db
        gain = speed(reference, candidate, held_out)
        scores = case.score(reference), case.score(candidate)
    before, after = case.path.stat().st_size / 1e6, out.stat().st_size / 1e6
    return (
        f"{case.name:20} {recipe.name:13} {seconds:6.1f} {before:7.2f} {after:7.2f} {taken:6} "
        f"{sqnr:7.2f} {scores[0]:>7} {scores[1]:>7} {gain:6.2f}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    parser.add_argument(
        "--pass",
        action="append",
        dest="passes",
        type=parse_pass,
        default=[],
        help="in the place of the recipe's pass of the same name",
    )
    options = parser.parse_args()
    print(
        f"{'model':20} {'recipe':13} {'CPU s':>6} {'MB':>7} {'MB out':>7} {'taken':>6} "
        f"{'SQNR dB':>7} {'score':>7} {'after':>7} {'speed':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(options.folder):
            if options.names and case.name not in options.names:
                continue
            for name in options.recipe or RECIPES:
                recipe = reduce(Recipe.with_pass, options.passes, Recipe.open(name))
                try:
                    print(measure(case, recipe, Path(folder) / "out.onnx"), flush=True)
                except OnnxSlimError as error:
                    print(f"{case.name:20} {name:13} {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
