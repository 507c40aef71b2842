"""Which tensors of a model are stored weights: so that storing twice changes nothing.

A stored weight is computed from constants alone, by the operators of decoders, one of which
enlarges: an Expand of one value, a Gather by codes, a Cast to a wider type, a product of codes and
scales, or values scattered to their positions. A chain that only moves a constant about (a
Transpose, a Reshape) is part of the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from onnxslim_passes.model import Constant, Graph, Model, Node, Variable
from onnxslim_passes.storage.base import FUNCTION_DOMAIN

Tensor = Variable | Constant

# What decoders are built of.
_DECODER_OPS = frozenset(
    [
        *("Add", "Cast", "Compress", "Concat", "CumSum", "Div", "Expand", "Gather"),
        *("GatherElements", "Mod", "Mul", "NonZero", "Range", "Reshape", "ScatterElements"),
        *("Shape", "Sign", "Size", "Slice", "Sub", "Transpose", "Where"),
    ]
)
_NARROW = frozenset(
    np.dtype(kind)
    for kind in (
        *(np.int8, np.uint8, np.float16, ml_dtypes.bfloat16),
        *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
)


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight that a decoder rebuilds.

    Attributes:
        graph: where.
        rebuilt: the decoder's output, which bears the weight's name.
        nodes: all nodes of the decoder, other decoders' among them where they share some.
        constants: the constants they take.
    """

    graph: Graph
    rebuilt: Variable
    nodes: frozenset[Node]
    constants: frozenset[Constant]


def stored_weights(model: Model) -> Iterator[StoredWeight]:
    """The stored weights of a model, in the order of its nodes."""
    search = _Search(model)
    for graph in model.graphs():
        for node in graph.nodes:
            for tensor in node.outputs:
                if search.is_rebuilt(tensor) and search.is_taken(tensor, graph):
                    nodes, constants = _cone(tensor)
                    if any(_enlarges(each) for each in nodes):
                        yield StoredWeight(graph, tensor, frozenset(nodes), frozenset(constants))


def decoder_constants(model: Model) -> set[Constant]:
    """The constants under the decoders of a model."""
    return {constant for stored in stored_weights(model) for constant in stored.constants}


class _Search:
    """What is known about the tensors of one model."""

    def __init__(self, model: Model) -> None:
        self._known: dict[Tensor, bool] = {}
        self._functions = {
            function.proto.name
            for function in model.functions
            if function.proto.domain == FUNCTION_DOMAIN
            and all(not node.domain and node.op in _DECODER_OPS for node in function.nodes)
        }

    def is_taken(self, tensor: Variable, graph: Graph) -> bool:
        """Whether anything but another part of a decoder takes a rebuilt tensor."""
        if tensor in graph.outputs:
            return True
        takers = dict.fromkeys(tensor.outputs)
        return any(not all(self.is_rebuilt(made) for made in taker.outputs) for taker in takers)

    def is_rebuilt(self, start: Tensor) -> bool:
        """Whether a tensor depends on constants alone, through the operators of decoders."""
        known = self._known
        pending = [start]
        while pending:
            tensor = pending[-1]
            if tensor in known:
                pending.pop()
            elif isinstance(tensor, Constant):
                known[tensor] = tensor.input_info is None
            elif not tensor.inputs or not self._may_decode(tensor.inputs[0]):
                known[tensor] = False
            else:
                inputs = tensor.inputs[0].inputs
                unknown = [operand for operand in inputs if operand not in known]
                pending.extend(unknown)
                if not unknown:
                    known[tensor] = all(known[operand] for operand in inputs)
        return known[start]

    def _may_decode(self, node: Node) -> bool:
        if node.domain == FUNCTION_DOMAIN:
            return node.op in self._functions
        return not node.domain and node.op in _DECODER_OPS


def _enlarges(node: Node) -> bool:
    if node.op == "Cast":
        return isinstance(node.inputs[0], Constant) and node.inputs[0].dtype in _NARROW
    if node.op == "ScatterElements" or node.domain == FUNCTION_DOMAIN:
        return True
    if len(node.inputs) != 2:
        return False
    data, second = node.inputs
    if node.op == "Expand":
        return isinstance(data, Constant) and data.size == 1 and isinstance(second, Constant)
    if node.op == "Mul":
        makers = [maker.op for tensor in node.inputs for maker in tensor.inputs]
        return len(makers) == 2 and set(makers) <= {"Reshape", "Sub"}
    # A table of positions taken by constant indices is no codebook: codes pass through a node.
    return node.op in ("Gather", "GatherElements") and isinstance(second, Variable)


def _cone(root: Variable) -> tuple[set[Node], set[Constant]]:
    """All that a rebuilt tensor is computed from."""
    nodes: set[Node] = set()
    constants: set[Constant] = set()
    pending: list[Node] = [root.inputs[0]]
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for tensor in node.inputs:
            if isinstance(tensor, Constant):
                constants.add(tensor)
            else:
                pending.append(tensor.inputs[0])
    return nodes, constants
