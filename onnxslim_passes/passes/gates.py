"""Gates: products of an activation with one number a channel that the network itself computes.

    z = x * g,    x (N, C, H, W),    g (N, C, 1, 1)

as squeeze-and-excitation has them (Hu et al., CVPR 2018). A factor for each channel of z can go
into g, which takes C multiplications and not C H W.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import Model, Node, Types, Variable

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Gate:
    """A Mul, which of its operands is the gate, and how many axes that has."""

    node: Node
    index: int
    rank: int


def gate_before(model: Model, tensor: Variable, types: Types) -> Gate | None:
    """The gate that makes a tensor of the main graph, or None."""
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None or maker.op != "Mul" or maker.domain or maker.graph is not model.graph:
        return None
    shapes = [known.shape if (known := types.of(held)) else None for held in maker.inputs]
    if any(shape is None or len(shape) < 3 for shape in shapes):
        return None
    for index, shape in enumerate(shapes):
        other = shapes[1 - index]
        if shape is None or other is None or not isinstance(maker.inputs[index], Variable):
            continue
        if all(size == 1 for size in shape[2:]) and any(size != 1 for size in other[2:]):
            return Gate(maker, index, len(shape))
    return None


def divide_gate(model: Model, gate: Gate, factors: Array) -> None:
    """Divides a gate by factors > 0, float64 (C,), for its Mul alone."""
    held = gate.node.inputs[gate.index]
    shape = [1, len(factors), *[1] * (gate.rank - 2)]
    divisor = model.graph.add_constant(
        f"{held.name}_smoothing", (1 / factors).astype(np.float32).reshape(shape)
    )
    made = model.graph.add_node("Mul", [held, divisor], outputs=[f"{held.name}_smoothed"])
    gate.node.inputs[gate.index] = made.outputs[0]
