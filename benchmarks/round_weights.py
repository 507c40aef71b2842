"""Prints what rounding by the Hessian gains over rounding to nearest, on the models of tasks.py.

    python benchmarks/round_weights.py [--folder ../shared/models] [NAME[:OPTIONS]...]

OPTIONS are those of the pass, as in a recipe: `minilm_l6:bits=4,per=block`. Only the weights are
rounded, and everything runs in float, so that the figures are those of the rounding alone: the SQNR
of the worst float output on feeds that were left out of calibration, the task's score, and CPU
seconds of the pass. `layers` is the median gain in SQNR of a layer's own output, on the samples.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from int8_models import FOLDER, Case, cases

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.model import Model, load
from onnxslim_passes.numerics.rounding import full_grids, nearest
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.fold_constants import FoldConstants
from onnxslim_passes.passes.round_weights import RoundWeights
from onnxslim_passes.passes.rounded_layers import RoundedLayer
from onnxslim_passes.recipe import parse_pass
from onnxslim_passes.runtime import open_session

SPECS = (
    "minilm_l6:bits=8",
    "minilm_l6:bits=4",
    "minilm_l6:bits=4,per=block",
    "minilm_l6:bits=4,per=block,symmetric=false",
    "minilm_l6:bits=3,per=block",
    "ppocr_v4_rec:bits=8",
    "ppocr_v4_rec:bits=4",
    "efficientnet_lite0:bits=8",
    "efficientnet_lite0:bits=4",
)


def round_to_nearest(model: Model, pass_: RoundWeights) -> None:
    """What quantization does by itself, on the same weights."""
    for layer in pass_._survey(model):
        if isinstance(layer, RoundedLayer):
            levels, rows = pass_._levels(layer), layer.rows()
            layer.weight.values = layer.from_rows(nearest(rows, full_grids(rows, levels), levels))


def judged(case: Case, model: Model, reference: Model, feeds: list[Any]) -> str:
    """SQNR and score."""
    with open_session(reference) as before, open_session(model) as after:
        sqnr = compare_outputs(before, after, feeds).sqnr_db
        score = "-" if case.metric is None else f"{case.metric(after):.2f}"
    return f"{sqnr:7.2f} {score:>7}"


def measure(case: Case, options: str, nearest_too: bool) -> None:
    """Prints a row."""
    pass_ = parse_pass(f"round-weights:{options}" if options else "round-weights")
    assert isinstance(pass_, RoundWeights)
    reference = load(case.path)
    FoldConstants().apply(reference, Context())
    kept, held_out = case.split()
    rounded = reference.copy()
    start = time.process_time()
    result = pass_.apply(rounded, Context(samples=Samples.from_feeds(kept)))
    seconds = time.process_time() - start
    taken = [decision.figures for decision in result.decisions if decision.taken]
    gains = [float(f["sqnr_db"]) - float(f["nearest_sqnr_db"]) for f in taken]
    finite = [gain for gain in gains if np.isfinite(gain)]
    plain = f"{'':15}"
    if nearest_too:
        model = reference.copy()
        round_to_nearest(model, pass_)
        plain = judged(case, model, reference, held_out)
    print(
        f"{case.name:19} {options:36} {len(taken):5} {plain} "
        f"{judged(case, rounded, reference, held_out)} {statistics.median(finite):6.2f} "
        f"{seconds:7.1f}",
        flush=True,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="*", help="NAME[:OPTIONS]; default: a table of three models")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--no-nearest", action="store_true", help="do not judge nearest rounding")
    options = parser.parse_args()
    print(
        f"{'':19} {'':36} {'':5} {'nearest':^15} {'round-weights':^15} {'layers':>6}\n"
        f"{'model':19} {'options':36} {'taken':>5} {'SQNR dB':>7} {'score':>7} "
        f"{'SQNR dB':>7} {'score':>7} {'dB':>6} {'CPU s':>7}"
    )
    specs = [spec.partition(":") for spec in options.specs or SPECS]
    for case in cases(options.folder):
        for name, _, text in specs:
            if name == case.name:
                measure(case, text, not options.no_nearest)


if __name__ == "__main__":
    main()
