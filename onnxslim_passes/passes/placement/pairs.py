"""int8 weights whose products x86 CPUs without VNNI can add in 16 bits.

Their kernels add the products of two neighbouring weights in saturating 16 bits. Which weights are
neighbours follows from the layout that ONNX Runtime packs: input channels innermost, behind the
positions of a convolution's window.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Node
from onnxslim_passes.numerics.affine import AffineGrid, minimum_pair_scale, quantize
from onnxslim_passes.report.records import Decision

Array = npt.NDArray[Any]

PAIR_LIMIT = 128  # 255 * 128 < 2 ** 15, the largest sum of two products


def adding_order(node: Node, weights: Array) -> Array:
    """A node's weights (or codes) as rows (output channels, summands), in the order of addition.

    A depthwise convolution has rows of one summand, because its kernel widens every product, and
    so has every operator without an integer kernel.

    Args:
        node: takes `weights` as its second input.
        weights: of rank 2 or, for a Conv, more.
    """
    depthwise = weights.shape[1] == 1 and node.attr("group", 1) == weights.shape[0]
    if node.op == "Conv" and not depthwise:
        return np.moveaxis(weights, 1, -1).reshape(weights.shape[0], -1)
    if node.op not in ("MatMul", "Gemm"):
        return weights.reshape(-1, 1)
    return weights if node.op == "Gemm" and node.attr("transB", 0) else weights.T


def pair_scale(node: Node, weights: Array, axis: int | None) -> npt.NDArray[np.float64]:
    """The smallest scales at which no pair saturates: (C,) where pairs matter, else ()."""
    scales = minimum_pair_scale(adding_order(node, weights))
    return scales if axis is not None and scales.any() else np.asarray(scales.max(initial=0.0))


def raising_scale(
    node: Node, weights: Array, axis: int | None, grid: AffineGrid
) -> npt.NDArray[np.float64]:
    """The scales that weights need whose codes on a grid saturate; 0 where none does.

    Weights that were rounded to this grid before keep it, as long as their codes fit.
    """
    codes = adding_order(node, quantize(weights, grid)).astype(np.int64)
    sums = np.abs(codes[:, :-1] + codes[:, 1:]).max(axis=1, initial=0)
    scales = pair_scale(node, weights, axis)
    return np.where((sums if scales.ndim else sums.max(initial=0)) > PAIR_LIMIT, scales, 0.0)


def largest_pair(node: Node, codes: npt.NDArray[np.int8]) -> int:
    """The largest absolute sum of two neighbouring codes; 0 if there are no neighbours."""
    rows = adding_order(node, codes).astype(np.int64)
    return int(np.abs(rows[:, :-1] + rows[:, 1:]).max(initial=0))


def pairs_fit(node: Node, codes: npt.NDArray[np.int8]) -> bool:
    """Whether no pair of products of these codes with uint8 activations saturates 16 bits."""
    return largest_pair(node, codes) <= PAIR_LIMIT


def pairs_decision(target: str) -> Decision:
    """What is to be said where int8 weights were scaled so that pairs fit."""
    return Decision(
        where=target,
        taken=True,
        reason="kernels of this target add two products in saturating 16 bits (no VNNI): int8 "
        "weights have scales at which none does; reduce_range=false for other CPUs",
    )
