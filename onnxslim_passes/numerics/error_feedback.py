"""Rounding column by column, each taking up the error that others have made.

A layer computes ``Y = W X``. With E = W - Q the error that rounding makes in the weights, that of
the output is ``|E X|^2 = tr(E H E^T)``, H = X X^T (its factor 2 cancels everywhere). Rows of W are
independent of each other; within a row the inputs' correlation lets the error of one column be made
up for by the others:

1. One column after the other is rounded to nearest after the feedback of the columns before it,
   the weights of which come from a triangular factor of H: GPTQ (Frantar et al., "GPTQ: Accurate
   Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023), in the equal
   form without an inverse of Chee et al., "QuIP", NeurIPS 2023, theorem 6 (LDLQ).
2. Then columns are visited again, each rounded to the best point given all others, which never
   makes the error larger (coordinate descent: Behdin et al., "QuantEase", 2023).

Both are one loop here (`_sweep`) with different feedback. Arrays have the axes (G groups, N rows, K
columns): G = 1 but for grouped convolutions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray

Wide = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_COLUMNS = 64  # columns between two updates by a matrix product
_ELEMENTS = 1 << 22  # of a matrix in work, so that temporaries stay at tens of MB


@dataclass(frozen=True)
class Points:
    """The points that each element may take, ``scale * step`` for whole steps; shapes (G, N, K).

    Attributes:
        scale: > 0, or of a shape that broadcasts.
        low: the smallest step, likewise.
        high: the largest step, likewise.
        free: False where an element stays at the point where it starts.
    """

    scale: Wide
    low: Wide
    high: Wide
    free: Mask


def output_error(errors: Wide, hessian: Wide) -> Wide:
    """``e H e^T`` for each row e of errors (G, N, K) or of weights; shape (G, N), >= 0."""
    sums: Wide = np.maximum(((errors @ hessian) * errors).sum(axis=-1), 0)
    return sums


class Solver:
    """Rounds rows of one layer; its feedback matrices are made once.

    Columns are the second axis here, (G, K, N): what is worked on at a time is contiguous.
    """

    def __init__(self, hessian: Wide, *, damping: float, act_order: bool, sweeps: int) -> None:
        """Prepares for one layer.

        Args:
            hessian: (G, K, K), X X^T, symmetric and positive semidefinite.
            damping: is added to H's diagonal, as a part of its mean: columns whose inputs were
                seldom or never seen stay near their values.
            act_order: columns with the largest inputs first; else in their order.
            sweeps: rounds of coordinate descent afterwards.
        """
        damped = _damped(hessian, damping)
        groups, columns = damped.shape[:2]
        diagonal = np.diagonal(damped, axis1=1, axis2=2)
        natural = np.broadcast_to(np.arange(columns), (groups, columns))
        # Ties keep their order, so that the result is the same everywhere.
        self._order = np.argsort(-diagonal, axis=1, kind="stable") if act_order else natural
        ordered = np.take_along_axis(damped, self._order[:, :, None], axis=1)
        ordered = np.take_along_axis(ordered, self._order[:, None, :], axis=2)
        self._feedbacks = [_triangular_feedback(ordered)]
        if sweeps:
            self._feedbacks += [_full_feedback(ordered)] * sweeps

    def solve(self, rows: FloatArray, start: Wide, points: Points) -> Wide:
        """Points, shape (G, N, K), for rows whose nearest points are `start`."""
        found = np.empty(rows.shape)
        for part in _row_parts(rows.shape):
            found[:, part] = self._solve(rows[:, part], start[:, part], _part(points, part))
        return found

    def _solve(self, rows: FloatArray, start: Wide, points: Points) -> Wide:
        scale, low, high, free = (
            self._by_column(np.broadcast_to(each, rows.shape))
            for each in (points.scale, points.low, points.high, points.free)
        )
        weights = self._by_column(rows.astype(np.float64))
        errors = weights - self._by_column(start)
        for feedback in self._feedbacks:
            before = errors.copy()
            _sweep(weights, errors, feedback, (scale, low, high), free)
            if np.array_equal(before, errors):
                break
        # Back to whole steps: a difference of floats is not quite the grid point.
        found = np.rint((weights - errors) / scale) * scale
        back = np.empty_like(found)
        np.put_along_axis(back, self._order[:, :, None], found, axis=1)
        return np.swapaxes(back, 1, 2)

    def _by_column(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        columns = np.swapaxes(rows, 1, 2)
        return np.ascontiguousarray(np.take_along_axis(columns, self._order[:, :, None], axis=1))


def _damped(hessian: Wide, damping: float) -> Wide:
    """H with its diagonal raised; the identity where no input was ever seen."""
    columns = hessian.shape[1]
    mean = np.trace(hessian, axis1=1, axis2=2) / columns
    seen = (mean > 0)[:, None, None]
    unit = np.where(seen, hessian / np.where(mean > 0, mean, 1)[:, None, None], 0)
    identity = np.eye(columns)
    damped: Wide = unit + np.where(seen, max(damping, 1e-9), 1.0) * identity
    return damped


def _row_parts(shape: tuple[int, ...]) -> Iterator[slice]:
    groups, count, columns = shape
    step = max(1, _ELEMENTS // max(1, groups * columns))
    for begin in range(0, count, step):
        yield slice(begin, begin + step)


def _part(points: Points, part: slice) -> Points:
    """The points of some rows; what is the same for all rows stays."""

    def of(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array[:, part] if array.ndim == 3 and array.shape[1] > 1 else array

    return Points(of(points.scale), of(points.low), of(points.high), of(points.free))


def _triangular_feedback(hessian: Wide) -> Wide:
    """How errors of earlier columns are made up for by later ones, if those are free: (G, K, K).

    H = (I + M) D (I + M)^T with M strictly upper triangular; row k is column k of M.
    """
    lower = np.linalg.cholesky(hessian[:, ::-1, ::-1])
    upper = lower[:, ::-1, ::-1]
    unit = upper / np.diagonal(upper, axis1=1, axis2=2)[:, None, :]
    return _without_diagonal(np.ascontiguousarray(np.swapaxes(unit, 1, 2)))


def _full_feedback(hessian: Wide) -> Wide:
    """How the errors of all other columns are best made up for by one: (G, K, K)."""
    return _without_diagonal(hessian / np.diagonal(hessian, axis1=1, axis2=2)[:, :, None])


def _without_diagonal(matrices: Wide) -> Wide:
    index = np.arange(matrices.shape[1])
    matrices[:, index, index] = 0
    return matrices


def _sweep(
    weights: Wide,
    errors: Wide,
    feedback: Wide,
    grid: tuple[Wide, Wide, Wide],
    free: Mask,
) -> None:
    """Rounds one column after the other; all but `feedback` of shape (G, K, N).

    Args:
        weights: the exact ones.
        errors: weights minus their points so far; edited in place.
        feedback: (G, K, K); row k holds how much of each column's error column k takes over.
        grid: scale, lowest and highest step.
        free: False where the point stays as it is.
    """
    scale, low, high = grid
    columns = weights.shape[1]
    for begin in range(0, columns, _COLUMNS):
        end = min(begin + _COLUMNS, columns)
        targets = weights[:, begin:end] + feedback[:, begin:end] @ errors
        changes = np.zeros_like(targets)
        for k in range(begin, end):
            i = k - begin
            target = targets[:, i]
            if i:
                target = target + (feedback[:, k, None, begin:k] @ changes[:, :i])[:, 0]
            steps = np.clip(np.rint(target / scale[:, k]), low[:, k], high[:, k])
            error = np.where(free[:, k], weights[:, k] - steps * scale[:, k], errors[:, k])
            changes[:, i] = error - errors[:, k]
            errors[:, k] = error
