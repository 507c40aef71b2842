"""Weights that a file stores as integers behind a DequantizeLinear already.

Such a model may be half-way: int8 weights to make the file small, float activations. The weights'
grid is given then; what is missing are pairs on the activations.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnxslim_passes.model import Constant, Node, Use, Weight
from onnxslim_passes.numerics.affine import AffineGrid
from onnxslim_passes.passes.placement.operators import WEIGHT_OPERATORS

_CODES = (np.dtype(np.int8), np.dtype(np.uint8))


@dataclass(frozen=True)
class Stored:
    """A weight behind a DequantizeLinear.

    Attributes:
        codes: the integers.
        grid: what they stand for; None with an objection.
        objection: why an integer kernel cannot take them as they are, or None.
    """

    codes: Constant
    grid: AffineGrid | None
    objection: str | None


def stored_of(node: Node) -> Stored | None:
    """The stored weight of a node with weights, or None if it has none."""
    right = node.inputs[1]
    restore = None if isinstance(right, Constant) or not right.inputs else right.inputs[0]
    if restore is None or restore.op != "DequantizeLinear" or restore.domain:
        return None
    codes = restore.inputs[0]
    if not isinstance(codes, Constant):
        return None
    objection = _objection(node, restore, codes)
    grid = _grid(restore, codes) if objection is None else None
    return Stored(codes, grid, objection)


def stored_weights(nodes: Iterable[Node]) -> dict[Constant, Weight]:
    """The codes of all stored weights of `nodes`, each with the nodes that take it as a weight."""
    uses: dict[Constant, list[Use]] = {}
    for node in nodes:
        stored = stored_of(node)
        if stored is not None:
            axis = _channel_axis(node, stored.codes)
            use = Use(node=node, input_index=1, role="weight", channel_axis=axis, direct=True)
            uses.setdefault(stored.codes, []).append(use)
    return {codes: Weight(codes, tuple(users)) for codes, users in uses.items()}


def _objection(node: Node, restore: Node, codes: Constant) -> str | None:
    reason = "its weight is stored as integers behind DequantizeLinear already"
    if codes.dtype not in _CODES:
        return f"{reason}, as {codes.dtype.name}: the integer kernels take int8 and uint8"
    if any(not isinstance(tensor, Constant) for tensor in restore.inputs):
        return f"{reason}, with a scale that is computed"
    if any(tensor.input_info is not None for tensor in restore.inputs):
        return f"{reason}, and is an input of the model, which a caller may override"
    scale = restore.inputs[1]
    if scale.dtype != np.dtype(np.float32) or not _usable(scale):
        return f"{reason}, with a scale that is not positive float32"
    axis = restore.attr("axis", 1)
    per_channel = scale.size > 1
    if restore.attr("block_size", 0) or len(scale.shape) > 1:
        return f"{reason}, with a scale for each block"
    rank = len(codes.shape)
    if rank < 2 or (per_channel and axis % rank != _channel_axis(node, codes)):
        return f"{reason}, with scales along axis {axis}, which is not the output channels'"
    if node.op == "Gemm" and (node.attr("alpha", 1.0), node.attr("beta", 1.0)) != (1.0, 1.0):
        return f"{reason}, and Gemm's alpha or beta is not 1"
    strangers = [t.where for t in restore.outputs[0].outputs if not _takes_as_weight(t, restore)]
    if strangers:
        return f"{reason}, and feeds {strangers[0]} in float, too"
    return None


def _takes_as_weight(node: Node, restore: Node) -> bool:
    places = [i for i, tensor in enumerate(node.inputs) if tensor is restore.outputs[0]]
    return node.op in WEIGHT_OPERATORS and not node.domain and places == [1]


def _usable(scale: Constant) -> bool:
    values = scale.values
    return bool(np.isfinite(values).all() and (values > np.finfo(np.float32).tiny).all())


def _channel_axis(node: Node, codes: Constant) -> int:
    """The output channels' axis of a weight of `node`."""
    if node.op == "Conv":
        return 0
    if node.op == "Gemm":
        return 0 if node.attr("transB", 0) else 1
    return 1 if node.op == "ConvTranspose" else len(codes.shape) - 1


def _grid(restore: Node, codes: Constant) -> AffineGrid:
    scale = restore.inputs[1].values
    axis = int(restore.attr("axis", 1)) % len(codes.shape) if scale.size > 1 else None
    shape = () if axis is None else scale.shape
    zero_point = np.zeros(shape, codes.dtype)
    if len(restore.inputs) > 2:
        zero_point = restore.inputs[2].values.reshape(shape)
    limits = np.iinfo(codes.dtype)
    return AffineGrid(
        scale=np.asarray(scale.reshape(shape)),
        zero_point=zero_point,
        dtype=codes.dtype,
        axis=axis,
        qmin=int(limits.min),
        qmax=int(limits.max),
    )
