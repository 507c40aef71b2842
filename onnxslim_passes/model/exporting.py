"""From the edited graph back to messages; what nobody touched is written as it was read.

A message is copied field by field except for what the graph holds, so that fields of newer ONNX
versions come through too. How tensors are written is the caller's choice (`TensorWriter`): held in
the message, moved to a file beside the model, or left out for shape inference.
"""

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper

from onnxslim_passes.errors import InvalidModelError
from onnxslim_passes.model.importing import DEFAULT_DOMAINS
from onnxslim_passes.model.ir import Constant, Graph, Node, Variable
from onnxslim_passes.model.payload import SparsePayload

TensorWriter = Callable[[Constant], TensorProto]

# Before IR version 4 every initializer had to be a graph input; a `Constant` node needs no input.
FIRST_IR_WITH_FREE_INITIALIZERS = 4


def held(constant: Constant) -> TensorProto:
    """The writer that puts all values into the message."""
    return constant.payload.tensor(constant.name)


def copy_fields(source: Any, target: Any, *, but: Collection[str]) -> None:
    """Copies all set fields of a message except those named."""
    for field, value in source.ListFields():
        if field.name in but:
            continue
        destination = getattr(target, field.name)
        if hasattr(destination, "MergeFrom"):
            destination.MergeFrom(value)
        elif hasattr(destination, "extend"):
            destination.extend(value)
        else:
            setattr(target, field.name, value)


def captured_inputs(node: Node) -> Iterator[Variable | Constant]:
    """All tensors that a node or any node in its bodies takes, named ones only."""
    pending = [node]
    while pending:
        current = pending.pop()
        yield from (tensor for tensor in current.inputs if not tensor.is_empty())
        for _, body in current.bodies():
            yield from body.outputs
            pending.extend(body.nodes)


def sorted_nodes(graph: Graph) -> list[Node]:
    """The nodes of one graph, each behind what it needs; the order of the file where it is one.

    Raises:
        InvalidModelError: if the graph has a cycle.
    """
    place = {id(node): index for index, node in enumerate(graph.nodes)}
    waiting: list[int] = []
    followers: list[list[int]] = [[] for _ in graph.nodes]
    for index, node in enumerate(graph.nodes):
        makers = {
            place[id(maker)]
            for tensor in captured_inputs(node)
            for maker in tensor.inputs
            if id(maker) in place and maker is not node
        }
        waiting.append(len(makers))
        for maker_index in makers:
            followers[maker_index].append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[Node] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(graph.nodes[index])
        for follower in followers[index]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heapq.heappush(ready, follower)
    if len(order) != len(graph.nodes):
        stuck = next(node for node, count in zip(graph.nodes, waiting, strict=True) if count)
        raise InvalidModelError(
            f"Node {stuck.where!r} needs its own output: the graph has a cycle."
        )
    return order


class Exporter:
    """Writes the graphs of one model.

    Args:
        ir_version: decides whether a constant may be an initializer.
        write: how dense tensors are written.
        dense: write sparse initializers as dense ones.
    """

    def __init__(self, ir_version: int, write: TensorWriter = held, *, dense: bool = False) -> None:
        self._free_initializers = ir_version >= FIRST_IR_WITH_FREE_INITIALIZERS
        self._write = write
        self._dense = dense

    def graph(self, graph: Graph, target: onnx.GraphProto) -> None:
        """Writes the main graph or a body into `target`."""
        _adopt_orphans(graph)
        if graph.proto is not None:
            but = ("node", "initializer", "sparse_initializer", "input", "output", "value_info")
            copy_fields(graph.proto, target, but=but)
        target.name = graph.name
        nodes = sorted_nodes(graph)
        as_nodes = []
        for constant in graph.initializers:
            # Shape inference does not see sparse initializers, but it sees sparse Constant nodes.
            sparse_node = constant.sparse and constant.source_node is not None
            if (self._free_initializers and not sparse_node) or constant.was_initializer:
                self.initializer(constant, target)
            else:
                as_nodes.append(constant)
        target.node.extend(self._in_order(nodes, as_nodes))
        self._declarations(graph, nodes, target)

    def function(self, graph: Graph, target: onnx.FunctionProto) -> None:
        """Writes a model-local function; it has no initializers, only `Constant` nodes."""
        _adopt_orphans(graph)
        copy_fields(graph.proto, target, but=("node", "input", "output", "value_info"))
        target.input.extend(tensor.name for tensor in graph.inputs)
        target.output.extend(tensor.name for tensor in graph.outputs)
        nodes = sorted_nodes(graph)
        target.node.extend(self._in_order(nodes, graph.initializers))
        target.value_info.extend(_value_infos(graph, nodes))

    def initializer(self, constant: Constant, target: onnx.GraphProto) -> None:
        """Writes a constant as an initializer, dense or sparse."""
        payload = constant.payload
        if not isinstance(payload, SparsePayload) or self._dense:
            target.initializer.append(self._tensor(constant))
            return
        sparse = target.sparse_initializer.add()
        sparse.CopyFrom(payload.proto)
        sparse.values.name = constant.name
        _describe(sparse.values, constant)

    def _tensor(self, constant: Constant, name: str | None = None) -> TensorProto:
        """A dense constant as `write` has it, with its doc string and metadata, and its name."""
        written = self._write(constant)
        name = constant.name if name is None else name
        if constant.description is None and written.name == name:
            return written
        described = TensorProto()
        described.CopyFrom(written)
        described.name = name
        _describe(described, constant)
        return described

    def _in_order(self, nodes: list[Node], lifted: Iterable[Constant]) -> Iterator[onnx.NodeProto]:
        """Node messages with `Constant` nodes among them, where they were or before their use."""
        pending = {id(c): c for c in sorted(lifted, key=lambda c: c.source_index)}
        for node in nodes:
            needed = {id(tensor) for tensor in captured_inputs(node)} if pending else set()
            due = [
                constant
                for key, constant in pending.items()
                if key in needed or -1 < constant.source_index < node.source_index
            ]
            for constant in due:
                del pending[id(constant)]
                yield self._constant_node(constant)
            yield self.node(node)
        for constant in pending.values():
            yield self._constant_node(constant)

    def _constant_node(self, constant: Constant) -> onnx.NodeProto:
        proto = onnx.NodeProto(op_type="Constant", output=[constant.name])
        if constant.source_node is not None:
            copy_fields(constant.source_node, proto, but=("output", "attribute", "op_type"))
        if isinstance(constant.payload, SparsePayload) and not self._dense:
            proto.attribute.append(helper.make_attribute("sparse_value", constant.payload.proto))
            return proto
        source = constant.source_node.attribute[0] if constant.source_node is not None else None
        untouched = constant.payload is constant.source_payload
        if source is not None and untouched and source.name not in ("value", "sparse_value"):
            proto.attribute.append(source)
            return proto
        # The tensor in the node may have a name of its own, or none.
        name = source.t.name if source is not None and source.name == "value" else None
        proto.attribute.append(helper.make_attribute("value", self._tensor(constant, name)))
        return proto

    def node(self, node: Node) -> onnx.NodeProto:
        """The message of one node with its bodies."""
        proto = onnx.NodeProto()
        if node.proto is not None:
            copy_fields(node.proto, proto, but=("input", "output", "attribute", "domain"))
        spelled = node.proto.domain if node.proto is not None else ""
        same_domain = node.domain == ("" if spelled in DEFAULT_DOMAINS else spelled)
        proto.op_type = node.op
        labels = {
            "domain": spelled if same_domain else node.domain,
            "name": node.name,
            "overload": node.overload,
        }
        for field, label in labels.items():
            # An empty string that is present takes two bytes, times all decoder nodes.
            if label or (node.proto is not None and node.proto.HasField(field)):
                setattr(proto, field, label)
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        sources = {} if node.proto is None else {a.name: a for a in node.proto.attribute}
        for key, value in node.attrs.items():
            proto.attribute.append(self._attribute(key, value, node, sources.get(key)))
        return proto

    def _attribute(
        self, key: str, value: Any, node: Node, source: AttributeProto | None
    ) -> AttributeProto:
        if isinstance(value, AttributeProto):
            return value
        attribute = AttributeProto(name=key)
        if source is not None:
            attribute.doc_string = source.doc_string
        if isinstance(value, Graph):
            attribute.type = AttributeProto.GRAPH
            self.graph(value, attribute.g)
        elif isinstance(value, list) and value and isinstance(value[0], Graph):
            attribute.type = AttributeProto.GRAPHS
            for body in value:
                self.graph(body, attribute.graphs.add())
        elif isinstance(value, Constant):
            attribute.type = AttributeProto.TENSOR
            attribute.t.CopyFrom(self._tensor(value))
        elif source is not None and _same(value, node.imported.get(key)):
            return source
        else:
            attribute.MergeFrom(helper.make_attribute(key, value))
        return attribute

    def _declarations(self, graph: Graph, nodes: list[Node], target: onnx.GraphProto) -> None:
        for tensor in _ordered_inputs(graph):
            info = tensor.input_info if isinstance(tensor, Constant) else tensor.info
            target.input.append(_renamed(info, tensor))
        for tensor in graph.outputs:
            info = graph.output_infos.get(tensor.name) or tensor.info
            target.output.append(_renamed(info, tensor))
        target.value_info.extend(_value_infos(graph, nodes))


def _describe(message: TensorProto, constant: Constant) -> None:
    """Puts the doc string and metadata of the constant into the message."""
    if constant.description is not None:
        message.doc_string = constant.description.doc_string
        del message.metadata_props[:]
        message.metadata_props.extend(constant.description.metadata_props)


def _adopt_orphans(graph: Graph) -> None:
    """Constants made without an owner belong to the graph of the node that takes them."""
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, Constant) and tensor.owner is None:
                tensor.owner = graph
                graph.initializers.append(tensor)


def _same(value: Any, imported: Any) -> bool:
    return type(value) is type(imported) and value == imported


def _ordered_inputs(graph: Graph) -> Iterator[Variable | Constant]:
    current = {id(tensor) for tensor in graph.inputs}
    declared = set()
    for tensor in graph.declared_inputs:
        overridable = isinstance(tensor, Constant) and tensor.input_info is not None
        if overridable or id(tensor) in current:
            declared.add(id(tensor))
            yield tensor
    yield from (tensor for tensor in graph.inputs if id(tensor) not in declared)


def _renamed(info: onnx.ValueInfoProto | None, tensor: Variable | Constant) -> onnx.ValueInfoProto:
    if info is None:
        return onnx.ValueInfoProto(name=tensor.name)
    if info.name == tensor.name:
        return info
    renamed = onnx.ValueInfoProto()
    renamed.CopyFrom(info)
    renamed.name = tensor.name
    return renamed


def _value_infos(graph: Graph, nodes: Iterable[Node]) -> Iterator[onnx.ValueInfoProto]:
    """Declared types of inner tensors, in the file's order, then those that passes declared."""
    declared: dict[str, onnx.ValueInfoProto] = {}
    for constant in graph.initializers:
        if constant.info is not None:
            declared[constant.name] = _renamed(constant.info, constant)
    outer = set() if graph.is_function else {tensor.name for tensor in graph.inputs}
    tensors = [tensor for node in nodes for tensor in node.outputs]
    for tensor in [*tensors, *(graph.inputs if graph.is_function else ())]:
        if tensor.info is not None and tensor.name not in outer:
            declared[tensor.name] = _renamed(tensor.info, tensor)
    for info in graph.foreign_infos:
        declared.setdefault(info.name, info)
    source = graph.proto.value_info if graph.proto is not None else ()
    for info in source:
        if info.name in declared:
            yield declared.pop(info.name)
        elif _repeats_an_interface(graph, info.name):
            yield info
    yield from declared.values()


def _repeats_an_interface(graph: Graph, name: str) -> bool:
    return any(tensor.name == name for tensor in (*graph.inputs, *graph.outputs))
