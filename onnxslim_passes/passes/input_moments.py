"""How much the errors of a layer's weights count: the mean squares of its inputs.

An output sum_k w_k x_k changes by sum_k dw_k x_k. If inputs do not depend on each other, the mean
square of that is sum_k E[x_k^2] dw_k^2: the diagonal of the layer's Hessian (LeCun, Denker, Solla
1989, Optimal Brain Damage; Kim et al. 2024, SqueezeLLM, with gradients instead of inputs). For a
convolution all positions of the window count as their channel does.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.calibration.statistics import ChannelStatistics, collect_statistics
from onnxslim_passes.model import Constant, Model, Types, Use, Variable, Weight
from onnxslim_passes.passes.base import Progress

__all__ = ["input_importance"]

Array = npt.NDArray[Any]

# Of the mean: inputs that were never on in the samples are not free.
_DAMPING = 0.01


@dataclass(frozen=True)
class _Input:
    """What one use multiplies a weight with.

    Attributes:
        tensor: the other operand.
        axis: of its channels.
        weight_axis: the axis of the weight that is summed over them.
        group: groups of channels.
    """

    tensor: Variable
    axis: int
    weight_axis: int
    group: int = 1


def input_importance(
    model: Model, weights: Iterable[Weight], samples: Samples, progress: Progress
) -> dict[Constant, Array]:
    """The mean squares of what weights are multiplied with, from one run over the samples.

    Args:
        model: stays as it is.
        weights: of `model`.
        samples: the data.
        progress: is shown the feeds.

    Returns:
        For each weight of MatMul, Gemm, Conv and ConvTranspose nodes of the main graph alone:
        float32, > 0, mean 1 or about, of a shape that broadcasts to the weight's. Others are
        missing, and so are those whose inputs were zero, empty or not finite.
    """
    types = model.types()
    found: dict[Weight, list[_Input]] = {}
    axes: dict[str, int] = {}
    for weight in weights:
        inputs = [_input(model, types, use, len(weight.shape)) for use in weight.uses]
        known = [each for each in inputs if each is not None]
        if len(known) < len(inputs):
            continue
        # One axis a tensor: the second layer that takes it along another one does without.
        if all(axes.setdefault(str(each.tensor.name), each.axis) == each.axis for each in known):
            found[weight] = known
    if not found:
        return {}
    tensors = {str(each.tensor.name): each.tensor for known in found.values() for each in known}
    statistics = collect_statistics(
        model,
        list(tensors.values()),
        samples,
        axis={name: axes[name] for name in tensors},
        progress=progress,
        strict=False,
    )
    results = {weight: _importance(weight, known, statistics) for weight, known in found.items()}
    return {weight.constant: result for weight, result in results.items() if result is not None}


def _input(model: Model, types: Types, use: Use, rank: int) -> _Input | None:
    """The input of a use, if its channels are known."""
    node, index = use.node, use.input_index
    if node.graph is not model.graph or not use.direct or node.domain or use.role != "weight":
        return None
    convolution = node.op in ("Conv", "ConvTranspose")
    if not (convolution or node.op in ("MatMul", "Gemm")) or rank < 2:
        return None
    tensor = node.inputs[0 if convolution else 1 - index]
    type_ = types.of(tensor) if isinstance(tensor, Variable) else None
    if type_ is None or type_.rank is None or type_.rank < 2:
        return None
    if node.op == "Conv":
        return _Input(tensor, 1, 1, int(node.attr("group", 1)))
    if node.op == "ConvTranspose":
        return _Input(tensor, 1, 0)
    right = index == 1
    flipped = [bool(node.attr(name, 0)) for name in ("transA", "transB")]
    if node.op == "MatMul":
        flipped = [False, False]
    last = right != flipped[0 if right else 1]  # whether the summed axis of the input is its last
    own_last = right == flipped[index]
    return _Input(tensor, type_.rank - (1 if last else 2), rank - (1 if own_last else 2))


def _importance(
    weight: Weight, inputs: list[_Input], statistics: dict[str, ChannelStatistics]
) -> Array | None:
    total: Array | None = None
    for each in inputs:
        seen = statistics.get(str(each.tensor.name))
        if seen is None or not seen.seen:
            return None
        shaped = _shaped(seen.second_moment * seen.seen, each, weight.shape)
        if shaped is None:
            return None
        total = shaped if total is None else total + shaped
    if total is None or not total.mean() > 0 or not np.isfinite(total).all():
        return None
    relative: Array = (total / total.mean() + _DAMPING).astype(np.float32)
    return relative


def _shaped(moments: Array, where: _Input, shape: tuple[int, ...]) -> Array | None:
    """Moments of channels along the weight's axes; None if their number does not fit."""
    length = shape[where.weight_axis]
    if moments.size != length * where.group or shape[0] % where.group:
        return None
    aligned = [1] * len(shape)
    aligned[where.weight_axis] = length
    if where.group == 1:
        return moments.reshape(aligned)
    rows = np.repeat(moments.reshape(where.group, length), shape[0] // where.group, axis=0)
    aligned[0] = shape[0]
    return rows.reshape(aligned)
