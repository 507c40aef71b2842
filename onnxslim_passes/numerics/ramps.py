"""How sparsity rises while a network is trained, and how it is shared out among layers.

Zhu and Gupta: "To prune, or not to prune: exploring the efficacy of pruning for model compression",
2017, arXiv:1710.01878, equation 1, is the cubic ramp.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Ramp", "ramp", "shared_out"]

Ramp = Literal["cubic", "linear", "steps"]

_STEPS = 4
_BISECTIONS = 60

Floats = npt.NDArray[np.float64]


def ramp(share: float, kind: Ramp) -> float:
    """How much of the way to the final sparsity is done, from 0 to 1.

    Args:
        share: of the time, in [0, 1].
        kind: "cubic" removes most at first, ``1 - (1 - share)^3``; "linear" in proportion; "steps"
            in four equal steps, the first at once.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected a fraction in [0, 1]")
    if kind == "cubic":
        return 1 - (1 - share) ** 3
    if kind == "linear":
        return share
    return min(_STEPS, int(share * _STEPS) + 1) / _STEPS


def shared_out(
    sizes: Sequence[int], levels: Sequence[float], errors: Floats, sparsity: float
) -> list[float]:
    """A sparsity for each layer, such that all together reach one at the least sum of errors.

    The sum is minimized over the given levels under a bound on the elements kept, by a multiplier
    of Lagrange: for a price p of an element each layer takes the level of least
    ``error + p * kept``, and the price rises until few enough are kept. What remains to the bound
    is given by interpolation between the two last prices.

    Args:
        sizes: elements of each layer.
        levels: sparsities at which errors were measured, increasing, in [0, 1].
        errors: shape (layers, levels), finite, >= 0.
        sparsity: of all layers together, in [0, 1].

    Raises:
        ValueError: no level reaches `sparsity`, or shapes do not fit.
    """
    counts, tried = np.asarray(sizes, np.float64), np.asarray(levels, np.float64)
    if errors.shape != (counts.size, tried.size) or not (np.diff(tried) > 0).all():
        raise ValueError("errors need one row a layer and one column a level, levels increasing")
    if not tried[0] <= sparsity <= tried[-1]:
        raise ValueError(f"sparsity is {sparsity}; levels reach from {tried[0]} to {tried[-1]}")
    if not counts.size:
        return []
    # More zeros never help: an error that falls is noise.
    rising = np.maximum.accumulate(errors, axis=1)
    kept = counts[:, None] * (1 - tried)
    bound = counts.sum() * (1 - sparsity)

    def choose(price: float) -> npt.NDArray[np.intp]:
        chosen: npt.NDArray[np.intp] = np.argmin(rising + price * kept, axis=1)
        return chosen

    def total(choice: npt.NDArray[np.intp]) -> float:
        return float(np.take_along_axis(kept, choice[:, None], 1).sum())

    low, high = 0.0, max(1.0, float(rising.max())) * 4
    while total(choose(high)) > bound and high < 1e30:
        high *= 4
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if total(choose(middle)) > bound:
            low = middle
        else:
            high = middle
    above, below = choose(low), choose(high)
    most, least = total(above), total(below)
    weight = 0.0 if most <= least else float(np.clip((bound - least) / (most - least), 0, 1))
    mixed = (1 - weight) * tried[below] + weight * tried[above]
    return [float(level) for level in mixed]
