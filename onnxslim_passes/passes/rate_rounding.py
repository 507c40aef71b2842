"""Weights rounded to multiples of one step, for the output of their layer where that is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.calibration.hessians import Gram, Key
from onnxslim_passes.model import Weight
from onnxslim_passes.numerics.error_feedback import Points, Solver, Wide, output_error
from onnxslim_passes.numerics.rates import entropy_bits, few_distinct, step_for_rate
from onnxslim_passes.passes.rounded_layers import RoundedLayer

__all__ = ["Rounded", "layer_hessian", "round_to_rate"]

Array = npt.NDArray[Any]

# Significant bits of a step: times integers below 2^13 they are exact in float32.
_STEP_BITS = 11


@dataclass(frozen=True)
class Rounded:
    """A weight on a uniform grid.

    Attributes:
        values: in its dtype and shape.
        step: of the grid, > 0.
        bits: entropy of the integers, bits a weight.
        fed_back: whether errors were fed back; else each weight was rounded to nearest.
    """

    values: Array
    step: float
    bits: float
    fed_back: bool


def round_to_rate(
    weight: Weight,
    rate: float,
    layer: RoundedLayer | None = None,
    hessian: Wide | None = None,
    *,
    damping: float = 0.1,
) -> Rounded:
    """The weight on a uniform grid of about a rate.

    Args:
        weight: stays as it is; finite.
        rate: bits a weight; of rounding to nearest at most, with feedback within some hundredths.
        layer: how it is multiplied; None: rounded to nearest.
        hessian: of the layer's inputs, finite, shape (G, K, K).
        damping: see `numerics.error_feedback.Solver`.
    """
    step = _short(step_for_rate(weight.values, rate))
    if layer is None or hessian is None:
        codes = np.rint(weight.values.astype(np.float64) / step).astype(np.int64)
        return _made(weight, codes, step, fed_back=False)
    rows = layer.rows()
    exact: Wide = rows.astype(np.float64)
    nearest = few_distinct(np.rint(exact / step).astype(np.int64))
    start: Wide = np.multiply(nearest, step, dtype=np.float64)
    solver = Solver(hessian, damping=damping, act_order=True, sweeps=0)
    every = np.full((1, 1, 1), np.inf)
    points = Points(np.full((1, 1, 1), step), -every, every, free=rows != 0)
    found = few_distinct(np.rint(solver.solve(rows, start, points) / step).astype(np.int64))
    plain_error = output_error(exact - start, hessian).sum()
    better = output_error(exact - found * step, hessian).sum() < plain_error
    chosen = found if better else nearest
    codes = layer.from_rows(chosen, np.int64)
    return _made(weight, codes, step, fed_back=bool(better))


def layer_hessian(layer: RoundedLayer, grams: Sequence[Mapping[Key, Gram]]) -> Wide:
    """The sum over its uses and over parts of the samples; shape (G, K, K).

    An input that two nodes multiply with the weight counts twice: so do its errors.
    """
    groups, size = layer.shape
    total = np.zeros((groups, size, size))
    for part in grams:
        for key in layer.keys:
            total += part[key].matrix
    return total


def _made(weight: Weight, codes: npt.NDArray[np.int64], step: float, *, fed_back: bool) -> Rounded:
    codes = few_distinct(codes)
    largest = float(np.finfo(weight.dtype).max)
    # Rounding up may pass the end of float16.
    values = (codes * step).clip(-largest, largest).astype(weight.dtype) + weight.dtype.type(0)
    return Rounded(values, step, entropy_bits(codes), fed_back)


def _short(step: float) -> float:
    """Of few significant bits, not finer than `step`."""
    mantissa, exponent = np.frexp(step)
    return float(np.ldexp(np.ceil(np.ldexp(mantissa, _STEP_BITS)), exponent - _STEP_BITS))
