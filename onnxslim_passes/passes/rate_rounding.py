"""Weights rounded to multiples of one step, for the output of their layer where that is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.calibration.hessians import Gram, Key
from onnxslim_passes.model import Weight
from onnxslim_passes.numerics.error_feedback import Wide
from onnxslim_passes.numerics.rates import (
    entropy_bits,
    round_to_step,
    short_step,
    step_for_rate,
)
from onnxslim_passes.passes.rounded_layers import RoundedLayer

__all__ = ["Rounded", "layer_hessian", "round_to_rate"]

Array = npt.NDArray[Any]


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
    step = short_step(step_for_rate(weight.values, rate))
    if layer is None or hessian is None:
        codes, fed_back = round_to_step(weight.values.reshape(1, 1, -1), step)
        codes = codes.reshape(weight.shape)
    else:
        codes, fed_back = round_to_step(layer.rows(), step, hessian, damping=damping)
        codes = layer.from_rows(codes, np.int64)
    largest = float(np.finfo(weight.dtype).max)
    # Rounding up may pass the end of float16; adding 0 turns -0.0 into 0.0.
    values = (codes * step).clip(-largest, largest).astype(weight.dtype) + weight.dtype.type(0)
    return Rounded(values, step, entropy_bits(codes), fed_back)


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
