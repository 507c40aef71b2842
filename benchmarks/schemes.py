"""Prints size, fidelity and speed of pipelines given as text, on one model or several.

    python benchmarks/schemes.py NAME|FILE.onnx ... [--pipeline TEXT] ... [--target TARGET]

A pipeline is passes joined by " + ", each as `--pass` takes it; `fold-constants + fuse-batch-norm`
goes before all. Models of `tasks.py` have their calibration feeds and others to measure on, as in
`int8_models.py`; a FILE is fed random numbers, which say how pipelines compare on one model, and
nothing about the model. SQNR is that of the worst float output; speed is float time / time of the
result, CPU time on one thread, the two in turns.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from int8_models import FOLDER, Case, cases

from onnxslim_passes.calibration.random_inputs import random_feeds, shape_guesses
from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.errors import OnnxSlimError, RuntimeRefusedError
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.evaluation.latency import compare_latency
from onnxslim_passes.model import load
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.recipe import parse_pass
from onnxslim_passes.runtime import open_session

PREPARED = "fold-constants + fuse-batch-norm"
PIPELINES = (
    "quantize-static:placement=everywhere,per_channel=false",
    "equalize-channels + quantize-static:placement=everywhere,per_channel=false",
    "quantize-static:placement=everywhere",
    "equalize-channels + quantize-static:placement=everywhere",
)
RANDOM_FEEDS = 16


def with_random_feeds(path: Path) -> Case:
    """A model with inputs made up."""
    with open_session(path) as session:
        for shapes in shape_guesses(session.inputs):
            feeds = list(random_feeds(session.inputs, shapes, 0, RANDOM_FEEDS))
            try:
                session.run(feeds[0])
            except RuntimeRefusedError:
                continue
            return Case(path.stem, path, feeds)
    raise SystemExit(f"{path}: no random input fits")


def chosen(names: Sequence[str], folder: Path) -> Iterator[Case]:
    """The cases asked for, files first."""
    files = [name for name in names if name.endswith(".onnx")]
    for name in files:
        yield with_random_feeds(Path(name))
    if len(files) < len(names):
        yield from (case for case in cases(folder) if case.name in names)


def measure(case: Case, pipeline: str, target: str, out: Path) -> str:
    """One line of the table."""
    calibration, held_out = case.split()
    passes = [parse_pass(text) for text in f"{PREPARED} + {pipeline}".split(" + ")]
    samples = Samples.from_feeds(calibration)
    model = load(case.path)
    result = Pipeline(passes).run(model, samples=samples, target=target, measure=False)
    result.model.save(out)
    with open_session(case.path) as reference, open_session(out) as candidate:
        sqnr = compare_outputs(reference, candidate, held_out).sqnr_db
        speed = compare_latency(reference, candidate, held_out[0], seconds=1.0).speedup
        score = case.score(candidate)
    return f"{out.stat().st_size / 1e6:7.3f} {sqnr:7.2f} {score:>7} {speed:5.2f}  {pipeline}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="names in tasks.py, or model files")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--pipeline", action="append")
    parser.add_argument("--target", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen(options.names, options.folder):
            print(f"{case.name}: {case.path.stat().st_size / 1e6:.3f} MB, {len(case.feeds)} feeds")
            print(f"{'MB':>7} {'SQNR dB':>7} {'score':>7} speed  pipeline")
            for pipeline in options.pipeline or PIPELINES:
                try:
                    out = Path(folder) / "out.onnx"
                    print(measure(case, pipeline, options.target, out), flush=True)
                except OnnxSlimError as error:
                    print(f"{'':29}  {pipeline}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
