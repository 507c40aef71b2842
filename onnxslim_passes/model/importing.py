"""From the messages of a file to the graph that passes edit; nothing of the file is dropped.

Every object keeps the message it was read from. What passes do not touch is written back from
there (`exporting`), so that kinds of content this package knows nothing about survive.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from onnxslim_passes.errors import InvalidModelError
from onnxslim_passes.model.ir import Constant, Graph, Node, Variable, declared_type
from onnxslim_passes.model.payload import ArrayPayload, Payload, SparsePayload

Tensors = dict[str, Variable | Constant]
PayloadReader = Callable[[TensorProto], Payload]

DEFAULT_DOMAINS = ("", "ai.onnx")

_VALUE_ATTRIBUTES = (
    "value",
    "sparse_value",
    "value_float",
    "value_floats",
    "value_int",
    "value_ints",
    "value_string",
    "value_strings",
)


class Importer:
    """Builds the graphs of one model.

    Args:
        opset: version of the default domain.
        read: makes a payload of a dense tensor message, wherever its values are.
    """

    def __init__(self, opset: int, read: PayloadReader) -> None:
        self._opset = opset
        self._read = read
        self.names: set[str] = set()

    def main_graph(self, proto: onnx.GraphProto) -> Graph:
        """The main graph and all bodies below it."""
        return self._graph(proto, None, "", {})

    def function(self, proto: onnx.FunctionProto, opset: int) -> Graph:
        """The body of a model-local function; its inputs and outputs have no types."""
        label = f"{proto.domain}::{proto.name}" + (f":{proto.overload}" if proto.overload else "")
        graph = Graph(
            proto.name,
            path=label,
            opset=opset,
            names=self.names,
            is_function=True,
            proto=proto,
        )
        infos = {info.name: info for info in proto.value_info}
        known: Tensors = {name: Variable(name, infos.get(name)) for name in proto.input}
        graph.inputs = [known[name] for name in proto.input]
        graph.declared_inputs = list(graph.inputs)
        self._nodes(graph, proto.node, known, infos, set(proto.output))
        graph.outputs = [self._resolve(name, known, graph) for name in proto.output]
        self._foreign_infos(graph, infos)
        self.names.update(known)
        return graph

    def _graph(
        self, proto: onnx.GraphProto, parent: Graph | None, path: str, outer: Tensors
    ) -> Graph:
        graph = Graph(
            proto.name,
            parent=parent,
            path=path,
            opset=self._opset,
            names=self.names,
            proto=proto,
        )
        infos = {info.name: info for info in proto.value_info}
        local: Tensors = {}
        for constant in self._initializers(graph, proto):
            if constant.name in local:
                raise InvalidModelError(f"Two initializers are called {constant.where!r}.")
            constant.info = infos.get(constant.name)
            constant.was_initializer = True
            local[constant.name] = constant
            graph.initializers.append(constant)
        for info in proto.input:
            declared = local.get(info.name)
            if isinstance(declared, Constant):
                declared.input_info = info
            else:
                declared = local[info.name] = Variable(info.name, info)
                graph.inputs.append(declared)
            graph.declared_inputs.append(declared)
        known = {**outer, **local}
        self.names.update(local)
        outputs = [info.name for info in proto.output]
        self._nodes(graph, proto.node, known, infos, set(outputs))
        graph.output_infos = {info.name: info for info in proto.output}
        graph.outputs = [self._resolve(name, known, graph) for name in outputs]
        for tensor in graph.outputs:
            if isinstance(tensor, Variable) and tensor.info is None:
                tensor.dtype, tensor.shape = declared_type(graph.output_infos[tensor.name])
        self._foreign_infos(graph, infos)
        return graph

    def _foreign_infos(self, graph: Graph, infos: dict[str, onnx.ValueInfoProto]) -> None:
        """Sets apart what is said about captured tensors or about none."""
        own = {tensor.name for node in graph.nodes for tensor in node.outputs}
        for tensor in (*graph.initializers, *graph.inputs, *graph.outputs):
            own.add(tensor.name)
        graph.foreign_infos = [info for name, info in infos.items() if name not in own]
        self.names.update(info.name for info in graph.foreign_infos)

    def _initializers(self, graph: Graph, proto: onnx.GraphProto) -> Iterable[Constant]:
        for tensor in proto.initializer:
            constant = Constant(tensor.name, self._read(tensor), graph)
            constant.describe_like(tensor)
            yield constant
        for sparse in proto.sparse_initializer:
            constant = Constant(sparse.values.name, SparsePayload(sparse), graph)
            constant.describe_like(sparse.values)
            yield constant

    def _nodes(
        self,
        graph: Graph,
        protos: Iterable[onnx.NodeProto],
        known: Tensors,
        infos: dict[str, onnx.ValueInfoProto],
        outputs: set[str],
    ) -> None:
        """Adds the nodes; all outputs exist before any input is bound, since order is not given."""
        made: list[tuple[onnx.NodeProto, Node]] = []
        for index, proto in enumerate(protos):
            lifted = self._lifted_constant(proto, graph, outputs)
            if lifted is not None:
                lifted.source_node, lifted.source_index = proto, index
                lifted.source_payload = lifted.payload
                lifted.info = infos.get(lifted.name)
                known[lifted.name] = lifted
                graph.initializers.append(lifted)
                self.names.update((lifted.name, f"node:{proto.name}"))
                continue
            domain = "" if proto.domain in DEFAULT_DOMAINS else proto.domain
            node = Node(proto.op_type, proto.name, graph, {}, domain, proto)
            node.source_index = node.file_index = index
            for name in proto.output:
                variable = Variable(name, infos.get(name))
                if name:
                    known[name] = variable
                    self.names.add(name)
                node.outputs.append(variable)
            self.names.add(f"node:{proto.name}")
            graph.nodes.append(node)
            made.append((proto, node))
        for proto, node in made:
            # A list: graphsurgeon goes over what it is given twice.
            node.inputs.extend([self._resolve(name, known, graph) for name in proto.input])
            for attribute in proto.attribute:
                value = self._attribute(attribute, node, known)
                node.attrs[attribute.name] = value
                node.imported[attribute.name] = list(value) if isinstance(value, list) else value

    def _resolve(self, name: str, known: Tensors, graph: Graph) -> Variable | Constant:
        if not name:
            return Variable("")
        if name not in known:
            # Some exporters leave a dangling name; the checker's verdict is the source's own.
            known[name] = Variable(name, None)
            self.names.add(name)
        return known[name]

    def _lifted_constant(
        self, proto: onnx.NodeProto, graph: Graph, outputs: set[str]
    ) -> Constant | None:
        """The constant that a `Constant` node makes, or None if it must stay a node."""
        if (
            proto.op_type != "Constant"
            or proto.domain not in DEFAULT_DOMAINS
            or len(proto.output) != 1
            or proto.output[0] in outputs
            or len(proto.attribute) != 1
            or proto.attribute[0].ref_attr_name
            or proto.attribute[0].name not in _VALUE_ATTRIBUTES
        ):
            return None
        payload = self._constant_payload(proto.attribute[0])
        constant = Constant(proto.output[0], payload, graph)
        constant.describe_like(proto.attribute[0].t)
        return constant

    def _constant_payload(self, attribute: AttributeProto) -> Payload:
        kind = attribute.name
        if kind == "value":
            return self._read(attribute.t)
        if kind == "sparse_value":
            return SparsePayload(attribute.sparse_tensor)
        if kind == "value_float":
            return ArrayPayload(np.array(attribute.f, np.float32))
        if kind == "value_floats":
            return ArrayPayload(np.array(attribute.floats, np.float32))
        if kind == "value_int":
            return ArrayPayload(np.array(attribute.i, np.int64))
        if kind == "value_ints":
            return ArrayPayload(np.array(attribute.ints, np.int64))
        if kind == "value_string":
            return ArrayPayload(np.array(attribute.s, object))
        return ArrayPayload(np.array([*attribute.strings, None], object)[:-1])

    def _attribute(self, attribute: AttributeProto, node: Node, known: Tensors) -> Any:
        """A Python value for the common kinds; the message itself for all others."""
        if attribute.ref_attr_name:
            return attribute
        kind = attribute.type
        if kind == AttributeProto.INT:
            return int(attribute.i)
        if kind == AttributeProto.FLOAT:
            return float(attribute.f)
        if kind == AttributeProto.INTS and attribute.ints:
            return list(attribute.ints)
        if kind == AttributeProto.FLOATS and attribute.floats:
            return list(attribute.floats)
        if kind == AttributeProto.TENSOR:
            constant = Constant(attribute.t.name, self._read(attribute.t))
            constant.describe_like(attribute.t)
            return constant
        if kind == AttributeProto.GRAPH:
            return self._graph(attribute.g, node.graph, f"{node.where}/{attribute.name}", known)
        if kind == AttributeProto.GRAPHS:
            return [
                self._graph(body, node.graph, f"{node.where}/{attribute.name}[{index}]", known)
                for index, body in enumerate(attribute.graphs)
            ]
        return self._text(attribute)

    @staticmethod
    def _text(attribute: AttributeProto) -> Any:
        try:
            if attribute.type == AttributeProto.STRING:
                return attribute.s.decode()
            if attribute.type == AttributeProto.STRINGS and attribute.strings:
                return [text.decode() for text in attribute.strings]
        except UnicodeDecodeError:
            pass
        return attribute
