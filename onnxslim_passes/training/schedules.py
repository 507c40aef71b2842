"""The learning rate of each step; pure arithmetic, because the rate is an input of the graph."""

import math

from onnxslim_passes.training.options import Course

__all__ = ["learning_rate"]


def learning_rate(course: Course, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate of one optimizer step.

    It rises linearly over the first `course.warmup` of all steps, then follows the schedule:
    constant; cosine, half a period from the full rate towards 0 (Loshchilov and Hutter 2017,
    SGDR, without restarts); or step, times `decay_factor` every `decay_epochs` epochs.

    Args:
        course: rate, schedule and warm-up.
        step: number of the step, from 0.
        steps: in the whole run, > 0.
        steps_per_epoch: > 0.

    Returns:
        A rate in (0, `course.learning_rate`].
    """
    rising = round(course.warmup * steps)
    if step < rising:
        return course.learning_rate * (step + 1) / (rising + 1)
    if course.schedule == "cosine":
        done = (step - rising) / max(1, steps - rising)
        return course.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if course.schedule == "step":
        falls = step // (course.decay_epochs * steps_per_epoch)
        return course.learning_rate * course.decay_factor**falls
    return course.learning_rate
