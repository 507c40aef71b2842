"""How much a model's outputs change when one weight alone is pruned.

Measured, not guessed: norms and step sizes of weights rank layers poorly, the change of the output
ranks them well.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from onnxslim_passes.calibration import Samples
from onnxslim_passes.evaluation import compare_outputs
from onnxslim_passes.model import Model
from onnxslim_passes.numerics.ramps import Floats
from onnxslim_passes.numerics.sparsity import apply_mask, magnitude_mask
from onnxslim_passes.runtime import open_session

__all__ = ["LEVELS", "pruning_errors"]

LEVELS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
_FEEDS = 8
_WORST = 1e6


def pruning_errors(
    model: Model, names: Sequence[str], samples: Samples, track: Iterable[int]
) -> Floats:
    """Relative squared error of the outputs for each weight and each of `LEVELS`.

    Args:
        model: stays as it is.
        names: of weights that are pruned, each alone.
        samples: to run on; a few feeds are enough.
        track: counts the weights, for a progress bar; as long as `names`.

    Returns:
        float64, shape (weights, levels); 0 for an output that does not change.
    """
    errors = np.zeros((len(names), len(LEVELS)))
    with open_session(model) as reference:
        feeds = list(samples.feeds(reference.inputs, most=_FEEDS))
        for row, name in zip(track, names, strict=True):
            work = model.copy()
            constant = next(c for c in work.constants() if str(c.name) == name)
            before = constant.values
            for column, level in enumerate(LEVELS[1:], start=1):
                constant.values = apply_mask(before, magnitude_mask(before, level))
                with open_session(work) as candidate:
                    sqnr = compare_outputs(reference, candidate, feeds).sqnr_db
                errors[row, column] = min(_WORST, 10 ** (-sqnr / 10)) if sqnr == sqnr else _WORST
    return errors
