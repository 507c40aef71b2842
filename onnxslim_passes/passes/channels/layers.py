"""Layers that mix channels by a constant weight: Conv, ConvTranspose, Gemm and MatMul.

Each gives its output channel o as

    y[o] = bias[o] + sum over i, k of W[o, i, k] x[i, ...]

where k counts the positions of a kernel (one for Gemm and MatMul). `Layer.matrix` is the weight in
these axes, whatever its layout in the file.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import FLOAT_DTYPES, Constant, Node, Variable
from onnxslim_passes.passes.channels.labels import Ids

__all__ = ["Layer", "constant_objection", "is_padded", "read_layer"]

Array: TypeAlias = npt.NDArray[Any]

_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, eq=False)
class Layer:
    """One of them.

    Attributes:
        node: the node.
        weight: its weight.
        input_axis: axis of the weight along which the input channels lie.
        output_axis: and the output channels.
        addition: of a MatMul, the `Add` of a constant vector behind it, if there is one.
        inputs: labels of the input channels, shape (I,).
        outputs: labels of the output channels, shape (O,).
    """

    node: Node
    weight: Constant
    input_axis: int
    output_axis: int
    addition: Node | None
    inputs: Ids
    outputs: Ids

    def matrix(self) -> Array:
        """The weight as (O, I, K)."""
        moved = np.moveaxis(self.weight.values, (self.output_axis, self.input_axis), (0, 1))
        return moved.reshape(*moved.shape[:2], -1)

    @property
    def bias(self) -> Variable | Constant | None:
        """What is added, if anything."""
        if self.addition is not None:
            first, second = self.addition.inputs
            constant: Constant = first if isinstance(first, Constant) else second
            return constant
        return optional_input(self.node, 2)

    @property
    def shows_constants(self) -> bool:
        """Whether a constant input channel adds the same to every position of the output.

        Padding puts zeros among the constants, and a transposed convolution reaches positions at
        its edges and between its strides with fewer elements of its kernel.
        """
        if self.node.op == "ConvTranspose":
            return False
        return self.node.op != "Conv" or not is_padded(self.node)

    @property
    def factor(self) -> float:
        """What the product is multiplied by."""
        return float(self.node.attr("alpha", 1.0)) if self.node.op == "Gemm" else 1.0

    @property
    def bias_factor(self) -> float:
        """What the bias is multiplied by."""
        return float(self.node.attr("beta", 1.0)) if self.node.op == "Gemm" else 1.0


def read_layer(node: Node) -> tuple[Constant, int, int] | str:
    """Weight, input axis and output axis of a layer; or why its channels are not traced."""
    assert node.op in _OPERATORS
    weight = node.inputs[1]
    objection = constant_objection(weight)
    if objection:
        return f"has a weight that {objection}"
    rank = len(weight.shape)
    if node.op in ("Conv", "ConvTranspose"):
        if node.attr("group", 1) != 1:
            return "works on groups of channels"
        return (weight, 1, 0) if node.op == "Conv" else (weight, 0, 1)
    if rank != 2:
        return f"has a weight of {rank} axes, not a matrix"
    if node.op == "MatMul":
        return weight, 0, 1
    if node.attr("transA", 0):
        return "takes its input transposed"
    return (weight, 1, 0) if node.attr("transB", 0) else (weight, 0, 1)


def constant_objection(tensor: Variable | Constant) -> str:
    """Why channels cannot be taken out of a weight or a bias, or ""."""
    if not isinstance(tensor, Constant):
        return "is not a constant; fold-constants may make it one"
    if tensor.input_info is not None:
        return "is a graph input, whose value a caller may override"
    if tensor.dtype not in FLOAT_DTYPES:
        return f"is of type {tensor.dtype}"
    if tensor.owner is not None and tensor in tensor.owner.outputs:
        return "is an output of its graph, too"
    return ""


def optional_input(node: Node, index: int) -> Variable | Constant | None:
    """An input that may be left out."""
    if len(node.inputs) <= index or node.inputs[index].is_empty():
        return None
    tensor: Variable | Constant = node.inputs[index]
    return tensor


def is_padded(node: Node) -> bool:
    """Whether a convolution or a pooling may reach beyond the edges of its input."""
    if node.attr("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        return True
    return any(node.attr("pads") or ())
