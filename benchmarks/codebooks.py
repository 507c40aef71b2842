"""Prints size, fidelity, task score and load time of codebooks on a model, beside the goals.

    python benchmarks/codebooks.py [NAME] [--folder ../shared/models] [--options TEXT] ...

NAME is a model of `tasks.py`, by default minilm_l6, a transformer half of which is an embedding.
Each line is `cluster-weights` with these options, without any pruning, and `store-weights`. `MB` is
the whole file. SQNR is that of the worst float output on feeds that were left out of calibration
(every fourth). `CPU s` are those of both passes, `load` those of opening a session.

The goals, for minilm_l6 and 4 bits a weight: at most 12.5 MB, and a score within 1 of float's.
"""

import argparse
import tempfile
import time
from pathlib import Path

from int8_models import FOLDER, Case, cases
from weight_only import load_seconds

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.model import load
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.recipe import parse_pass
from onnxslim_passes.runtime import open_session

MB_GOAL, LOSS_GOAL = 12.5, 1.0
VARIANTS = (
    "bits=4",
    "bits=4,scales=channel,weighting=none",
    "bits=4,scales=channel",
    "bits=4,scales=channel,group=2",
    "bits=3,scales=channel",
    "bits=2,scales=channel,group=4",
)


def measure(case: Case, options: str, out: Path, float_score: float) -> str:
    """One line of the table."""
    calibration, held_out = case.split()
    model = load(case.path)
    context = Context(samples=Samples.from_feeds(calibration))
    start = time.process_time()
    for pass_ in (parse_pass(f"cluster-weights:{options}"), StoreWeights()):
        pass_.apply(model, context)
    seconds = time.process_time() - start
    model.save(out)
    with open_session(case.path) as reference, open_session(out) as candidate:
        sqnr = compare_outputs(reference, candidate, held_out).sqnr_db
        score = case.metric(candidate)
    size = out.stat().st_size / 1e6
    met = size <= MB_GOAL and score >= float_score - LOSS_GOAL
    return (
        f"{size:7.3f} {sqnr:7.2f} {score:7.2f} {score - float_score:6.2f} {seconds:6.1f} "
        f"{load_seconds(out):5.2f}  {'yes' if met else 'no ':3}  {options}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="minilm_l6")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--options", action="append", help="of cluster-weights, as --pass has them")
    chosen = parser.parse_args()
    case = next(case for case in cases(chosen.folder) if case.name == chosen.name)
    if case.metric is None:
        raise SystemExit(f"{case.name} has no metric")
    with open_session(case.path) as session:
        score = case.metric(session)
    print(f"{case.name}: {case.path.stat().st_size / 1e6:.3f} MB, score {score:.2f}")
    columns = (("MB", 7), ("SQNR dB", 7), ("score", 7), ("change", 6), ("CPU s", 6), ("load", 5))
    print(" ".join(f"{name:>{width}}" for name, width in columns), " goal options")
    with tempfile.TemporaryDirectory() as folder:
        for options in chosen.options or VARIANTS:
            print(measure(case, options, Path(folder) / "out.onnx", score), flush=True)


if __name__ == "__main__":
    main()
