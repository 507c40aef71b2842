"""Prints what fine-tuning recovers of the score that compression cost.

    python benchmarks/fine_tuning.py [CASE...] [--folder ../shared/models]

The folder holds `tasks.py` (a dictionary TASKS: model file, calibration feeds, labelled training
feeds, metric) and the models. Each case compresses a model and tunes what is left, in one or more
stages, the original being the teacher. A case may tune the original on the labels first: what comes
of that is compressed, and is the teacher. Printed are the task's score (higher is better) of the
float model, of the model with all of the compression and no tuning, and of the tuned one; the share
of the drop that was recovered; and CPU seconds of compressing and tuning. Labels are used where the
task has training data; the best epoch is chosen on a part of the training samples, and the score is
measured on others once. `kept` says whether zeros stayed zeros and the number of distinct values of
each weight did not grow. With --checkpoints FOLDER a killed run is taken up from its last epoch;
the CPU seconds are then those of the rest.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from distortions import Distortion, distorted_samples, joined_lines, moved_photographs
from int8_models import FOLDER, load_tasks

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Context, Pass
from onnxslim_passes.passes.cluster_weights import ClusterWeights
from onnxslim_passes.passes.prune_gradually import PruneGradually
from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
from onnxslim_passes.passes.quantize_weights import QuantizeWeights
from onnxslim_passes.runtime import open_session
from onnxslim_passes.training.options import Course, Objective, Parameters, Update
from onnxslim_passes.training.tuning import prepare, run
from onnxslim_passes.training.writing_back import write_back

RELATIVE = Update(relative_steps=True)


@dataclass(frozen=True)
class Case:
    """Passes, each followed by tuning.

    Attributes:
        task: key of TASKS.
        stages: a pass, and the course of the tuning behind it; None behind a pass that trains.
        objective: of the tuning.
        update: likewise.
        parameters: likewise.
        labelled: whether labels are used.
        distort: makes other samples of those given in each epoch.
        at_once: the same compression without training, if it is not the passes of the stages.
        first: of tuning the original on the labels before the stages; None for the original as it
            is.
    """

    task: str
    stages: Sequence[tuple[Pass, Course | None]]
    objective: Objective = field(default_factory=lambda: Objective(loss="distill"))
    update: Update = RELATIVE
    parameters: Parameters = field(default_factory=Parameters)
    labelled: bool = False
    distort: Distortion | None = None
    at_once: Sequence[Pass] | None = None
    first: Course | None = None


def zeros(*sparsities: float, course: Course) -> list[tuple[Pass, Course | None]]:
    """Magnitude pruning in steps."""
    return [(PruneMagnitude(sparsity=sparsity), course) for sparsity in sparsities]


# On few samples a teacher says more than labels do: ten numbers a sample instead of one.
TAUGHT = Objective(distill_weight=0.9, temperature=4.0)

# The original has to learn from the labels what it does not know yet.
ADAPTED = Objective(distill_weight=0.3)

CASES = {
    "sklearn zeros": Case(
        "sklearn_mlp_digits",
        zeros(0.9, course=Course(epochs=40, learning_rate=3e-3)),
        Objective(),
        Update(),
        labelled=True,
    ),
    "silero zeros": Case(
        "silero_vad_16k_op15",
        zeros(0.5, course=Course(epochs=1, learning_rate=1e-4, schedule="constant")),
        update=Update(),
    ),
    "resnet8 4 bits": Case(
        "resnet8_cifar10",
        [(ClusterWeights(bits=4), Course(epochs=5, learning_rate=1e-3))],
        TAUGHT,
        labelled=True,
    ),
    "resnet8 zeros, 4 bits": Case(
        "resnet8_cifar10",
        [
            (
                PruneGradually(
                    sparsity=0.8,
                    scope="sensitivity",
                    epochs=150,
                    ramp_epochs=40,
                    batch_size=16,
                    learning_rate=1e-2,
                    relative_steps=True,
                    distill_weight=0.7,
                    temperature=3.0,
                    prune_steps=20,
                ),
                None,
            ),
            (ClusterWeights(bits=4), Course(epochs=20, batch_size=16, learning_rate=2e-3)),
        ],
        Objective(distill_weight=0.7, temperature=3.0),
        labelled=True,
        distort=moved_photographs,
        at_once=[PruneMagnitude(sparsity=0.8), ClusterWeights(bits=4)],
        first=Course(epochs=40, batch_size=16, learning_rate=3e-3),
    ),
    "minilm 4 bits": Case(
        "minilm_l6",
        [(QuantizeWeights(bits=4), Course(epochs=2, learning_rate=2e-3, warmup=0.1))],
        # 12 million numbers of which a batch meets some hundred rows.
        parameters=Parameters(exclude=("*embeddings*",)),
    ),
    "minilm 16 values": Case(
        "minilm_l6",
        [(ClusterWeights(bits=4), Course(epochs=2, learning_rate=1e-3, warmup=0.1))],
        parameters=Parameters(exclude=("*embeddings*",)),
    ),
    "ppocr_rec zeros": Case(
        "ppocr_v4_rec",
        [
            (
                PruneGradually(
                    sparsity=0.73,
                    scope="weight",
                    min_elements=13_000,
                    epochs=10,
                    ramp_epochs=6,
                    prune_steps=6,
                    learning_rate=5e-3,
                    relative_steps=True,
                    loss="distill",
                    temperature=1.0,
                ),
                None,
            )
        ],
        distort=joined_lines,
        # Depthwise and small filters stay whole: 70% of all weights are zero.
        at_once=[PruneMagnitude(sparsity=0.73, min_elements=13_000)],
    ),
}

# A recurrent network: one step has to go the right way through its loop.
ONE_STEP = ("silero zeros",)


def training_samples(task: Any, case: Case) -> Samples:
    """All training feeds of a task, with labels where it has them."""
    if case.labelled:
        feeds = [{**feed, "labels": labels} for feed, labels in task.finetune(batch=50, seed=0)]
    else:
        feeds = list(itertools.islice(task.calibration(), 64))
    if case.distort is not None:
        return distorted_samples(feeds, case.distort, case.task)
    return Samples.from_feeds(feeds, name=case.task)


def compressed(model: Model, case: Case, samples: Samples) -> Model:
    """The model with all of the compression and no tuning; storage is left out."""
    work = model.copy()
    for pass_ in case.at_once or [pass_ for pass_, _ in case.stages]:
        pass_.apply(work, Context(samples=samples, reference=model))
    return work


def tune(
    work: Model, teacher: Model, course: Course, objective: Objective, case: Case, context: Context
) -> str:
    """Tunes the model in place; returns how the validation loss went."""
    assert context.samples is not None
    session = prepare(
        work,
        context.samples,
        objective=objective,
        update=case.update,
        parameters=case.parameters,
        course=course,
        teacher=teacher,
    )
    found = run(session, checkpoint=context.checkpoint(session.fingerprint))
    write_back(work, session.program.constraints, found.state)
    losses = [found.epochs[number].validation_loss for number in (0, found.best)]
    return " -> ".join(f"{loss:.4g}" for loss in losses)


def tuned(model: Model, case: Case, settings: Context) -> tuple[Model, Model, str]:
    """The model before and after the last tuning, and how the loss went there.

    A pass that trains tells no loss, and there is nothing to hold its result against.
    """
    work, told = model.copy(), ""
    if case.first is not None:
        tune(work, model, case.first, ADAPTED, case, settings)
    teacher = work.copy()
    context = replace(settings, reference=teacher)
    for pass_, course in case.stages:
        pass_.apply(work, context)
        before = work.copy()
        if course is not None:
            told = tune(work, teacher, course, case.objective, case, context)
    return before, work, told


def keeps_constraints(before: Model, after: Model) -> bool:
    """Whether zeros stayed zeros, and no weight has more distinct values than before."""
    for old, new in zip(before.constants(), after.constants(), strict=True):
        one, two = old.values, new.values
        if one.dtype.kind not in "fiu" or one.size < 256:
            continue
        sparse = np.mean(one == 0) > 0.1
        if sparse and (two[one == 0] != 0).any():
            return False
        few = len(np.unique(one)) <= 256 < one.size
        if few and len(np.unique(two)) > len(np.unique(one)):
            return False
    return True


def measure(name: str, case: Case, tasks: Any, folder: Path, checkpoints: Path | None) -> str:
    """One line of the table."""
    task = tasks.TASKS[case.task]
    model = load(folder / task.model)
    samples = training_samples(task, case)
    start = time.process_time()
    before, after, loss = tuned(model, case, Context(samples=samples, checkpoints=checkpoints))
    seconds = time.process_time() - start
    untuned = compressed(model, case, samples)
    scores = [task.metric(open_session(one).raw) for one in (model, untuned, after)]
    drop = scores[0] - scores[1]
    recovered = (scores[2] - scores[1]) / drop if drop > 0 else float("nan")
    kept = ("yes" if keeps_constraints(before, after) else "NO") if loss else ""
    return (
        f"{name:16} {scores[0]:7.2f} {scores[1]:10.2f} {scores[2]:7.2f} {recovered:9.0%} "
        f"{loss:>22} {kept:>4} {seconds:7.0f}"
    )


def one_step(name: str, case: Case, tasks: Any, folder: Path) -> str:
    """The loss of a case on feeds that training does not see, before and after a single step."""
    task = tasks.TASKS[case.task]
    model = load(folder / task.model)
    feeds = list(itertools.islice(task.calibration(), 64))
    # Steps of a stream: those in between are like their neighbours, but are not trained on.
    given, held = (Samples.from_feeds(part, name=case.task) for part in (feeds[:1], feeds[1:]))
    session = prepare(
        compressed(model, case, given),
        given,
        objective=case.objective,
        update=case.update,
        parameters=case.parameters,
        course=Course(epochs=1, learning_rate=1e-4, schedule="constant"),
        teacher=model,
        validation=held,
    )
    before, after = (epoch.validation_loss for epoch in run(session).epochs)
    return f"{name}, one step: loss {before:.4g} -> {after:.4g}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"cases; default: all of {', '.join(CASES)}")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--checkpoints", type=Path, help="where epochs are kept")
    options = parser.parse_args()
    tasks = load_tasks(options.folder)
    print(
        f"{'case':16} {'float':>7} {'compressed':>10} {'tuned':>7} {'recovered':>9} "
        f"{'validation loss':>22} {'kept':>4} {'CPU s':>7}"
    )
    for name, case in CASES.items():
        if not options.names or name in options.names:
            print(measure(name, case, tasks, options.folder, options.checkpoints), flush=True)
        if name in ONE_STEP and (not options.names or name in options.names):
            print(one_step(name, case, tasks, options.folder), flush=True)


if __name__ == "__main__":
    main()
