"""Prints how the fidelity of the quantized text recogniser depends on the lines it is measured on.

    python benchmarks/text_lines.py [--folder ../shared/models] [--recipe int8-accurate] ...

The recogniser ends in a Softmax over 6,625 characters. Where two are nearly equally likely, the
least change decides, so that few places make most of the error, and SQNR differs from one set of
lines to another. Printed in dB: the 48 lines of the other benchmarks, a third of the 152 that they
leave out, all 152, and the calibration lines; the latter also for what the last Softmax takes
(without the mean of each place, which Softmax does not see).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from int8_models import FOLDER
from peers.cases import HELD_OUT_SAMPLES, load_tasks

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.model import Model, load
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.recipe import Recipe
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]
Results = Sequence[tuple[Array, Array]]

RECIPES = ("int8", "int8-accurate")
# Title -> set of lines, 0 for probabilities or 1 for scores, which lines.
COLUMNS = {
    "48 lines": ("usual", 0, 1),
    "51 others": ("others", 0, 3),
    "152": ("others", 0, 1),
    "seen": ("seen", 0, 1),
    "scores": ("seen", 1, 1),
}


def with_scores(model: Model) -> Model:
    """A copy whose outputs are the characters' probabilities and what their Softmax takes."""
    copy = model.copy()
    last = [node for node in copy.graph.nodes if node.op == "Softmax"][-1]
    copy.graph.outputs = [*copy.graph.outputs[:1], last.inputs[0]]
    return copy


def results(model: Model, lines: Sequence[Array]) -> Results:
    """Probabilities and centred scores of each line, float32 (1, places, characters)."""
    found = []
    with open_session(with_scores(model)) as session:
        for line in lines:
            likely, scores = session.run({"x": line}).values()
            found.append((likely, scores - scores.mean(-1, keepdims=True)))
    return found


def sqnr_db(expected: Results, found: Results, index: int) -> float:
    """Of all lines together, for one of the two arrays of each."""
    signal = noise = 0.0
    for left, right in zip(expected, found, strict=True):
        wanted = left[index].astype(np.float64)
        signal += float((wanted**2).sum())
        noise += float(((wanted - right[index]) ** 2).sum())
    return float(10 * np.log10(signal / noise))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--recipe", action="append", help="a name or a TOML file")
    options = parser.parse_args()
    tasks = load_tasks(options.folder)
    source = load(options.folder / tasks.TASKS["ppocr_v4_rec"].model)
    calibration = [line for line, _ in tasks.text_lines("ocr_calib40.npz")]
    lines = [line for line, _ in tasks.text_lines("ocr_lines.npz")]
    usual = {i * len(lines) // HELD_OUT_SAMPLES for i in range(HELD_OUT_SAMPLES)}
    others = [line for i, line in enumerate(lines) if i not in usual]
    sets = {"usual": [lines[i] for i in sorted(usual)], "others": others, "seen": calibration}
    expected = {name: results(source, chosen) for name, chosen in sets.items()}
    samples = Samples.from_feeds([{"x": line} for line in calibration])
    print(f"{'recipe':16}", *(f"{title:>9}" for title in COLUMNS))
    for recipe in options.recipe or RECIPES:
        done = Pipeline(Recipe.open(recipe).passes).run(source, samples=samples, measure=False)
        found = {name: results(done.model, chosen) for name, chosen in sets.items()}
        figures = [
            sqnr_db(expected[name][::step], found[name][::step], index)
            for name, index, step in COLUMNS.values()
        ]
        print(f"{recipe:16}", *(f"{db:9.2f}" for db in figures), flush=True)


if __name__ == "__main__":
    main()
