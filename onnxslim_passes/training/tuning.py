"""Fine-tuning from end to end: samples in, tuned values in the model."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model
from onnxslim_passes.runtime import InputSpec, open_session
from onnxslim_passes.training.data import TrainingData
from onnxslim_passes.training.journal import Epoch, Journals
from onnxslim_passes.training.loop import Tuned, run_course
from onnxslim_passes.training.losses import LABEL_LOSSES, check_teacher_options, resolved_loss
from onnxslim_passes.training.options import Course, Objective, Parameters, Update
from onnxslim_passes.training.parameters import Array
from onnxslim_passes.training.program import Holding, TrainingProgram, build
from onnxslim_passes.training.sizes import common_sizes
from onnxslim_passes.training.trainer import Trainer

__all__ = ["Listener", "Session", "prepare", "prepare_program", "run"]


@dataclass(frozen=True)
class Listener:
    """Who is told how a run goes.

    Attributes:
        on_epoch: of every epoch, the state before training first.
        on_step: of the loss of every step.
        on_start: how many steps there will be at most, and how many of them are done already.
    """

    on_epoch: Callable[[Epoch], None] | None = None
    on_step: Callable[[float], None] | None = None
    on_start: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Session:
    """A program and its data, checked against each other.

    Attributes:
        program: what is run.
        data: to train on.
        validation: to choose by, or None.
        course: the course of the run.
        seed: of everything random.
        fingerprint: of everything that decides the result.
    """

    program: TrainingProgram
    data: TrainingData
    validation: TrainingData | None
    course: Course
    seed: int
    fingerprint: str

    @property
    def batch_size(self) -> int:
        """Samples a step."""
        return self.data.batch_size(self.course.batch_size)

    @property
    def steps(self) -> int:
        """Of the whole course, unless it ends early."""
        return len(self.data.in_order(self.batch_size)) * self.course.epochs


def prepare(
    model: Model,
    samples: Samples,
    *,
    objective: Objective,
    update: Update,
    parameters: Parameters,
    course: Course,
    teacher: Model | None = None,
    validation: Samples | None = None,
    seed: int = 0,
    hold: Holding | None = None,
) -> Session:
    """Reads and checks everything, and makes the training program.

    Args:
        model: stays as it is.
        samples: to train on, with labels where the loss needs them.
        objective: the loss; "auto" is decided by the labels.
        update: the optimizer.
        parameters: which weights move.
        course: epochs and batches.
        teacher: for distillation.
        validation: to choose the best epoch by; by default a part of `samples`.
        seed: of everything random.
        hold: see `build`.

    Raises:
        SamplesError: the data or its labels do not fit.
        UsageError: options that do not go together.
        UnsupportedModelError: there is nothing to train, or no gradient.
    """
    check_teacher_options(objective, has_teacher=teacher is not None)
    with open_session(model) as session:
        inputs = session.inputs
    data = TrainingData.read(samples, inputs)
    loss = resolved_loss(objective, data.label_dtype)
    objective = replace(objective, loss=loss)
    if loss in LABEL_LOSSES and objective.distill_weight == 0:
        teacher = None
    program = build(
        model,
        objective=objective,
        update=update,
        parameters=parameters,
        teacher=teacher,
        fixed_inputs=_deciding_scalars(model, data),
        sizes=common_sizes(inputs, data.shapes()),
        seed=seed,
        hold=hold,
    )
    return _checked(program, data, inputs, samples, validation, course, seed)


def prepare_program(
    program: TrainingProgram,
    samples: Samples,
    *,
    course: Course,
    validation: Samples | None = None,
    seed: int = 0,
) -> Session:
    """As `prepare`, for a program that was exported before.

    Raises:
        SamplesError: the data or its labels do not fit.
        UsageError: options that do not go together.
    """
    inputs = [
        InputSpec(name=spec.name, dtype=np.dtype(spec.dtype), shape=spec.shape)
        for spec in program.layout.inputs
    ]
    data = TrainingData.read(samples, inputs)
    return _checked(program, data, inputs, samples, validation, course, seed)


def run(
    session: Session,
    *,
    checkpoint: Path | None = None,
    checkpoint_steps: int | None = None,
    threads: int = 1,
    listener: Listener | None = None,
) -> Tuned:
    """Trains, from the checkpoint on if there is one of this run.

    Args:
        session: what `prepare` made.
        checkpoint: file to go on from and to write after each epoch; None for none.
        checkpoint_steps: also write it every so many steps.
        threads: of one operator.
        listener: who is told.

    Raises:
        TrainingError: the loss became NaN or infinite.
        UsageError: the checkpoint is of another run.
    """
    listener = listener or Listener()
    journals = None
    if checkpoint is not None:
        digest = hashlib.sha256(f"{session.fingerprint}\0{threads}".encode()).hexdigest()
        journals = Journals(checkpoint, digest, checkpoint_steps)
    begin = None
    if (on_start := listener.on_start) is not None:
        begin = partial(on_start, session.steps)
    tuned = run_course(
        Trainer(session.program, threads=threads),
        session.data,
        session.validation,
        session.course,
        seed=session.seed,
        journals=journals,
        report=listener.on_epoch,
        begin=begin,
        progress=listener.on_step,
    )
    still = {
        spec.input: session.program.state[spec.input]
        for spec in session.program.layout.state
        if spec.role == "buffer"
    }
    return replace(tuned, state=still | tuned.state)


def _deciding_scalars(model: Model, data: TrainingData) -> dict[str, Array]:
    """Inputs of one value that may decide which branch of an If is taken."""
    branches = any(node.op == "If" for node in model.nodes())
    return data.constant_scalars() if branches else {}


def _checked(
    program: TrainingProgram,
    data: TrainingData,
    inputs: Sequence[InputSpec],
    samples: Samples,
    validation: Samples | None,
    course: Course,
    seed: int,
) -> Session:
    """Data and program, held against each other."""
    spec = program.layout.labels
    if spec is not None:
        data = data.with_labels_as(spec)
    prints = [samples.fingerprint()]
    if validation is None:
        data, kept_out = data.split(course.validation_split, seed)
    else:
        kept_out = TrainingData.read(validation, inputs)
        if spec is not None:
            kept_out = kept_out.with_labels_as(spec)
        prints.append(validation.fingerprint())
    data.batch_size(course.batch_size)
    told = json.dumps([program.layout.to_text(), asdict(course), prints, seed])
    fingerprint = hashlib.sha256(told.encode())
    # The layout knows the file that the model came from, not what was made of it since.
    for name, array in sorted(program.state.items()):
        fingerprint.update(f"\0{name}\0".encode() + array.tobytes())
    return Session(program, data, kept_out, course, seed, fingerprint.hexdigest())
