"""One of the two models, with what its tensors are made of and taken by."""

from collections.abc import Collection

import onnx
from onnx import TensorProto, numpy_helper

from onnxslim_passes.evaluation.transplant.names import free_names, rename_functions
from onnxslim_passes.model import Model, TensorType

_RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial")
)


class Side:
    """One of the two models, as messages.

    Attributes:
        proto: the model.
        nodes: of its main graph, in order.
        initializers: of its main graph, by name.
        inputs: names of what it is fed.
        outputs: names of its outputs.
        maker: tensor -> the number of its node.
        made: tensors that nodes make, in order.
        takers: tensor -> the nodes that take it.
        fixed: tensors that do not depend on inputs.
        types: element types and shapes, as far as they are known.
    """

    def __init__(self, model: Model, *, suffix: str) -> None:
        self.proto = model.to_proto(dense=True)
        graph = self.proto.graph
        rename_functions(self.proto, suffix)
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [entry.name for entry in graph.input if entry.name not in self.initializers]
        self.outputs = [entry.name for entry in graph.output]
        self.maker = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.made = list(self.maker)
        self.uses = [free_names(node) for node in self.nodes]
        self.takers: dict[str, list[onnx.NodeProto]] = {}
        for node, used in zip(self.nodes, self.uses, strict=True):
            for name in used:
                self.takers.setdefault(name, []).append(node)
        self.fixed = set(self.initializers)
        for node, used in zip(self.nodes, self.uses, strict=True):
            if used <= self.fixed and node.op_type not in _RANDOM:
                self.fixed.update(node.output)
        self.types: dict[str, TensorType] = {}
        types = model.types()
        for node in model.graph.nodes:
            for tensor in node.outputs:
                known = types.of(tensor)
                if known is not None:
                    self.types[str(tensor.name)] = known

    def node(self, tensor: str) -> onnx.NodeProto:
        """The node that makes a tensor."""
        return self.nodes[self.maker[tensor]]

    def only_taker(self, tensor: str) -> onnx.NodeProto | None:
        """The node that takes a tensor, if it is one."""
        takers = self.takers.get(tensor, ())
        return takers[0] if len(takers) == 1 else None

    def results_of(self, tensor: str) -> set[str]:
        """What the nodes that take a tensor make, with all that Q/DQ pairs make of either."""
        found: set[str] = set()
        pending = [(node, True) for node in self.takers.get(tensor, ())]
        while pending:
            node, before = pending.pop()
            pair = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            if pair or before:
                found.update(node.output)
                takers = [taker for name in node.output for taker in self.takers.get(name, ())]
                pending.extend((taker, pair and before) for taker in takers)
        return found

    def elem_type(self, tensor: str) -> int:
        """The element type of a tensor; float32 where it is not known."""
        known = self.types.get(tensor)
        return int(known.elem_type) if known is not None else int(TensorProto.FLOAT)

    def before_pair(self, tensor: str) -> str:
        """The tensor itself, or what it is before a Q/DQ pair that makes it."""
        if tensor not in self.maker or self.node(tensor).op_type != "DequantizeLinear":
            return tensor
        codes = self.node(tensor).input[0]
        if codes not in self.maker or self.node(codes).op_type != "QuantizeLinear":
            return tensor
        source = str(self.node(codes).input[0])
        return source if source in self.maker else tensor

    def between(self, tensor: str, boundary: Collection[str]) -> list[str]:
        """Names of what the nodes make from which a tensor follows, down to `boundary`."""
        found: dict[str, None] = {}
        pending = [tensor]
        while pending:
            name = pending.pop()
            if name in found or name not in self.maker or (name in boundary and name != tensor):
                continue
            found[name] = None
            pending.extend(sorted(self.uses[self.maker[name]]))
        return sorted(found, key=lambda name: self.maker[name])

    def looks_like(self, other: "Side", left: str, right: str) -> bool:
        """Whether a tensor here and one there are the same input, constant, or node's output."""
        if left in self.initializers and right in other.initializers:
            return _equal(self.initializers[left], other.initializers[right])
        if left in self.maker and right in other.maker:
            return _alike_nodes(self.node(left), other.node(right), left, right)
        return left == right and left in self.inputs and right in other.inputs

    def operands(self, other: "Side", left: str, right: str) -> list[tuple[str, str]]:
        """The inputs of the nodes that make two tensors, in pairs."""
        if left not in self.maker:
            return []
        pairs = zip(self.node(left).input, other.node(right).input, strict=True)
        return [(x, y) for x, y in pairs if x or y]


def _alike_nodes(a: onnx.NodeProto, b: onnx.NodeProto, left: str, right: str) -> bool:
    """Whether two nodes do the same to their inputs; bodies are held to be different."""
    if (a.op_type, a.domain, len(a.input)) != (b.op_type, b.domain, len(b.input)):
        return False
    if list(a.output).index(left) != list(b.output).index(right):
        return False
    if any(attribute.HasField("g") or attribute.graphs for attribute in a.attribute):
        return False
    return _attributes(a) == _attributes(b)


def _attributes(node: onnx.NodeProto) -> list[bytes]:
    return sorted(entry.SerializeToString(deterministic=True) for entry in node.attribute)


def _equal(a: TensorProto, b: TensorProto) -> bool:
    if a.data_type != b.data_type or list(a.dims) != list(b.dims):
        return False
    return bool(numpy_helper.to_array(a).tobytes() == numpy_helper.to_array(b).tobytes())
