"""The loop: epochs of steps, validation, early stop, and checkpoints to go on from.

Everything random depends on the seed and the number of the epoch alone, and a checkpoint holds
all that has happened, so that an interrupted run ends in the same bits as one that was not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from onnxslim_passes.errors import TrainingError
from onnxslim_passes.training.data import TrainingData
from onnxslim_passes.training.journal import Epoch, Journal, Journals
from onnxslim_passes.training.options import Course
from onnxslim_passes.training.parameters import Array
from onnxslim_passes.training.schedules import learning_rate
from onnxslim_passes.training.trainer import Trainer

__all__ = ["Tuned", "run_course"]


@dataclass(frozen=True)
class Tuned:
    """What a run ends with.

    Attributes:
        state: what belongs into a model, of the best epoch by validation, or of the last one
            without validation data.
        epochs: the account, the state before training first.
        best: number of the epoch that `state` is from; 0 if none was better than the start.
        resumed: step at which an interrupted run was taken up, or None.
    """

    state: dict[str, Array]
    epochs: tuple[Epoch, ...]
    best: int
    resumed: int | None = None


def run_course(
    trainer: Trainer,
    data: TrainingData,
    validation: TrainingData | None,
    course: Course,
    *,
    seed: int = 0,
    settling: int = 0,
    journals: Journals | None = None,
    report: Callable[[Epoch], None] | None = None,
    begin: Callable[[int], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tuned:
    """Trains for the epochs of a course.

    Args:
        trainer: at its start.
        data: to train on.
        validation: to choose the best epoch by; the state before training is a candidate, too.
        course: epochs, batches, learning rate.
        seed: of the order of samples.
        settling: epochs in which the network itself changes: the state after them is the first
            that validation compares.
        journals: where a killed run is taken up from, and checkpoints go to.
        report: is told of every epoch.
        begin: is told before the first step how many were done by a run that is taken up.
        progress: is told the loss of every step.

    Raises:
        TrainingError: the loss or a weight became NaN or infinite; the message says at which step.
            The last checkpoint stays.
        UsageError: the batch is larger than the data.
    """
    size = data.batch_size(course.batch_size)
    journal = journals.read() if journals is not None else None
    resumed = None
    if journal is None:
        journal = _begin(trainer, validation, size)
        if report is not None:
            report(journal.epochs[0])
    else:
        resumed = journal.steps
        trainer.take_up(journal.state, journal.steps)
    if begin is not None:
        begin(journal.steps)
    while not _is_over(journal, course):
        journal = _run_epoch(trainer, data, journal, course, seed, journals, progress)
        journal = _close_epoch(trainer, validation, journal, size, settling)
        if journals is not None:
            journals.write(journal)
        if report is not None:
            report(journal.epochs[-1])
    return Tuned(dict(journal.best_state), journal.epochs, journal.best, resumed)


def _begin(trainer: Trainer, validation: TrainingData | None, size: int) -> Journal:
    state = trainer.read()
    start = Epoch(number=0)
    if validation is not None:
        found = trainer.evaluate(validation, size)
        start = replace(start, validation_loss=found.loss, validation_metric=found.metric)
    return Journal(state=state, best_state=trainer.kept(state), epochs=(start,))


def _is_over(journal: Journal, course: Course) -> bool:
    done = journal.epochs[-1].number
    if done >= course.epochs:
        return True
    return course.patience is not None and done - journal.best >= course.patience


def _run_epoch(
    trainer: Trainer,
    data: TrainingData,
    journal: Journal,
    course: Course,
    seed: int,
    journals: Journals | None,
    progress: Callable[[float], None] | None,
) -> Journal:
    """The steps of one epoch that have not been done yet."""
    number = journal.epochs[-1].number + 1
    data = data.in_epoch(number)
    places = data.batches(data.batch_size(course.batch_size), seed, number)
    total = course.epochs * len(places)
    for index in range(journal.batches, len(places)):
        batch = data.batch(places[index])
        rate = learning_rate(course, journal.steps, total, len(places))
        found = trainer.step(batch, rate)
        if not math.isfinite(found.loss):
            raise _diverged("the loss", found.loss, journal.steps, number, journals)
        journal = journal.after_step(found.loss, found.metric, batch.count)
        if progress is not None:
            progress(found.loss)
        if journals is not None and journals.is_due(journal.steps):
            journal = replace(journal, state=_finite(trainer.read(), journal, number, journals))
            journals.write(journal)
    return replace(journal, state=_finite(trainer.read(), journal, number, journals))


def _close_epoch(
    trainer: Trainer,
    validation: TrainingData | None,
    journal: Journal,
    size: int,
    settling: int,
) -> Journal:
    """The account of an epoch, and whether it is the best so far."""
    number = journal.epochs[-1].number + 1
    epoch = Epoch(
        number=number,
        loss=journal.loss_sum / journal.samples,
        metric=journal.metric_sum / journal.samples,
    )
    is_best = True
    if validation is not None:
        found = trainer.evaluate(validation, size)
        epoch = replace(epoch, validation_loss=found.loss, validation_metric=found.metric)
        is_best = number <= settling or trainer.is_better(epoch, journal.epochs[journal.best])
    journal = journal.after_epoch(epoch)
    if is_best:
        journal = replace(journal, best=number, best_state=trainer.kept(journal.state))
    return journal


def _finite(
    state: dict[str, Array], journal: Journal, number: int, journals: Journals | None
) -> dict[str, Array]:
    """The state, unless a number in it is none."""
    for name, array in state.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise _diverged(f"{name!r}", math.nan, journal.steps - 1, number, journals)
    return state


def _diverged(
    what: str, value: float, step: int, epoch: int, journals: Journals | None
) -> TrainingError:
    kept = ""
    if journals is not None and journals.path.exists():
        kept = f" The last good checkpoint is {journals.path}."
    return TrainingError(
        f"{what} became {value} at step {step} (epoch {epoch}); nothing was written.{kept} Lower "
        "learning_rate, or limit the gradients with clip_norm."
    )
