"""Observers: the statistics of one tensor over all samples, one piece after the other.

An observer sees a tensor's values in pieces and never keeps them. What it says must not depend on
how the values were cut into pieces.
"""

import math
from typing import Protocol

import numpy as np

from onnxslim_passes.runtime import Array


class Observer(Protocol):
    """The statistics of one tensor."""

    def update(self, values: Array) -> None:
        """Takes in finite values of any shape; none at all is fine."""
        ...

    def range(self) -> tuple[float, float]:
        """The range to be represented, lowest and highest; (nan, nan) before any value."""
        ...


class MinMax:
    """The smallest and the largest value seen."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def update(self, values: Array) -> None:
        """See `Observer`."""
        if np.size(values):
            self._low = min(self._low, float(np.min(values)))
            self._high = max(self._high, float(np.max(values)))

    def range(self) -> tuple[float, float]:
        """See `Observer`."""
        if self._low > self._high:
            return math.nan, math.nan
        return self._low, self._high
