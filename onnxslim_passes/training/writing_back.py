"""The way back: tuned values into the model as it was given."""

from collections.abc import Mapping, Sequence

import numpy as np

from onnxslim_passes.model import Constant, Model
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.forward import state_name
from onnxslim_passes.training.naming import constants_by_name
from onnxslim_passes.training.parameters import Array, Constraint

__all__ = ["write_back"]


def write_back(
    model: Model, constraints: Sequence[Constraint], state: Mapping[str, Array]
) -> tuple[Decision, ...]:
    """Writes a state into the model that it was made of: only values of weights change.

    Args:
        model: edited in place.
        constraints: of the program; they say where each tensor belongs.
        state: trainable tensors, buffers and running statistics by name; others are passed over.

    Returns:
        A decision for every constrained weight.
    """
    constants = constants_by_name(model)
    decisions = []
    for constraint in constraints:
        arrays = {**constraint.trainable(), **constraint.buffers()}
        for key in arrays:
            arrays[key] = np.asarray(state.get(state_name(constraint, key), arrays[key]))
        changed = _write(constants, constraint.written(arrays))
        reason = f"tuned ({constraint.kind})" if changed else "tuning left it as it was"
        decisions.append(Decision(where=constraint.where, taken=changed, reason=reason))
    for name, array in state.items():
        if name in constants:
            changed = _write(constants, {name: array})
            reason = "running statistics moved along" if changed else "statistics did not move"
            decisions.append(Decision(where=constants[name].where, taken=changed, reason=reason))
    return tuple(decisions)


def _write(constants: Mapping[str, Constant], values: Mapping[str, Array]) -> bool:
    changed = False
    for name, array in values.items():
        constant = constants[name]
        before = constant.values
        fitted = np.asarray(array).astype(before.dtype).reshape(before.shape)
        if fitted.tobytes() != before.tobytes():
            constant.values, changed = fitted, True
    return changed
