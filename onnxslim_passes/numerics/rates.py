"""Uniform grids by their rate: the bits a weight takes once its integers are entropy coded.

**One tensor.** All weights are rounded to whole multiples of one step, none is clipped, and a code
near the entropy stores the integers. At b bits this is better than a grid of 2^b points: with fine
steps the signal-to-noise ratio of normal weights is 6.02 b - 1.53 dB, 1.53 dB from the limit of any
quantizer, and of all scalar ones with that entropy the uniform one is best (Gish and Pierce 1968).
The step that gives a rate is found on a histogram (`step_for_rate`).

**Several tensors.** A bit more in each of the n weights of a tensor divides its part E of the error
of the model's outputs by 4, so that dE/d(n R) = -2 ln(2) E / n. A given number of bits for all
tensors is spent best where this slope is the same everywhere: each weight, wherever it stands, has
the same part of the error. From errors e measured at rates r that is

    R = r + log2(e / n) / 2 + constant

(`equal_slope_rates`; reverse water-filling, Cover and Thomas, "Elements of Information Theory",
section 10.3, in the form of Shoham and Gersho 1988, "Efficient Bit Allocation for an Arbitrary Set
of Quantizers").
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray
from onnxslim_passes.numerics.error_feedback import Mask, Points, Solver, Wide, output_error
from onnxslim_passes.numerics.histograms import weighted_histogram

Floats = npt.NDArray[np.float64]

MOST_DISTINCT = 256
"""Integers that one table holds."""

HIGHEST_RATE = 6.5
"""Bits a weight at which `MOST_DISTINCT` integers are enough for weights of ordinary shape."""

_BISECTIONS = 40
_STEP_BITS = 11
_HALVINGS = 40  # of the largest magnitude, to reach a step that is fine enough


def entropy_bits(codes: npt.NDArray[Any]) -> float:
    """Bits an element in an ideal code of order 0; 0 for an empty array."""
    counts = np.unique(codes, return_counts=True)[1]
    return _entropy(counts.astype(np.float64))


def step_for_rate(values: FloatArray, rate: float) -> float:
    """The finest step, or one near it, with which rounding to nearest gives no more than a rate.

    Args:
        values: any shape, finite.
        rate: bits a weight, > 0.

    Returns:
        A positive number; 1 for zeros alone, which any step keeps. Weights of few distinct values
        may have a lower rate with any step: then it is so fine that they are kept apart.

    Raises:
        ValueError: NaN or infinity in `values`, with its position, or a rate that is not positive.
    """
    if not rate > 0:
        raise ValueError(f"rate is {rate}; expected bits a weight, above 0")
    histogram = weighted_histogram(values)
    points, weights = histogram.points, histogram.weights
    largest = float(np.abs(points).max(initial=0))
    if largest == 0:
        return 1.0

    def rate_of(step: float) -> float:
        codes = np.rint(points / step)
        starts = np.flatnonzero(np.diff(codes, prepend=np.nan) != 0)
        return _entropy(np.add.reduceat(weights, starts))

    # All round to zero with `coarse`; halving it finds the other end of the bisection.
    coarse, fine = 4 * largest, largest
    for _ in range(_HALVINGS):
        if rate_of(fine) > rate:
            break
        coarse, fine = fine, fine / 2
    for _ in range(_BISECTIONS):
        middle = (coarse * fine) ** 0.5
        if rate_of(middle) > rate:
            fine = middle
        else:
            coarse = middle
    return coarse


def short_step(step: float) -> float:
    """A step of few significant bits, not finer: times integers below 2^13 exact in float32."""
    mantissa, exponent = np.frexp(step)
    return float(np.ldexp(np.ceil(np.ldexp(mantissa, _STEP_BITS)), exponent - _STEP_BITS))


def round_to_step(
    rows: FloatArray, step: float, hessian: Wide | None = None, *, damping: float = 0.1
) -> tuple[npt.NDArray[np.int64], bool]:
    """Weights as whole numbers of steps, at most `MOST_DISTINCT` different ones.

    Args:
        rows: (G groups, N rows, K columns), finite.
        step: > 0.
        hessian: (G, K, K) of the layer's inputs, finite; None to round to nearest.
        damping: see `Solver`.

    Returns:
        Integers of the shape of `rows`, zeros where those are zero, and whether errors were fed
        back: not without a Hessian, and not where that makes the error of the output no smaller.
    """
    exact = rows.astype(np.float64)
    nearest = few_distinct(np.rint(exact / step).astype(np.int64))
    if hessian is None:
        return nearest, False
    start: Wide = np.multiply(nearest, step, dtype=np.float64)
    solver = Solver(hessian, damping=damping, act_order=True, sweeps=0)
    every = np.full((1, 1, 1), np.inf)
    free: Mask = np.asarray(rows != 0)
    points = Points(np.full((1, 1, 1), step), -every, every, free=free)
    found = few_distinct(np.rint(solver.solve(rows, start, points) / step).astype(np.int64))
    plain_error = output_error(exact - start, hessian).sum()
    if output_error(exact - found * step, hessian).sum() < plain_error:
        return found, True
    return nearest, False


def few_distinct(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Integers with at most `MOST_DISTINCT` different ones, by coarser steps for large ones.

    Those below a power of two stay; from there each octave has half as many as lie below it, like
    the numbers of a short float. So a few outliers far from the rest, whose integers are large and
    rare, are moved by a small part of their size, and the others not at all.

    Args:
        codes: any shape; those with few enough different ones are returned as they are.
    """
    kept = MOST_DISTINCT // 2
    found = codes
    while np.unique(found).size > MOST_DISTINCT:
        size = np.abs(codes)
        exponent = np.frexp(size / kept)[1].clip(0)  # 0 below `kept`, which stays
        spacing = np.left_shift(np.int64(1), exponent.astype(np.int64))
        found = np.sign(codes) * (np.rint(size / spacing).astype(np.int64) * spacing)
        kept //= 2
    return found


def equal_slope_rates(
    sizes: Sequence[int],
    rates: Sequence[float],
    errors: Sequence[float],
    *,
    rate: float,
    lowest: float,
    highest: float = HIGHEST_RATE,
) -> Floats:
    """Rates with which tensors together make the least error for their bits.

    Args:
        sizes: weights of each tensor, > 0.
        rates: at which the errors were measured, bits a weight.
        errors: squared errors of the outputs that each tensor makes alone, in any unit, >= 0; what
            has none gets the lowest rate.
        rate: the mean over all weights.
        lowest: no tensor gets less; at most `rate`.
        highest: no tensor gets more; at least `rate`.

    Returns:
        Shape (tensors,), between `lowest` and `highest`, whose mean over all weights is `rate`.

    Raises:
        ValueError: `rate` does not lie between `lowest` and `highest`.
    """
    if not lowest <= rate <= highest:
        raise ValueError(f"rate is {rate}; expected {lowest} to {highest}")
    share = np.asarray(sizes, np.float64) / sum(sizes)
    error = np.maximum(np.asarray(errors, np.float64), np.finfo(np.float64).tiny)
    free = np.asarray(rates, np.float64) + np.log2(error / share) / 2
    low, high = lowest - free.max(), highest - free.min()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float((free + middle).clip(lowest, highest) @ share) > rate:
            high = middle
        else:
            low = middle
    found: Floats = (free + low).clip(lowest, highest)
    return found


def _entropy(counts: Floats) -> float:
    if not counts.size:
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
