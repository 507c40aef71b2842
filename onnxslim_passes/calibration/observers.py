"""Observers: the range of one tensor over all samples, one piece after the other.

An observer sees a tensor's values in pieces and never keeps them. What it says must not depend on
how the values were cut into pieces; only the moving average depends on the order of samples.

To add one, write a class with `from_options`, `needs_values`, `update` and `range`, and add it to
`OBSERVERS`; `docs/observers.md` shows an example.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

from onnxslim_passes.calibration.clipping import (
    entropy_range,
    least_squares_range,
    percentile_range,
)
from onnxslim_passes.calibration.histogram import Histogram
from onnxslim_passes.errors import UsageError, unknown_name
from onnxslim_passes.runtime import Array


@dataclass(frozen=True, kw_only=True)
class ObserverOptions:
    """What the observers can be told; each takes what it knows.

    Attributes:
        percentile: Of "percentile": the percentage of values inside the range, above 0, up to 100.
        momentum: Of "moving-average": the share of the range so far that stays, in [0, 1).
        levels: Of "entropy" and "mse": how many codes the range will be quantized to, 2 or more.
    """

    percentile: float = 99.999
    momentum: float = 0.9
    levels: int = 256

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        if not 0 < self.percentile <= 100:
            raise UsageError(f"percentile is {self.percentile}; expected above 0 and up to 100.")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum is {self.momentum}; expected 0 or more, below 1.")
        if not 2 <= self.levels <= 1 << 16:
            raise UsageError(f"levels is {self.levels}; expected 2 to 65536.")


class Observer(Protocol):
    """The range of one tensor.

    Attributes:
        needs_values: False if the smallest and the largest value of each sample tell all; then
            these two are what `update` gets, as an array of shape (samples, 2).
    """

    needs_values: ClassVar[bool]

    @classmethod
    def from_options(cls, options: ObserverOptions) -> Self:
        """An observer that has seen nothing."""
        ...

    def update(self, values: Array) -> None:
        """Takes in finite values of any shape, whose first axis counts samples; none is fine."""
        ...

    def range(self) -> tuple[float, float]:
        """The range to be represented, lowest and highest; (nan, nan) before any value."""
        ...


class MinMax:
    """The smallest and the largest value seen."""

    needs_values: ClassVar[bool] = False

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    @classmethod
    def from_options(cls, options: ObserverOptions) -> Self:
        """See `Observer`; there are no options."""
        return cls()

    def update(self, values: Array) -> None:
        """See `Observer`."""
        if values.size:
            self._low = min(self._low, float(values.min()))
            self._high = max(self._high, float(values.max()))

    def range(self) -> tuple[float, float]:
        """See `Observer`."""
        if self._low > self._high:
            return math.nan, math.nan
        return self._low, self._high


class MovingAverage:
    """Averages of the samples' smallest and largest values, the later samples weighing more.

    ``low = momentum * low + (1 - momentum) * min(sample)``, from the first sample's on. Depends on
    the order of samples, not on their grouping. Jacob et al., "Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 3.1.
    """

    needs_values: ClassVar[bool] = False

    def __init__(self, momentum: float = 0.9) -> None:
        self._momentum = momentum
        self._range: tuple[float, float] | None = None

    @classmethod
    def from_options(cls, options: ObserverOptions) -> Self:
        """See `Observer`."""
        return cls(options.momentum)

    def update(self, values: Array) -> None:
        """See `Observer`."""
        if not values.size:
            return
        rows = values.reshape(len(values) if values.ndim else 1, -1)
        kept, taken = self._momentum, 1 - self._momentum
        for low, high in zip(rows.min(axis=1).tolist(), rows.max(axis=1).tolist(), strict=True):
            if self._range is None:
                self._range = (low, high)
            else:
                before = self._range
                self._range = (kept * before[0] + taken * low, kept * before[1] + taken * high)

    def range(self) -> tuple[float, float]:
        """See `Observer`."""
        return self._range if self._range is not None else (math.nan, math.nan)


class _FromHistogram:
    """An observer that chooses the range in the end, from a histogram of all values."""

    needs_values: ClassVar[bool] = True

    def __init__(self, options: ObserverOptions | None = None) -> None:
        self._options = options or ObserverOptions()
        self._seen = Histogram()

    @classmethod
    def from_options(cls, options: ObserverOptions) -> Self:
        """See `Observer`."""
        return cls(options)

    def update(self, values: Array) -> None:
        """See `Observer`."""
        self._seen.update(values)

    def range(self) -> tuple[float, float]:
        """See `Observer`."""
        if not self._seen.total:
            return math.nan, math.nan
        if self._seen.low == self._seen.high:
            return self._seen.low, self._seen.high
        return self._choose(self._seen, self._options)

    def _choose(self, seen: Histogram, options: ObserverOptions) -> tuple[float, float]:
        """The range, of values that are not all the same."""
        raise NotImplementedError


class Percentile(_FromHistogram):
    """The range that all but a small share of the values lie in."""

    def _choose(self, seen: Histogram, options: ObserverOptions) -> tuple[float, float]:
        return percentile_range(seen, options.percentile)


class Entropy(_FromHistogram):
    """The range that keeps most information, by the Kullback-Leibler divergence."""

    def _choose(self, seen: Histogram, options: ObserverOptions) -> tuple[float, float]:
        return entropy_range(seen, options.levels)


class LeastSquares(_FromHistogram):
    """The range with the least squared error of the quantized values."""

    def _choose(self, seen: Histogram, options: ObserverOptions) -> tuple[float, float]:
        return least_squares_range(seen, options.levels)


OBSERVERS: dict[str, type[Observer]] = {
    "min-max": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": LeastSquares,
}


def observer_named(name: str) -> type[Observer]:
    """The observer of that name.

    Raises:
        UnknownNameError: There is none; the message has the nearest name.
    """
    if name not in OBSERVERS:
        raise unknown_name("observer", name, OBSERVERS)
    return OBSERVERS[name]
