"""Gradients of operators that move elements and do not change them.

Each input element goes to some outputs; its gradient is the sum of theirs. Where the places are
exchanged one for one, that is the inverse movement.
"""

import numpy as np

from onnxslim_passes.training.emitter import Tensor
from onnxslim_passes.training.gradients.step import Rule, Step


def reshape(step: Step) -> tuple[Tensor]:
    """Reshape, Flatten, Squeeze, Unsqueeze: the shape of x again."""
    return (step.emit.reshape_like(step.dy, step.x),)


def transpose(step: Step) -> tuple[Tensor]:
    """The inverse permutation; without an attribute the axes are reversed."""
    rank = step.emit.rank(step.x)
    perm = step.attr("perm", list(range(rank))[::-1])
    return (step.emit.transpose(step.dy, [int(axis) for axis in np.argsort(perm)]),)


def expand(step: Step) -> tuple[Tensor]:
    """The sum over the repeated axes."""
    return (step.emit.sum_to(step.dy, step.x),)


MOVEMENT: dict[str, Rule] = {
    "Expand": expand,
    "Flatten": reshape,
    "Reshape": reshape,
    "Squeeze": reshape,
    "Transpose": transpose,
    "Unsqueeze": reshape,
}
