"""The graph that passes edit: onnx-graphsurgeon's objects with the gaps closed.

Graphsurgeon compares tensors by name and nodes by structure, so that a list can remove the wrong
one; it has no owner for a constant, and no place for what ONNX has and it has not. Here every
object is itself only, knows its graph, and carries the pieces of the file it came from.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.util.misc import SynchronizedList

from onnxslim_passes.errors import unknown_name
from onnxslim_passes.model.payload import (
    Array,
    ArrayPayload,
    Payload,
    SparsePayload,
    TensorPayload,
    flat_pieces,
    numpy_dtype,
    sparse_payload,
)


class Variable(gs.Variable):
    """A tensor that is known only when the model runs.

    Attributes:
        info: the declaration it has in the file, if any: type, shape, denotations, doc string.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    dtype: np.dtype[Any] | None
    shape: list[int | str | None] | None

    def __init__(self, name: str, info: onnx.ValueInfoProto | None = None) -> None:
        dtype, shape = declared_type(info)
        super().__init__(name, dtype, shape)
        self.info = info

    def forget_type(self) -> None:
        """Drops the declared type and shape, because an edit made them wrong."""
        self.info, self.dtype, self.shape = None, None, None


def declared_type(
    info: onnx.ValueInfoProto | None,
) -> tuple[np.dtype[Any] | None, list[int | str | None] | None]:
    """Element type and shape of a declaration, None for what it leaves open."""
    if info is None or info.type.WhichOneof("value") != "tensor_type":
        return None, None
    tensor = info.type.tensor_type
    dtype = numpy_dtype(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return dtype, None
    return dtype, [dimension_value(dim) for dim in tensor.shape.dim]


def dimension_value(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    """A size, a symbol, or None where nothing is said."""
    kind = dim.WhichOneof("value")
    if kind == "dim_value":
        return int(dim.dim_value)
    return str(dim.dim_param) if kind == "dim_param" and dim.dim_param else None


class Constant(gs.Constant):
    """A tensor whose values are in the file.

    Attributes:
        payload: where the values are.
        owner: the graph or body whose initializer it is.
        info: its declaration among the value_infos of the file, if any.
        input_info: its declaration among the graph inputs, if it is also an input (a default that
            a caller may override), else None.
        was_initializer: True if it was an initializer in the file, not a node and not new.
        source_node: the `Constant` node it was lifted from, if any.
        source_index: the place of that node among the nodes.
        source_payload: the payload it had in the file, if it was lifted.
        description: a message with its doc string and metadata, which stay when values change, if
            it has any.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, name: str, payload: Payload, owner: "Graph | None" = None) -> None:
        # Graphsurgeon's own constructor refuses payloads and NumPy scalars.
        self.name = name
        self.inputs = SynchronizedList(self, field_name="outputs", initial=[])
        self.outputs = SynchronizedList(self, field_name="inputs", initial=[])
        self.data_location = None
        self._export_dtype = None
        self.payload = payload
        self.owner = owner
        self.info: onnx.ValueInfoProto | None = None
        self.input_info: onnx.ValueInfoProto | None = None
        self.was_initializer = False
        self.source_node: onnx.NodeProto | None = None
        self.source_index = -1
        self.source_payload: Payload | None = None
        self.description: onnx.TensorProto | None = None

    def describe_like(self, source: onnx.TensorProto) -> None:
        """Takes over the doc string and metadata of a message, if it has any."""
        if source.doc_string or source.metadata_props:
            self.description = onnx.TensorProto(
                doc_string=source.doc_string, metadata_props=source.metadata_props
            )

    @property
    def _values(self) -> Array:
        return self.payload.array()

    @property
    def values(self) -> Array:
        """The values, read-only; external and packed data is decoded at each call."""
        array = self.payload.array()
        view = array.view()
        view.flags.writeable = False
        return view

    @values.setter
    def values(self, values: Array) -> None:
        self.payload = ArrayPayload(np.asarray(values))

    def flat_pieces(self) -> Iterator[Array]:
        """The values one after the other, those in a file a piece at a time; read-only."""
        return flat_pieces(self.payload)

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.payload.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy (or ml_dtypes) element type."""
        return numpy_dtype(self.payload.elem_type)

    @property
    def elem_type(self) -> int:
        """ONNX element type."""
        return self.payload.elem_type

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the values as they are stored."""
        return self.payload.nbytes

    @property
    def sparse(self) -> bool:
        """Whether it is stored as a sparse initializer; assignable."""
        return isinstance(self.payload, SparsePayload)

    @sparse.setter
    def sparse(self, wanted: bool) -> None:
        if wanted and not self.sparse:
            self.payload = sparse_payload(self.values)
        elif not wanted and self.sparse:
            self.payload = ArrayPayload(self.payload.array())

    @property
    def where(self) -> str:
        """Its name, with the path of the body it stands in."""
        path = self.owner.path if self.owner is not None else ""
        return f"{path}/{self.name}" if path else str(self.name)


class Node(gs.Node):
    """One operation.

    Attributes:
        graph: the graph or body that holds it.
        overload: of the model-local function it calls, or "".
        proto: the message it was read from, or None for a new node.
        source_index: its place in the message it was read from, or -1.
        file_index: its place in the file, also in a copy of the model, or -1.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        op: str,
        name: str,
        graph: "Graph",
        attrs: dict[str, Any] | None = None,
        domain: str = "",
        proto: onnx.NodeProto | None = None,
    ) -> None:
        super().__init__(op, name, attrs if attrs is not None else {}, [], [], domain)
        self.graph = graph
        self.overload = proto.overload if proto is not None else ""
        self.proto = proto
        self.source_index = -1
        self.file_index = -1
        self.imported: dict[str, Any] = {}

    @property
    def where(self) -> str:
        """Its name (or operator and place), with the path of the body it stands in."""
        label = self.name or f"{self.op}#{self.file_index}"
        return f"{self.graph.path}/{label}" if self.graph.path else label

    def bodies(self) -> Iterator[tuple[str, "Graph"]]:
        """The bodies that hang on it, by attribute name."""
        for key, value in self.attrs.items():
            if isinstance(value, Graph):
                yield key, value
            elif isinstance(value, list) and value and isinstance(value[0], Graph):
                for index, body in enumerate(value):
                    yield f"{key}[{index}]", body

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, or `default` where it is absent or refers to a function's."""
        value = self.attrs.get(name, default)
        return default if isinstance(value, onnx.AttributeProto) else value


class Graph(gs.Graph):
    """The main graph, the body of a control-flow node, or a model-local function.

    Attributes:
        parent: the graph that holds the node this is a body of, or None.
        path: "" for the main graph, else "node/attribute" down to here, or "domain::function".
        initializers: the constants it owns, in order.
        declared_inputs: its inputs in the order of the file, initializers among them included.
        foreign_infos: declarations in the file of tensors that this graph does not make.
        is_function: True for the body of a model-local function.
        proto: the message it was read from.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        name: str,
        *,
        parent: "Graph | None" = None,
        path: str = "",
        opset: int,
        names: set[str],
        is_function: bool = False,
        proto: Any = None,
    ) -> None:
        super().__init__(name=name, opset=opset)
        self.parent = parent
        self.path = path
        self.is_function = is_function
        self.proto = proto
        self.names = names
        self.initializers: list[Constant] = []
        self.declared_inputs: list[Variable | Constant] = []
        self.output_infos: dict[str, onnx.ValueInfoProto] = {}
        self.foreign_infos: list[onnx.ValueInfoProto] = []

    def fresh_name(self, hint: str) -> str:
        """A name like `hint` that nothing in the whole model has; it is taken from now on."""
        name, number = hint, 1
        while not name or name in self.names:
            name, number = f"{hint}_{number}", number + 1
        self.names.add(name)
        return name

    def add_constant(self, hint: str, values: Array) -> Constant:
        """A new constant owned by this graph, its name `hint` or, if taken, like it."""
        constant = Constant(self.fresh_name(hint), ArrayPayload(np.asarray(values)), self)
        self.initializers.append(constant)
        return constant

    def add_node(
        self,
        op: str,
        inputs: Sequence[Variable | Constant],
        *,
        outputs: Sequence[str | Variable] = (),
        name: str | None = None,
        attrs: dict[str, Any] | None = None,
        domain: str = "",
    ) -> Node:
        """A new node at the end; saving puts it in order.

        Args:
            op: operator.
            inputs: tensors.
            outputs: existing variables, or hints for the names of new ones; by default one,
                named after the operator.
            name: hint for the node's name; by default that of its first output.
            attrs: attributes.
            domain: operator domain.
        """
        made = [
            Variable(self.fresh_name(output)) if isinstance(output, str) else output
            for output in (outputs or (op.lower(),))
        ]
        node = Node(op, self.fresh_node_name(name or made[0].name), self, attrs, domain)
        node.inputs.extend(list(inputs))
        node.outputs.extend(made)
        self.nodes.append(node)
        return node

    def fresh_node_name(self, hint: str) -> str:
        """A node name that nothing in the model has."""
        return self.fresh_name(f"node:{hint}")[len("node:") :]

    def remove_node(self, node: Node) -> None:
        """Takes a node out, and everything in its bodies, with all their uses of tensors."""
        self.nodes.remove(node)
        pending = [node]
        while pending:
            gone = pending.pop()
            gone.inputs.clear()
            gone.outputs.clear()
            for _, body in gone.bodies():
                pending.extend(body.nodes)

    def node(self, name: str) -> Node:
        """The node of this name.

        Raises:
            UnknownNameError: if there is none, with the nearest name.
        """
        node: Node
        for node in self.nodes:
            if node.name == name:
                return node
        raise unknown_name("node", name, [node.name for node in self.nodes])


__all__ = [
    "Constant",
    "Graph",
    "Node",
    "TensorPayload",
    "Variable",
    "declared_type",
    "dimension_value",
]
