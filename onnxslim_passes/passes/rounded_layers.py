"""Layers whose weights can be rounded for their outputs: those whose inputs are seen.

A weight of a MatMul, Gemm or Conv of the main graph is a matrix of outputs by inputs, for each
group; `calibration.hessians` sums the products of these inputs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.calibration.hessians import Key, Layout, Patches, Vectors
from onnxslim_passes.model import Constant, Model, Node, Use, Weight
from onnxslim_passes.model.exporting import sorted_nodes

__all__ = ["RoundedLayer", "in_order", "rounded_layer"]

Array = npt.NDArray[Any]

_DTYPES = frozenset((np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)))


@dataclass(frozen=True)
class RoundedLayer:
    """A weight and what it is multiplied with.

    Attributes:
        weight: the weight.
        keys: its inputs, one for each use, all of one shape (G, K).
        transposed: outputs are along the weight's last axis, not its first.
    """

    weight: Weight
    keys: tuple[Key, ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(G, K)."""
        return self.keys[0][1].shape

    def rows(self) -> Array:
        """The weight as (G, N, K): outputs of each group, inputs of each output."""
        values = self.weight.values
        groups, size = self.shape
        return (values.T if self.transposed else values).reshape(groups, -1, size)

    def from_rows(self, rows: Array, dtype: npt.DTypeLike | None = None) -> Array:
        """Rows as they stand in the weight, in its dtype or another one."""
        shape = self.weight.shape
        values = rows.astype(self.weight.dtype if dtype is None else dtype)
        if self.transposed:
            return np.ascontiguousarray(values.reshape(shape[::-1]).T)
        return values.reshape(shape)


def rounded_layer(model: Model, weight: Weight) -> RoundedLayer | str:
    """The layer of a weight of role "weight", or why what it is multiplied with is not known."""
    return _objection(model, weight) or _layer(weight)


def in_order(model: Model, layers: list[RoundedLayer]) -> list[RoundedLayer]:
    """Layers in the order in which they run."""
    order = {node: number for number, node in enumerate(sorted_nodes(model.graph))}
    return sorted(layers, key=lambda layer: min(order[node] for node in layer.weight.nodes))


def _objection(model: Model, weight: Weight) -> str:
    """Why the inputs of a weight cannot be known, or why it must stay; "" for a candidate."""
    if weight.dtype not in _DTYPES:
        return f"it is {weight.dtype.name}, whose own steps are too wide for a grid"
    for use in weight.uses:
        reason = _use_objection(model, weight, use)
        if reason:
            return reason
    return ""


def _use_objection(model: Model, weight: Weight, use: Use) -> str:
    node = use.node
    if node.graph is not model.graph:
        place = "a function" if node.graph.is_function else "the body of a control-flow node"
        return f"{node.where} stands in {place}, where inputs are not collected"
    if use.role != "weight":
        return f"it also feeds {node.where} ({node.op}), as {use.role}"
    if node.domain or node.op not in ("MatMul", "Gemm", "Conv"):
        return f"taken by {node.op}; only MatMul, Gemm and Conv are rounded"
    if not use.direct:
        return f"another node stands between it and {node.where}; run fold-constants first"
    if isinstance(node.inputs[1 - use.input_index], Constant):
        return f"{node.where} takes constants only; run fold-constants first"
    if node.op != "Conv" and len(weight.shape) != 2:
        return f"it has shape {weight.shape}; of MatMul and Gemm only matrices are rounded"
    return ""


def _layer(weight: Weight) -> RoundedLayer | str:
    """The layer of a weight, or how its uses differ in what they see."""
    first = weight.uses[0]
    layer = RoundedLayer(
        weight=weight,
        keys=tuple(
            (str(use.node.inputs[1 - use.input_index].name), _layout(use, weight.shape))
            for use in weight.uses
        ),
        transposed=_outputs_last(first),
    )
    for use, (_, layout) in zip(weight.uses, layer.keys, strict=True):
        if layout.shape != layer.shape or _outputs_last(use) != layer.transposed:
            return f"{first.node.where} and {use.node.where} take it along different axes"
    return layer


def _outputs_last(use: Use) -> bool:
    """Whether outputs are along the last axis of the weight, not along its first."""
    node, index = use.node, use.input_index
    if node.op == "MatMul":
        return index == 1
    if node.op == "Gemm":
        flipped = bool(node.attr("transB" if index else "transA", 0))
        return flipped != bool(index)
    return False


def _layout(use: Use, shape: tuple[int, ...]) -> Layout:
    """How a use sees its other input."""
    node, index = use.node, use.input_index
    if node.op == "Conv":
        return _patches(node, shape)
    size = shape[0] if _outputs_last(use) else shape[1]
    if node.op == "MatMul":
        return Vectors(size, -1 if index == 1 else -2)
    flipped = bool(node.attr("transA" if index else "transB", 0))
    return Vectors(size, -1 if flipped != bool(index) else -2)


def _patches(node: Node, shape: tuple[int, ...]) -> Patches:
    rank = len(shape) - 2
    group = int(node.attr("group", 1))
    ones = [1] * rank
    return Patches(
        channels=shape[1] * group,
        group=group,
        kernel=shape[2:],
        strides=tuple(node.attr("strides") or ones),
        dilations=tuple(node.attr("dilations") or ones),
        pads=tuple(node.attr("pads") or [0] * 2 * rank),
        auto_pad=str(node.attr("auto_pad", "NOTSET") or "NOTSET"),
    )
